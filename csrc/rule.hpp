// What every method is to the core: a rule from the Gramian to the coefficients of the combination.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastconfig {

struct Machine;

enum class NonFinite : int { propagate, drop, raise };

class Rule {
 public:
    static constexpr int64_t kFinite = -1;

    explicit Rule(NonFinite nonfinite) : nonfinite(nonfinite) {}
    virtual ~Rule() = default;

    // machine: what it computes with. gramian: (m, m) row-major. operand: what the rule takes besides, of this call
    // alone, and may update; null where it takes nothing. weights: (m,) receives c. Returns kFinite, or the first
    // non-finite row under NonFinite::raise, when nothing has been written; nor has it where an allocation fails.
    virtual int64_t weights(const Machine& machine, const double* gramian, int64_t m, double* operand,
                            double* weights) const = 0;

    const NonFinite nonfinite;
};

// The first row whose gradient is not finite, as its squared norm says, or Rule::kFinite.
inline int64_t first_nonfinite(const double* gramian, int64_t m) {
    for (int64_t i = 0; i < m; ++i)
        if (!std::isfinite(gramian[i * m + i])) return i;
    return Rule::kFinite;
}

}  // namespace fastconfig
