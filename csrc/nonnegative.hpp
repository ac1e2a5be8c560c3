// The one quadratic program of all methods: minimise ½xᵀAx - fᵀx over x ≥ 0, exactly.
#pragma once

#include <cstdint>
#include <vector>

#include "machine.hpp"

namespace fastconfig {

// A: (size, size) symmetric, positive semi-definite, of diagonal near 1; f such that the objective is bounded. At the
// solution Ax - f ≥ 0 and x(Ax - f) = 0 to rounding.
//
// Where the free block stays regular, by block principal pivoting: every entry of the wrong sign changes sides at once,
// and a solution takes a handful of factorisations (Júdice & Pires 1994; Kim & Park 2011). It is not certain to end, so
// after some exchanges without progress, and for dependent rows, by the active set of Lawson & Hanson (Solving Least
// Squares Problems, ch. 23), which is.
class NonNegative {
 public:
    NonNegative(const Machine& machine, const double* a, int64_t size);

    // x (size,), overwritten. The last solution's support is where the search begins.
    void solve(const double* f, double* x);

    // Which entries the last solution left free.
    const std::vector<char>& free() const { return free_; }

    // Begin the next search with none free.
    void forget() { free_.assign(size_, 0); }

 private:
    bool by_blocks(const double* f, double* x);
    void by_active_set(const double* f, double* x);
    bool solve_free(const double* f, double* x);
    bool exchange(int64_t entering, const double* f, double* x);
    double surplus(const double* f, const double* x, int64_t j) const;

    const Machine& machine_;
    const double* a_;
    int64_t size_;
    std::vector<char> free_;
    std::vector<int64_t> index_;
    Factor block_;
    std::vector<double> solution_;
    std::vector<char> wrong_;
};

// w = argmin wᵀKw on the simplex Σw = 1, w ≥ 0: the point of least norm in the hull of the rows (k, k), none zero,
// given as unit Gramian and norms. Returns false, and w, where that point is the origin.
bool least_norm_point(const Machine& machine, const double* unit, const double* norm, int64_t k, double* w);

}  // namespace fastconfig
