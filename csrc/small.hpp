// Vectors and triangular factors of a few dozen float64 numbers.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace fastconfig {

constexpr double kEpsilon = std::numeric_limits<double>::epsilon();

// Eigenvalues and squared lengths that count as zero, relative to what they are made of: the contract's default rtol.
constexpr double kNothing = 1e-12;

inline double dot(const double* a, const double* b, int64_t count) {
    double total = 0.0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < count; ++i) total += a[i] * b[i];
    return total;
}

// y += factor·x
inline void add(double factor, const double* x, double* y, int64_t count) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] += factor * x[i];
}

// y = A x for a symmetric A (size, size).
inline void multiply(const double* a, const double* x, double* y, int64_t size) {
    for (int64_t i = 0; i < size; ++i) y[i] = dot(a + i * size, x, size);
}

// A = UᵀU in place: the upper triangle of a (size, size) row-major becomes U, row by row, so that the inner loop runs
// along memory. False where a pivot is not over `least`.
inline bool factor(double* a, int64_t size, double least) {
    for (int64_t p = 0; p < size; ++p) {
        double* row = a + p * size;
        if (!(row[p] > least)) return false;
        row[p] = std::sqrt(row[p]);
        const double scale = 1.0 / row[p];
        for (int64_t j = p + 1; j < size; ++j) row[j] *= scale;
        for (int64_t i = p + 1; i < size; ++i) add(-row[i], row + i, a + i * size + i, size - i);
    }
    return true;
}

// x ← A⁻¹x for A = UᵀU.
inline void solve_factored(const double* u, double* x, int64_t size) {
    for (int64_t i = 0; i < size; ++i) {
        x[i] /= u[i * size + i];
        add(-x[i], u + i * size + i + 1, x + i + 1, size - i - 1);
    }
    for (int64_t i = size - 1; i >= 0; --i)
        x[i] = (x[i] - dot(u + i * size + i + 1, x + i + 1, size - i - 1)) / u[i * size + i];
}

}  // namespace fastconfig
