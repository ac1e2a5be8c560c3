// ConFIG's m×m part: from the Gramian to the coefficients of the combination (arXiv 2408.11104, eq. 2 to 4).
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "rule.hpp"

namespace fastconfig {

enum class Length : int { projection, minimum, maximum, harmonic, arithmetic, geometric, tracked };

// The meaning is that of backends/reference.py. It takes no operand.
struct ConfigRule : Rule {
    std::vector<double> direction;  // ŵ, m entries; empty for equal weights
    Length length;
    int64_t tracked;  // the loss whose norm Length::tracked takes, already in 0..m-1
    double rtol;

    ConfigRule(std::vector<double> direction, Length length, int64_t tracked, double rtol, NonFinite nonfinite)
        : Rule(nonfinite), direction(std::move(direction)), length(length), tracked(tracked), rtol(rtol) {}

    int64_t weights(const Machine& machine, const double* gramian, int64_t m, double* operand,
                    double* weights) const override;
};

}  // namespace fastconfig
