// Functions of a small symmetric matrix, in float64.
#pragma once

#include <cstdint>
#include <vector>

#include "machine.hpp"

namespace fastconfig {

// A = V diag(values) Vᵀ for A (m, m) row-major, symmetric, finite, its largest entry near 1 (entries under 1e-145 count
// as zero): f(A)x is to_eigenvectors(x), each entry times f of its value, from_eigenvectors(x).
//
// Householder reduction to tridiagonal form, then implicit QL with Wilkinson's shift (Golub & Van Loan, Matrix
// Computations, 8.3): backward stable, |error in an eigenvalue| ≲ m·2⁻⁵³·|A|. V is kept as the reflectors and rotations
// that it is the product of, which a vector passes in O(m²); to form V would take most of the time.
class Spectrum {
 public:
    Spectrum(const Machine& machine, const double* a, int64_t m);

    // (m,) the eigenvalues, in no particular order.
    const std::vector<double>& values() const { return values_; }

    // x (m,) ← Vᵀx, and x ← Vx.
    void to_eigenvectors(double* x) const;
    void from_eigenvectors(double* x) const;

 private:
    struct Rotation {
        int64_t low;
        double c, s;
    };

    void implicit_ql(double* off);
    void reflect(int64_t k, double* x) const;

    const Machine& machine_;
    const int64_t m_;
    std::vector<double> values_, reflectors_, scales_;  // I - scale·vvᵀ, v being 0 up to entry k
    std::vector<Rotation> rotations_;
};

}  // namespace fastconfig
