// What a rule computes with: arithmetic on small vectors and matrices by the machine's instructions, and its threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <exception>
#include <limits>
#include <vector>

#include "blocks.hpp"
#include "fork.hpp"
#include "tier.hpp"

namespace fastconfig {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

// Eigenvalues and squared lengths that count as zero, relative to what they are made of: the contract's default rtol.
constexpr double kNothing = 1e-12;

struct Machine {
    const Dense& dense;
    int threads;

    double dot(const double* a, const double* b, int64_t count) const { return dense.dot(a, b, count); }
    void add(double factor, const double* x, double* y, int64_t count) const { dense.add(factor, x, y, count); }
    void multiply(const double* a, const double* x, double* y, int64_t size) const { dense.multiply(a, x, y, size); }

    // Calls work(first, last) for runs that make up 0 to count, each on a thread of its own where `operations` are
    // worth it. Throws what a run has thrown. The bits must not depend on how the runs are cut.
    template <class Work>
    void share(int64_t count, int64_t operations, Work work) const {
        constexpr int64_t kSerial = 1 << 13;  // multiply-adds in which a second thread is not yet awake
        const int team =
            operations < kSerial ? 1 : threads_after_fork(static_cast<int>(std::min<int64_t>(count, threads)));
        if (team <= 1) {
            const KeepSubnormals keep;
            return work(int64_t{0}, count);
        }
        std::exception_ptr failure;
#pragma omp parallel num_threads(team)
        {
            const KeepSubnormals keep;
            const int64_t thread = omp_get_thread_num(), size = omp_get_num_threads();
            try {
                work(count * thread / size, count * (thread + 1) / size);
            } catch (...) {
#pragma omp critical(fastconfig_failure)
                failure = std::current_exception();
            }
        }
        if (failure) std::rethrow_exception(failure);
    }
};

// A symmetric matrix that is to be factored: its rows have room for whole vectors, which no cache line's end divides.
class Factor {
    static constexpr int64_t kWhole = 8;  // doubles of the widest vector, and of a cache line
    int64_t size_ = 0, stride_ = 0;
    std::vector<double> memory_;
    double* entries_;

    static int64_t stride_of(int64_t size) { return (size + kWhole - 1) / kWhole * kWhole; }

 public:
    explicit Factor(int64_t size) : memory_(size * stride_of(size) + kWhole) {
        resize(size);
        const uintptr_t line = kWhole * sizeof(double), address = reinterpret_cast<uintptr_t>(memory_.data());
        entries_ = reinterpret_cast<double*>((address + line - 1) / line * line);
    }
    Factor(const Factor&) = delete;
    Factor& operator=(const Factor&) = delete;

    // Entries have no meaning then. At most the size that it was made for.
    void resize(int64_t size) { size_ = size, stride_ = stride_of(size); }

    // Row i; what is set must be the entries from the diagonal on.
    double* row(int64_t i) { return entries_ + i * stride_; }

    // A = UᵀU in place, but 1/U_ii on the diagonal. False where a pivot is not over `least`.
    bool factor(const Machine& machine, double least) { return machine.dense.factor(entries_, size_, stride_, least); }

    // x ← A⁻¹x
    void solve(const Machine& machine, double* x) const { machine.dense.solve(entries_, x, size_, stride_); }
};

}  // namespace fastconfig
