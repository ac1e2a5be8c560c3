// Eigen-decomposition of a small symmetric matrix, in float64.
#pragma once

#include <cstdint>
#include <vector>

namespace fastconfig {

// A = V diag(values) Vᵀ. vectors holds eigenvector k in row k: vectors[k * m + i]. In no particular order.
struct Eigen {
    std::vector<double> values;
    std::vector<double> vectors;
};

// a: (m, m) row-major, symmetric, finite, its largest entry near 1 (entries under 1e-145 count as zero). Householder
// reduction to tridiagonal form, then implicit QL with Wilkinson's shift (Golub & Van Loan, Matrix Computations, 8.3):
// backward stable, |error in an eigenvalue| ≲ m·2⁻⁵³·|A|, O(m³).
Eigen symmetric_eigen(const double* a, int64_t m);

}  // namespace fastconfig
