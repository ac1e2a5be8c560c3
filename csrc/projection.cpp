// Methods that are a quadratic program: the nearest point of a hull, a cone or a polyhedron.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "gramian_rule.hpp"
#include "nonnegative.hpp"

namespace fastconfig {
namespace {

// The length of the combination Σ y_i u_i of the unit rows.
double length_of(const Problem& problem, const std::vector<double>& y) {
    double square = 0.0;
    for (int64_t i = 0; i < problem.k; ++i)
        square += y[i] * problem.machine.dot(&problem.unit[i * problem.k], y.data(), problem.k);
    return std::sqrt(std::max(square, 0.0));
}

// v(t) ≥ 0 of the point d = g₀ + Gᵀv nearest to g₀ at which every row's product with d is at least t: it minimises
// ½vᵀKv + (b - t·1)ᵀv with b = G g₀ (Lagrange dual). Held in unit form y = v·norm. Norms may be in any unit: b, t and
// the distance are in it, too.
class Raised {
 public:
    Raised(const Problem& problem, const std::vector<double>& norm, const std::vector<double>& b)
        : problem_(problem),
          program_(problem.machine, problem.unit.data(), problem.k),
          f_(problem.k),
          eta_(b.size()),
          unit_b_(b),
          y_(problem.k) {
        for (int64_t i = 0; i < problem.k; ++i) {
            eta_[i] = 1.0 / norm[i];
            unit_b_[i] = b[i] / norm[i];
        }
    }

    // Solves for t and returns |Gᵀv|.
    double distance(double t) {
        for (int64_t i = 0; i < problem_.k; ++i) f_[i] = t * eta_[i] - unit_b_[i];
        program_.solve(f_.data(), y_.data());
        return length_of(problem_, y_);
    }

    // The t at which the distance is `wanted`, were the same rows bound as in the last solution: there y = t·u - r with
    // C u = η, C r = b over these rows, and the squared distance is a parabola in t. NaN where it does not reach so
    // far.
    double extrapolate(double wanted) const {
        std::vector<int64_t> index;
        for (int64_t i = 0; i < problem_.k; ++i)
            if (program_.free()[i]) index.push_back(i);
        const int64_t count = static_cast<int64_t>(index.size());
        Factor block(count);
        std::vector<double> u(count), r(count);
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t j = 0; j < count; ++j) block.row(i)[j] = problem_.unit[index[i] * problem_.k + index[j]];
            u[i] = eta_[index[i]];
            r[i] = unit_b_[index[i]];
        }
        if (count == 0 || !block.factor(problem_.machine, 0.0)) return std::numeric_limits<double>::quiet_NaN();
        block.solve(problem_.machine, u.data());
        block.solve(problem_.machine, r.data());
        double uu = 0.0, ur = 0.0, rr = 0.0;
        for (int64_t i = 0; i < count; ++i) {
            uu += u[i] * eta_[index[i]];
            ur += u[i] * unit_b_[index[i]];
            rr += r[i] * unit_b_[index[i]];
        }
        return (ur + std::sqrt(ur * ur - uu * (rr - wanted * wanted))) / uu;
    }

    // (k,) v itself.
    double coefficient(int64_t i) const { return y_[i] * eta_[i]; }

 private:
    const Problem& problem_;
    NonNegative program_;
    std::vector<double> f_, eta_, unit_b_, y_;
};

// w ← its Euclidean projection on the simplex: w - τ, cut at 0, with the τ that makes the sum 1. First the largest
// entry is brought to 0, which changes nothing but that 1 is not lost beside it.
void project_on_simplex(std::vector<double>& w) {
    const double largest = *std::max_element(w.begin(), w.end());
    for (double& value : w) value -= largest;
    std::vector<double> sorted(w);
    std::sort(sorted.begin(), sorted.end(), std::greater<double>());
    double sum = 0.0, shift = 0.0;
    for (size_t i = 0; i < sorted.size(); ++i) {
        sum += sorted[i];
        const double candidate = (sum - 1.0) / static_cast<double>(i + 1);
        if (sorted[i] > candidate) shift = candidate;
    }
    for (double& value : w) value = std::max(value - shift, 0.0);
}

}  // namespace

void mgda(const Problem& problem, const std::vector<double>&, double*, double* c) {
    if (!least_norm_point(problem.machine, problem.unit.data(), problem.norm.data(), problem.k, c))
        std::fill(c, c + problem.k, 0.0);
}

