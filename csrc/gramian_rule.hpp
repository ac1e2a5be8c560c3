// The methods but ConFIG: rules from the Gramian of the gradients that have a direction to their coefficients.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "machine.hpp"
#include "rule.hpp"

namespace fastconfig {

// What a method works on: the k of m rows that are finite and not zero.
struct Problem {
    const Machine& machine;
    int64_t m, k;
    std::vector<int64_t> index;      // (k,) where they stand among the m
    std::vector<double> gramian;     // (k, k)
    std::vector<double> norm;        // (k,)
    std::vector<double> unit;        // (k, k) of the unit rows, 1 on the diagonal
    std::vector<double> preference;  // (k,) as given; empty for equal ones
    double total;                    // the sum of the preferences of all finite rows, zero ones too

    // (k,) the preferences, 1 where none were given.
    std::vector<double> preferences() const;
    // (k,) the preferences divided by that sum; zeros where only rows that were dropped had any.
    std::vector<double> shares() const;
    // (k,) the products of the rows with the combination by `weights` (k,).
    std::vector<double> products(const std::vector<double>& weights) const;
};

// parameters: the method's numbers, as methods/ lists them. operand: as Rule::weights, over all m rows. c: (k,) zeros,
// receives the coefficients. The meaning is that of the Python file of the same name in fastconfig/methods.
typedef void Method(const Problem& problem, const std::vector<double>& parameters, double* operand, double* c);

Method constant, inverse_norm, imtlg, aligned;   // gramian_rule.cpp
Method pcgrad, priority, gradvac;                // surgery.cpp
Method mgda, cagrad, dualproj, upgrad, sdmgrad;  // projection.cpp
Method nash, fairgrad;                           // bargain.cpp

struct NamedMethod {
    const char* name;
    Method* solve;
    bool only_preferred;  // whether a row of preference 0 takes no part at all
};

// The method of that name, or null.
const NamedMethod* method_named(const char* name);

struct GramianRule : Rule {
    const NamedMethod* method;
    std::vector<double> parameters;
    std::vector<double> preferences;  // m entries; empty for equal ones

    GramianRule(const NamedMethod* method, std::vector<double> parameters, std::vector<double> preferences,
                NonFinite nonfinite)
        : Rule(nonfinite), method(method), parameters(std::move(parameters)), preferences(std::move(preferences)) {}

    int64_t weights(const Machine& machine, const double* gramian, int64_t m, double* operand,
                    double* weights) const override;
};

}  // namespace fastconfig
