// M-ConFIG's step over one segment of columns. The meaning is that of backends/momentum/reference.py.
#pragma once

#include <cstdint>
#include <vector>

#include "rule.hpp"
#include "tier.hpp"

namespace fastconfig {

// The m×m numbers between steps, float64, as moments.py's Ledger.
struct Ledger {
    double *gramian, *weights, *counts, *totals;
};

// A packed Decision, as moments.py lays it out: these, then forward (m), backward (m), scales (k).
enum : int64_t { kTake, kUpdate, kGradient, kSecond, kClip, kHead };

struct Recorded {
    std::vector<int64_t> loss;
    std::vector<const void*> gradient;
    DType dtype;
};

struct StepRule {
    double beta1, beta2;
    std::vector<MomentumGroup> group;
};

class MomentumSegment {
 public:
    // average: m rows of n elements of `state`, float32 or float64. Pieces do not overlap.
    MomentumSegment(std::vector<void*> average, void* second, int64_t n, DType state,
                    std::vector<MomentumPiece> pieces);

    // out (k, m): the products of the new averages with all.
    void products(const Tier& tier, int threads, const Recorded& recorded, const double* scales, double beta1,
                  double* out) const;

    // decision: packed.
    void update(const Tier& tier, int threads, const Recorded& recorded, const StepRule& rule,
                const double* decision) const;
    double update_square(const Tier& tier, int threads, const Recorded& recorded, const StepRule& rule,
                         const double* decision) const;

    // operand is the method's. Returns Rule::kFinite, or under NonFinite::raise the first loss whose gradient is not
    // finite; then nothing has been written, nor has it where an allocation fails.
    int64_t step(const Tier& tier, int threads, const Recorded& recorded, const StepRule& rule, const Rule& method,
                 double* operand, const double* scales, bool found_inf, const Ledger& ledger) const;

 private:
    // Neighbouring columns whose parameters belong to one group, or that have none.
    struct Run {
        int64_t first, count;
        int group;
    };

    struct Pass;

    void write(const Tier& tier, int threads, DType dtype, const StepRule& rule, const double* decision,
               Pass& pass) const;
    double run(const Tier& tier, int threads, DType dtype, const StepRule& rule, const double* decision, Pass& pass,
               bool measure) const;
    void fill_assigned(const StepRule& rule, DType dtype, bool with_nan) const;
    int64_t m() const { return static_cast<int64_t>(average_.size()); }

    std::vector<void*> average_;
    void* second_;
    int64_t n_;
    DType state_;
    std::vector<MomentumPiece> pieces_;
    std::vector<Run> runs_;
};

}  // namespace fastconfig