// parameters: the ball's radius relative to |g₀|, and how the result is scaled down: 0 not, 1 by 1 + c², 2 by 1 + c.
void cagrad(const Problem& problem, const std::vector<double>& parameters, double*, double* c) {
    const int64_t k = problem.k;
    const double relative = parameters[0];
    const std::vector<double> shares = problem.shares();
    const double scale = parameters[1] == 0.0   ? 1.0
                         : parameters[1] == 1.0 ? 1.0 / (1.0 + relative * relative)
                                                : 1.0 / (1.0 + relative);
    for (int64_t i = 0; i < k; ++i) c[i] = scale * shares[i];

    // In units of the largest norm: else products of two, times the radius, may leave float64's range.
    const double longest = *std::max_element(problem.norm.begin(), problem.norm.end());
    std::vector<double> norm(problem.norm), mean(shares), b(k), w(k);
    for (int64_t i = 0; i < k; ++i) mean[i] *= norm[i] /= longest;
    problem.machine.multiply(problem.unit.data(), mean.data(), b.data(), k);
    for (int64_t i = 0; i < k; ++i) b[i] *= norm[i];
    const double radius = relative * length_of(problem, mean);
    if (radius == 0.0) return;

    // The level t that all rows' products reach: at least what g₀ reaches, at most what the hull's least point allows.
    const bool apart = least_norm_point(problem.machine, problem.unit.data(), norm.data(), k, w.data());
    double low = *std::min_element(b.begin(), b.end()), high = problem.machine.dot(b.data(), w.data(), k);
    for (int64_t i = 0; i < k; ++i) w[i] *= norm[i];
    // No direction goes along with all rows where their hull holds the origin.
    high = std::max(apart ? high + radius * length_of(problem, w) : 0.0, low);

    Raised raised(problem, norm, b);
    double t = high, distance = raised.distance(t);
    // Finite: the guess from the right set of rows is exact. The bound is for what rounding leaves undecided, and for
    // halving the way to a t that is many orders under the largest.
    for (int turn = 0; turn < 400 && std::fabs(distance - radius) > 1e-13 * radius; ++turn) {
        if (distance < radius && t == high) break;  // the hull holds the origin: the ball is larger than needed
        (distance > radius ? high : low) = t;
        const double guess = raised.extrapolate(radius);
        const double next = guess > low && guess < high ? guess : 0.5 * (low + high);
        if (next == t) break;
        distance = raised.distance(t = next);
    }
    for (int64_t i = 0; i < k; ++i) c[i] += scale * raised.coefficient(i);
}

void dualproj(const Problem& problem, const std::vector<double>&, double*, double* c) {
    const std::vector<double> shares = problem.shares();
    Raised raised(problem, problem.norm, problem.products(shares));
    raised.distance(0.0);
    for (int64_t i = 0; i < problem.k; ++i) c[i] = shares[i] + raised.coefficient(i);
}

void upgrad(const Problem& problem, const std::vector<double>&, double*, double* c) {
    const int64_t k = problem.k;
    const std::vector<double> shares = problem.shares();
    std::vector<double> y(k * k);
    problem.machine.share(k, k * k * k, [&](int64_t first, int64_t last) {
        NonNegative program(problem.machine, problem.unit.data(), k);
        std::vector<double> f(k);
        for (int64_t i = first; i < last; ++i) {
            if (shares[i] == 0.0) continue;
            for (int64_t j = 0; j < k; ++j) f[j] = -problem.unit[i * k + j];
            program.forget();
            program.solve(f.data(), &y[i * k]);
        }
    });
    for (int64_t i = 0; i < k; ++i) {
        c[i] += shares[i];
        for (int64_t j = 0; j < k; ++j) c[j] += shares[i] * problem.norm[i] * y[i * k + j] / problem.norm[j];
    }
}

// parameters: λ, learning rate, momentum, steps. operand: (m,) w, updated.
void sdmgrad(const Problem& problem, const std::vector<double>& parameters, double* operand, double* c) {
    const int64_t k = problem.k;
    const double lambda = parameters[0], rate = parameters[1], momentum = parameters[2];
    const std::vector<double> shares = problem.shares();
    double mean = 0.0;
    for (const double norm : problem.norm) mean += norm / static_cast<double>(k);
    std::vector<double> w(k), velocity(k, 0.0), target(k);
    for (int64_t i = 0; i < k; ++i) w[i] = operand[problem.index[i]];
    project_on_simplex(w);
    for (int64_t step = 0; step < static_cast<int64_t>(parameters[3]); ++step) {
        for (int64_t i = 0; i < k; ++i) target[i] = w[i] + lambda * shares[i];
        const std::vector<double> slope = problem.products(target);
        for (int64_t i = 0; i < k; ++i) {
            velocity[i] = momentum * velocity[i] + slope[i] / mean / mean;
            w[i] -= rate * velocity[i];
        }
        project_on_simplex(w);
    }
    std::fill(operand, operand + problem.m, 0.0);
    for (int64_t i = 0; i < k; ++i) {
        operand[problem.index[i]] = w[i];
        c[i] = (w[i] + lambda * shares[i]) / (1.0 + lambda);
    }
}

}  // namespace fastconfig
