#include "spectrum.hpp"

#include <cmath>
#include <limits>

namespace fastconfig {
namespace {

// Squares under this are noise of a square root of 1e-145 beside a matrix of entries near 1, and would soon be
// subnormal, where 2/|v|² has no digits left.
constexpr double kNegligible = 1e-290;

// Sweeps an eigenvalue may take; two or three are usual. Without a bound, NaN would never converge.
constexpr int kMostSweeps = 100;

// |(f, g)|, by the quick way where no square leaves the range of normal numbers.
double length_of(double f, double g) {
    const double square = f * f + g * g;
    return square > kNegligible && square < 1.0 / kNegligible ? std::sqrt(square) : std::hypot(f, g);
}

}  // namespace

Spectrum::Spectrum(const Machine& machine, const double* a, int64_t m)
    : machine_(machine), m_(m), values_(m), reflectors_(m * m), scales_(m) {
    std::vector<double> work(a, a + m * m), off(m), spare(m);
    rotations_.reserve(m * m);  // about as many as there are
    machine.dense.tridiagonalise(work.data(), m, kNegligible, reflectors_.data(), scales_.data(), off.data(),
                                 spare.data());
    for (int64_t i = 0; i < m; ++i) values_[i] = work[i * m + i];
    implicit_ql(off.data());
}

// Diagonalises T in place and keeps every rotation.
void Spectrum::implicit_ql(double* off) {
    constexpr double eps = std::numeric_limits<double>::epsilon();
    const int64_t m = m_;
    double* diagonal = values_.data();
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
                const double f = s * off[i], b = c * off[i];
                off[i + 1] = r = length_of(f, g);
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
                rotations_.push_back({i, c, s});
            }
            if (i >= l) continue;
            diagonal[l] -= shift;
            off[l] = g;
            off[end] = 0.0;
        }
    }
}

void Spectrum::reflect(int64_t k, double* x) const {
    if (scales_[k] == 0.0) return;
    const double* v = &reflectors_[k * m_];
    const int64_t first = k + 1;
    machine_.add(-scales_[k] * machine_.dot(v + first, x + first, m_ - first), v + first, x + first, m_ - first);
}

void Spectrum::to_eigenvectors(double* x) const {
    for (int64_t k = 0; k + 2 < m_; ++k) reflect(k, x);
    for (const auto& [low, c, s] : rotations_) {
        const double old = x[low + 1];
        x[low + 1] = s * x[low] + c * old;
        x[low] = c * x[low] - s * old;
    }
}

void Spectrum::from_eigenvectors(double* x) const {
    for (auto rotation = rotations_.rbegin(); rotation != rotations_.rend(); ++rotation) {
        const auto [low, c, s] = *rotation;
        const double old = x[low + 1];
        x[low + 1] = c * old - s * x[low];
        x[low] = c * x[low] + s * old;
    }
    for (int64_t k = m_ - 3; k >= 0; --k) reflect(k, x);
}

}  // namespace fastconfig
