// ConFIG's m×m part: from the Gramian to the coefficients of the combination (arXiv 2408.11104, eq. 2 to 4).
#pragma once

#include <cstdint>
#include <vector>

namespace fastconfig {

enum class Length : int { projection, minimum, maximum, harmonic, arithmetic, geometric, tracked };
enum class NonFinite : int { propagate, drop, raise };

struct ConfigRule {
    std::vector<double> direction;  // ŵ, m entries; empty for equal weights
    Length length = Length::projection;
    int64_t tracked = 0;  // the loss whose norm Length::tracked takes, already in 0..m-1
    double rtol = 1e-12;
    NonFinite nonfinite = NonFinite::propagate;

    static constexpr int64_t kFinite = -1;

    // gramian: (m, m) row-major. weights: (m,) receives c. Returns kFinite, or the first non-finite row under
    // NonFinite::raise, when weights is untouched. The meaning is that of backends/reference.py.
    int64_t weights(const double* gramian, int64_t m, double* weights) const;
};

}  // namespace fastconfig
