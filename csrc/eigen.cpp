#include "eigen.hpp"

#include <cmath>
#include <limits>

namespace fastconfig {
namespace {

// Squares under this are noise of a square root of 1e-145 beside a matrix of entries near 1, and would soon be
// subnormal, where 2/|v|² has no digits left.
constexpr double kNegligible = 1e-290;

// Sweeps an eigenvalue may take; two or three are usual. Without a bound, NaN would never converge.
constexpr int kMostSweeps = 100;

// Reduces a (overwritten) to tridiagonal T = Qᵀ A Q; rows of q become the columns of Q.
void tridiagonalise(double* a, int64_t m, double* diagonal, double* off, double* q) {
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < m; ++j) q[i * m + j] = i == j;
    std::vector<double> v(m), p(m);
    for (int64_t k = 0; k + 2 < m; ++k) {
        // The reflector that maps column k below the diagonal onto its first entry.
        double tail = 0.0;
        for (int64_t i = k + 2; i < m; ++i) tail += a[i * m + k] * a[i * m + k];
        if (tail < kNegligible) {
            for (int64_t i = k + 2; i < m; ++i) a[i * m + k] = a[k * m + i] = 0.0;
            continue;
        }
        double head = a[(k + 1) * m + k];
        double image = head > 0 ? -std::sqrt(head * head + tail) : std::sqrt(head * head + tail);
        for (int64_t i = k + 1; i < m; ++i) v[i] = a[i * m + k];
        v[k + 1] -= image;
        double scale = 2.0 / (v[k + 1] * v[k + 1] + tail);

        // A ← HAH on the trailing block, as a symmetric rank-two update.
        double along = 0.0;
        for (int64_t i = k + 1; i < m; ++i) {
            double dot = 0.0;
            for (int64_t j = k + 1; j < m; ++j) dot += a[i * m + j] * v[j];
            p[i] = scale * dot;
            along += p[i] * v[i];
        }
        for (int64_t i = k + 1; i < m; ++i) p[i] -= 0.5 * scale * along * v[i];
        for (int64_t i = k + 1; i < m; ++i)
            for (int64_t j = k + 1; j < m; ++j) a[i * m + j] -= v[i] * p[j] + p[i] * v[j];
        a[(k + 1) * m + k] = a[k * m + k + 1] = image;
        for (int64_t i = k + 2; i < m; ++i) a[i * m + k] = a[k * m + i] = 0.0;

        // Q ← QH, kept transposed: rows k+1.. of q are mixed.
        for (int64_t j = 0; j < m; ++j) p[j] = 0.0;
        for (int64_t i = k + 1; i < m; ++i)
            for (int64_t j = 0; j < m; ++j) p[j] += v[i] * q[i * m + j];
        for (int64_t i = k + 1; i < m; ++i)
            for (int64_t j = 0; j < m; ++j) q[i * m + j] -= scale * v[i] * p[j];
    }
    for (int64_t i = 0; i < m; ++i) {
        diagonal[i] = a[i * m + i];
        off[i] = i + 1 < m ? a[(i + 1) * m + i] : 0.0;
    }
}

// Diagonalises T in place; every rotation is applied to the rows of q.
void implicit_ql(double* diagonal, double* off, double* q, int64_t m) {
    constexpr double eps = std::numeric_limits<double>::epsilon();
    for (int64_t l = 0; l < m; ++l) {
        for (int sweep = 0; sweep < kMostSweeps; ++sweep) {
            int64_t end = l;  // T splits behind the first negligible off-diagonal entry
            while (end + 1 < m && std::fabs(off[end]) > eps * (std::fabs(diagonal[end]) + std::fabs(diagonal[end + 1])))
                ++end;
            if (end == l) break;
            double g = (diagonal[l + 1] - diagonal[l]) / (2.0 * off[l]);
            double r = std::hypot(g, 1.0);
            g = diagonal[end] - diagonal[l] + off[l] / (g + std::copysign(r, g));
            double s = 1.0, c = 1.0, shift = 0.0;
            int64_t i = end - 1;
            for (; i >= l; --i) {
                double f = s * off[i], b = c * off[i];
                off[i + 1] = r = std::hypot(f, g);
                if (r == 0.0) {  // the bulge vanished early: deflate here
                    diagonal[i + 1] -= shift;
                    off[end] = 0.0;
                    break;
                }
                s = f / r;
                c = g / r;
                g = diagonal[i + 1] - shift;
                r = (diagonal[i] - g) * s + 2.0 * c * b;
                shift = s * r;
                diagonal[i + 1] = g + shift;
                g = c * r - b;
                double* low = q + i * m;
                double* high = low + m;
                for (int64_t j = 0; j < m; ++j) {
                    double old = high[j];
                    high[j] = s * low[j] + c * old;
                    low[j] = c * low[j] - s * old;
                }
            }
            if (i >= l) continue;
            diagonal[l] -= shift;
            off[l] = g;
            off[end] = 0.0;
        }
    }
}

}  // namespace

Eigen symmetric_eigen(const double* a, int64_t m) {
    Eigen result{std::vector<double>(m), std::vector<double>(m * m)};
    std::vector<double> work(a, a + m * m), off(m);
    tridiagonalise(work.data(), m, result.values.data(), off.data(), result.vectors.data());
    implicit_ql(result.values.data(), off.data(), result.vectors.data(), m);
    return result;
}

}  // namespace fastconfig
