// Methods that ask each loss for its share of the common decrease: K a = p·a^(-β), a > 0, by a damped Newton method.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "gramian_rule.hpp"
#include "nonnegative.hpp"

namespace fastconfig {
namespace {

constexpr int kMostSteps = 200, kMostHalvings = 50;
constexpr int kIdle = 3;          // turns without progress after which rounding, not the method, sets the error
constexpr double kSmall = 1e-10;  // an error that such a standstill may leave

// C x = q·x^(-β) for x > 0: where ½xᵀCx - Σ q ∫x^(-β), which is convex, is least.
class Bargain {
 public:
    Bargain(const Machine& machine, const double* unit, std::vector<double> q, double beta)
        : machine_(machine), unit_(unit), q_(std::move(q)), beta_(beta), size_(static_cast<int64_t>(q_.size())) {}

    // Receives x; false where there is none, as the hull of the rows holds the origin.
    bool solve(std::vector<double>& x) const {
        x.resize(size_);
        for (int64_t i = 0; i < size_; ++i) x[i] = std::pow(q_[i], 1.0 / (1.0 + beta_));  // the answer for C = 1
        std::vector<double> along(size_), wanted(size_), step(size_), best;
        Factor hessian(size_);
        evaluate(x, along, wanted);
        double least = std::numeric_limits<double>::infinity();
        for (int turn = 0, idle = 0; turn < kMostSteps; ++turn) {
            const double error = residual(x, along, wanted);
            idle = error < 0.5 * least ? 0 : idle + 1;
            if (error < least) least = error, best = x;
            if (error <= 4.0 * static_cast<double>(size_) * kEpsilon || (idle >= kIdle && least < kSmall)) break;
            for (int64_t i = 0; i < size_; ++i) step[i] = wanted[i] - along[i];
            const std::vector<double> downhill(step);
            for (int64_t i = 0; i < size_; ++i) {
                std::copy(unit_ + i * size_, unit_ + (i + 1) * size_, hessian.row(i));
                hessian.row(i)[i] += beta_ * wanted[i] / x[i];
            }
            if (!hessian.factor(machine_, 0.0)) return false;
            hessian.solve(machine_, step.data());
            advance(x, step, machine_.dot(downhill.data(), step.data(), size_), along, wanted);
        }
        x = best;
        evaluate(x, along, wanted);
        return (least < kSmall && meets(x, along)) || are_apart();
    }

 private:
    // The equation's largest error, relative to the terms of each side.
    double residual(const std::vector<double>& x, const std::vector<double>& along,
                    const std::vector<double>& wanted) const {
        double largest = 0.0;
        for (int64_t i = 0; i < size_; ++i)
            largest = std::max(largest, std::fabs(along[i] - wanted[i]) / (terms(x, i) + wanted[i]));
        return largest;
    }

    void evaluate(const std::vector<double>& x, std::vector<double>& along, std::vector<double>& wanted) const {
        machine_.multiply(unit_, x.data(), along.data(), size_);
        for (int64_t i = 0; i < size_; ++i) wanted[i] = beta_ == 1.0 ? q_[i] / x[i] : q_[i] * std::pow(x[i], -beta_);
    }

    // Moves x along the step, halved until x stays positive and the objective's slope does not turn uphill by more than
    // half of what it was downhill.
    void advance(std::vector<double>& x, const std::vector<double>& step, double slope, std::vector<double>& along,
                 std::vector<double>& wanted) const {
        const std::vector<double> from(x);
        double length = 1.0;
        for (int64_t i = 0; i < size_; ++i)
            if (step[i] < 0.0) length = std::min(length, -0.95 * from[i] / step[i]);
        for (int halvings = 0;; ++halvings, length *= 0.5) {
            double uphill = 0.0;
            for (int64_t i = 0; i < size_; ++i) x[i] = from[i] + length * step[i];
            evaluate(x, along, wanted);
            for (int64_t i = 0; i < size_; ++i) uphill += step[i] * (along[i] - wanted[i]);
            if (uphill <= 0.5 * slope || halvings == kMostHalvings) return;
        }
    }

    // Whether the combination goes along with every row by more than rounding of its terms.
    bool meets(const std::vector<double>& x, const std::vector<double>& along) const {
        for (int64_t i = 0; i < size_; ++i)
            if (!(along[i] > kNothing * terms(x, i))) return false;
        return true;
    }

    // Whether the rows leave a common direction. Where they do, products may still be lost to rounding, as with norms
    // that differ too much for float64.
    bool are_apart() const {
        std::vector<double> w(size_);
        return least_norm_point(machine_, unit_, std::vector<double>(size_, 1.0).data(), size_, w.data());
    }

    // Σ |C_ij| x_j
    double terms(const std::vector<double>& x, int64_t i) const {
        double total;
        machine_.dense.dot_and_size(unit_ + i * size_, x.data(), size_, &total);
        return total;
    }

    const Machine& machine_;
    const double* unit_;
    const std::vector<double> q_;
    const double beta_;
    const int64_t size_;
};

}  // namespace

// parameters: the largest norm of the combination, 0 for none.
void nash(const Problem& problem, const std::vector<double>& parameters, double*, double* c) {
    const std::vector<double> preferences = problem.preferences();
    std::vector<double> x;
    if (!Bargain(problem.machine, problem.unit.data(), preferences, 1.0).solve(x)) return;
    double square = 0.0;  // of the combination: xᵀCx = Σ p at the solution
    for (const double preference : preferences) square += preference;
    const double most = parameters[0];
    const double clip = most > 0.0 && square > most * most ? most / std::sqrt(square) : 1.0;
    for (int64_t i = 0; i < problem.k; ++i) c[i] = clip * x[i] / problem.norm[i];
}

// parameters: alpha = 1/β.
void fairgrad(const Problem& problem, const std::vector<double>& parameters, double*, double* c) {
    const double beta = 1.0 / parameters[0];
    // With x = a·norm: C x = p·norm^(β-1)·x^(-β), where a common factor of the right hand side scales x alone.
    std::vector<double> logarithm = problem.preferences(), q(problem.k), x;
    for (int64_t i = 0; i < problem.k; ++i)
        logarithm[i] = std::log(logarithm[i]) + (beta - 1.0) * std::log(problem.norm[i]);
    const double most = *std::max_element(logarithm.begin(), logarithm.end());
    for (int64_t i = 0; i < problem.k; ++i) q[i] = std::exp(logarithm[i] - most);
    if (!Bargain(problem.machine, problem.unit.data(), q, beta).solve(x)) return;
    const double scale = std::exp(most / (1.0 + beta));
    for (int64_t i = 0; i < problem.k; ++i) c[i] = scale * x[i] / problem.norm[i];
}

}  // namespace fastconfig
