// A model of how long one program takes on a multiprocessor: an estimate, for comparing kernels and for budgets.
//
// Warps issue in order, one instruction a cycle and scheduler, once its operands are there and its unit is free. Moves
// and conversions between 32 and 64 bits are free, as the assembler renames registers. What is not modelled: caches
// that miss, the instruction cache, dual issue, register banks, and that PTX is not yet the machine's own code.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "program.hpp"

namespace ptx {

// Cycles, but where a name says otherwise; ctypes fills it in.
struct Latencies {
    double integer, float64, division, special, matrix, shuffle, shared, first_level, second_level, atomic, barrier,
        branch;
    double float64_interval;   // between two warp instructions of one unit
    double division_interval;  // a division is a dozen of them
    double special_interval, matrix_interval;
    int32_t float64_units;  // 4: one a scheduler; 1: one for all
};

constexpr int kSchedulers = 4;

class Clock {
 public:
    Clock(const Latencies& latencies, int warps, int registers, int instructions)
        : costs_(latencies),
          spent_(instructions, 0.0),
          next_(warps, 0.0),
          ready_(warps, std::vector<double>(registers, 0.0)) {}

    // When the warp could issue this instruction.
    double earliest(int warp, const Instruction& i) const {
        double time = next_[warp];
        const auto& ready = ready_[warp];
        if (i.guard >= 0) time = std::max(time, ready[i.guard]);
        for (int k = 0; k < i.sources; ++k) {
            if (!i.source[k].is_constant) time = std::max(time, ready[i.source[k].number]);
        }
        if (i.is_free) return time;
        time = std::max(time, scheduler_[warp % kSchedulers]);
        return std::max(time, unit(warp, i.unit));
    }

    // It issues it; `wavefronts` says how often a memory operation has to pass.
    void issue(int warp, const Instruction& i, int wavefronts) {
        const double time = earliest(warp, i), before = next_[warp];
        if (!i.is_free) {
            next_[warp] = scheduler_[warp % kSchedulers] = time + 1;
            unit(warp, i.unit) = time + interval(i.unit, wavefronts);
            ++issued_;
        }
        if (i.unit == Unit::kControl) next_[warp] = time + costs_.branch;
        if (warp == 0) spent_[i.pc] += std::max(time, next_[warp]) - before;
        const double done = time + (i.is_free ? 0 : latency(i.unit) + std::max(wavefronts - 1, 0));
        for (int k = 0; k < i.destinations; ++k) {
            if (i.destination[k] >= 0) ready_[warp][i.destination[k]] = done;
        }
        end_ = std::max({end_, done, next_[warp]});
    }

    // All warps have arrived, the last of them now.
    void barrier() {
        const double time = *std::max_element(next_.begin(), next_.end()) + costs_.barrier;
        std::fill(next_.begin(), next_.end(), time);
        end_ = std::max(end_, time);
    }

    double next(int warp) const { return next_[warp]; }
    double end() const { return end_; }
    uint64_t issued() const { return issued_; }
    // Cycles that the first warp waited for, and took for, each instruction.
    const std::vector<double>& spent() const { return spent_; }

 private:
    double latency(Unit unit) const {
        switch (unit) {
            case Unit::kFloat64: return costs_.float64;
            case Unit::kDivision: return costs_.division;
            case Unit::kSpecial: return costs_.special;
            case Unit::kMatrix: return costs_.matrix;
            case Unit::kShuffle: return costs_.shuffle;
            case Unit::kShared: return costs_.shared;
            case Unit::kGlobal: return costs_.first_level;
            case Unit::kGlobalPast1: return costs_.second_level;
            case Unit::kAtomic: return costs_.atomic;
            default: return costs_.integer;
        }
    }

    double interval(Unit unit, int wavefronts) const {
        switch (unit) {
            case Unit::kFloat64: return costs_.float64_interval;
            case Unit::kDivision: return costs_.division_interval;
            case Unit::kMatrix: return costs_.matrix_interval;
            case Unit::kSpecial: return costs_.special_interval;
            case Unit::kShuffle: return 1;
            case Unit::kShared:
            case Unit::kGlobal:
            case Unit::kGlobalPast1:
            case Unit::kAtomic: return std::max(wavefronts, 1);
            default: return 1;
        }
    }

    // When the unit that an instruction needs is free again.
    double& unit(int warp, Unit which) {
        return const_cast<double&>(static_cast<const Clock*>(this)->unit(warp, which));
    }
    const double& unit(int warp, Unit which) const {
        const int scheduler = warp % kSchedulers;
        switch (which) {
            case Unit::kFloat64:
            case Unit::kDivision: return float64_[costs_.float64_units == 1 ? 0 : scheduler];
            case Unit::kMatrix: return matrix_[scheduler];
            case Unit::kShuffle:
            case Unit::kShared:
            case Unit::kGlobal:
            case Unit::kGlobalPast1:
            case Unit::kAtomic: return memory_;
            default: return integer_[scheduler];
        }
    }

    Latencies costs_;
    std::vector<double> spent_;
    std::vector<double> next_;                // a warp: when it may issue again
    std::vector<std::vector<double>> ready_;  // a warp and register: when its value is there
    std::array<double, kSchedulers> scheduler_{}, float64_{}, matrix_{}, integer_{};
    double memory_ = 0, end_ = 0;
    uint64_t issued_ = 0;
};

}  // namespace ptx
