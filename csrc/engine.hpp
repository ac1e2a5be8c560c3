// What the kernels and rules make together: whole Gramians, whole combinations, over blocks and threads.
#pragma once

#include <cstdint>
#include <vector>

#include "rule.hpp"
#include "tier.hpp"

namespace fastconfig {

// A run of columns that is combined by a Gramian of its own.
struct Part {
    Columns columns;
    const Rule* rule;
    double* operand;  // as of Rule::weights
};

struct Engine {
    const Tier* tier;
    int threads;

    // gramian: (m, m) row-major, symmetric to the bit.
    void gramian(const Rows& rows, double* gramian) const;

    // out (n,) = Σ c_i g_i; rows of weight 0 are not read.
    void apply(const Rows& rows, const double* weights, void* out) const;

    // out (n,) by GradDrop; leak (m,), or null for zeros.
    void graddrop(const Rows& rows, const double* leak, Draw draw, void* out) const;

    // Gramian and combination, with a method's weights in between. gramian (m, m) and weights (m,) receive K and c.
    // Returns as Rule::weights does; where that is a row, out is untouched.
    int64_t combine(const Rows& rows, const Rule& rule, double* operand, void* out, double* gramian,
                    double* weights) const;

    // The same for each of the parts, in two passes over all of them. gramian (parts, m, m) and weights (parts, m).
    // Where a rule returns a row, out is untouched, and it is the first such.
    int64_t combine_parts(const Rows& rows, const std::vector<Part>& parts, void* out, double* gramian,
                          double* weights) const;
};

}  // namespace fastconfig
