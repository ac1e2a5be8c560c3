#include "nonnegative.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace fastconfig {
namespace {

// Under this share of its terms the surplus of a dependent row is taken for rounding.
constexpr double kLeastSurplus = 1e-10;
constexpr int kPatience = 3;  // exchanges of several entries without progress before the active set takes over

}  // namespace

NonNegative::NonNegative(const Machine& machine, const double* a, int64_t size)
    : machine_(machine), a_(a), size_(size), free_(size, 0), block_(size), solution_(size), wrong_(size) {
    index_.reserve(size);
}

void NonNegative::solve(const double* f, double* x) {
    if (!by_blocks(f, x)) by_active_set(f, x);
}

// Solves for the free entries, the others being 0. False where they are dependent.
bool NonNegative::solve_free(const double* f, double* x) {
    index_.clear();
    for (int64_t j = 0; j < size_; ++j)
        if (free_[j]) index_.push_back(j);
    const int64_t count = static_cast<int64_t>(index_.size());
    block_.resize(count);
    for (int64_t i = 0; i < count; ++i) {
        double* row = block_.row(i);
        const double* from = a_ + index_[i] * size_;
        for (int64_t j = i; j < count; ++j) row[j] = from[index_[j]];
        solution_[i] = f[index_[i]];
    }
    if (!block_.factor(machine_, 4.0 * static_cast<double>(size_) * kEpsilon)) return false;
    block_.solve(machine_, solution_.data());
    std::fill(x, x + size_, 0.0);
    for (int64_t i = 0; i < count; ++i) x[index_[i]] = solution_[i];
    return true;
}

// (f - Ax)_j, 0 where it is no more than rounding.
double NonNegative::surplus(const double* f, const double* x, int64_t j) const {
    double terms;
    const double total = f[j] - machine_.dense.dot_and_size(a_ + j * size_, x, size_, &terms);
    terms += std::fabs(f[j]);
    return std::fabs(total) <= 4.0 * static_cast<double>(size_) * kEpsilon * terms ? 0.0 : total;
}

bool NonNegative::by_blocks(const double* f, double* x) {
    int64_t fewest = size_ + 1;
    for (int patience = kPatience; patience > 0;) {
        if (!solve_free(f, x)) return false;
        int64_t wrong = 0;
        for (int64_t j = 0; j < size_; ++j) {
            const bool exchange = free_[j] ? x[j] < 0.0 : surplus(f, x, j) > 0.0;
            wrong_[j] = exchange;
            wrong += exchange;
        }
        if (wrong == 0) return true;
        patience = wrong < fewest ? kPatience : patience - 1;
        fewest = std::min(fewest, wrong);
        for (int64_t j = 0; j < size_; ++j)
            if (wrong_[j]) free_[j] = !free_[j];
    }
    return false;
}

// Lets in an entry whose row depends on the free ones: along Az = 0, z = 1 at the entry, the objective falls as surely
// as its surplus is positive, until another entry meets its bound and leaves. False where the surplus is but rounding,
// or where nothing bounds the way, as f is then out of A's range.
bool NonNegative::exchange(int64_t entering, const double* f, double* x) {
    free_[entering] = 0;
    std::vector<double> row(size_), along(size_);
    for (int64_t j = 0; j < size_; ++j) row[j] = a_[entering * size_ + j];
    solve_free(row.data(), along.data());  // z is minus this
    double terms = std::fabs(f[entering]);
    for (const int64_t i : index_) terms += std::fabs(row[i] * x[i]);
    if (surplus(f, x, entering) <= kLeastSurplus * terms) return false;
    double step = std::numeric_limits<double>::infinity();
    int64_t leaving = -1;
    for (const int64_t i : index_)
        if (along[i] > 0.0 && x[i] / along[i] < step) step = x[i] / along[i], leaving = i;
    if (leaving < 0) return false;
    for (const int64_t i : index_) x[i] = std::max(x[i] - step * along[i], 0.0);
    x[leaving] = 0.0;
    x[entering] = step;
    free_[leaving] = 0;
    free_[entering] = 1;
    return true;
}

void NonNegative::by_active_set(const double* f, double* x) {
    std::fill(free_.begin(), free_.end(), 0);
    std::fill(x, x + size_, 0.0);
    index_.clear();
    std::vector<char> dependent(size_, 0);
    std::vector<double> wanted(size_);
    // Each turn of the outer loop lowers the objective; the bound is for rounding's sake alone.
    for (int64_t turn = 0; turn < 20 * size_; ++turn) {
        int64_t entering = -1;
        double most = 0.0;
        for (int64_t j = 0; j < size_; ++j) {
            if (free_[j] || dependent[j]) continue;
            const double value = surplus(f, x, j);
            if (value > most) most = value, entering = j;
        }
        if (entering < 0) return;
        free_[entering] = 1;
        if (!solve_free(f, wanted.data())) {
            if (exchange(entering, f, x)) {
                std::fill(dependent.begin(), dependent.end(), 0);
                solve_free(f, wanted.data());
            } else {
                free_[entering] = 0;
                dependent[entering] = 1;
                solve_free(f, wanted.data());  // index_ as it was
                continue;
            }
        } else if (wanted[entering] <= 0.0) {  // only rounding said that it should enter
            free_[entering] = 0;
            dependent[entering] = 1;
            solve_free(f, wanted.data());
            continue;
        }
        for (;;) {
            double step = 1.0;
            for (const int64_t i : index_)
                if (wanted[i] <= 0.0) step = std::min(step, x[i] / (x[i] - wanted[i]));
            if (step == 1.0) break;
            for (const int64_t i : index_) {
                const bool blocks = wanted[i] <= 0.0 && x[i] / (x[i] - wanted[i]) <= step;
                x[i] += step * (wanted[i] - x[i]);
                if (blocks || x[i] <= 0.0) x[i] = 0.0, free_[i] = 0;
            }
            std::fill(dependent.begin(), dependent.end(), 0);
            solve_free(f, wanted.data());
        }
        std::copy(wanted.begin(), wanted.end(), x);
    }
}

bool least_norm_point(const Machine& machine, const double* unit, const double* norm, int64_t k, double* w) {
    // minimise ½τ²·|Gᵀw|² + σ/2·(τ - 1)² over w on the simplex and τ > 0: for any σ the same w. With y = τ·w·norm
    // that is ½yᵀ(C + ηηᵀ)y - √σ·ηᵀy, η = √σ/norm; σ is the smallest squared norm, so that no η passes 1.
    const double least = *std::min_element(norm, norm + k);
    std::vector<double> eta(k), a(k * k);
    for (int64_t i = 0; i < k; ++i) eta[i] = least / norm[i];
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) a[i * k + j] = unit[i * k + j] + eta[i] * eta[j];
    NonNegative program(machine, a.data(), k);
    program.solve(eta.data(), w);
    double square = 0.0, terms = 0.0, total = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        square += w[i] * machine.dot(unit + i * k, w, k);
        terms += w[i] * w[i];
    }
    for (int64_t i = 0; i < k; ++i) total += w[i] /= norm[i];
    for (int64_t i = 0; i < k; ++i) w[i] /= total;
    return square > kNothing * terms;
}

}  // namespace fastconfig
