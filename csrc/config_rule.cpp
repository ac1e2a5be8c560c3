#include "config_rule.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "machine.hpp"
#include "spectrum.hpp"

namespace fastconfig {
namespace {

// The active rows: unit Gramian C (k, k), their norms and direction weights.
struct Active {
    std::vector<int64_t> index;
    std::vector<double> norm, direction, unit;
    int64_t size() const { return static_cast<int64_t>(index.size()); }
};

Active active_rows(const double* gramian, int64_t m, const std::vector<double>& direction) {
    Active active;
    for (int64_t i = 0; i < m; ++i) {
        const double square = gramian[i * m + i];
        if (!(std::isfinite(square) && square > 0.0)) continue;
        active.index.push_back(i);
        active.norm.push_back(std::sqrt(square));
        active.direction.push_back(direction.empty() ? 1.0 : direction[i]);
    }
    const int64_t k = active.size();
    active.unit.resize(k * k);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j)
            active.unit[i * k + j] = i == j ? 1.0
                                            : gramian[active.index[i] * m + active.index[j]] * (1.0 / active.norm[j]) *
                                                  (1.0 / active.norm[i]);
    return active;
}

// Solves C a = w by Cholesky where C is certified to have no eigenvalue that the contract would truncate.
//
// Why this equals the contract's truncated pseudo-inverse. C has unit diagonal, so λ_max ≤ trace C = k. With C = LLᵀ,
// |L⁻¹|_F² = trace C⁻¹ ≥ 1/λ_min. Hence rtol·k·|L⁻¹|_F² < 1 implies λ_min > rtol·k ≥ rtol·λ_max: nothing is truncated
// and C⁺ = C⁻¹. The test errs on the safe side by a factor of k² at most; what it does not certify is left to the
// eigen-decomposition, which is the contract's own definition. Both factors are backward stable, so the bound holds for
// a matrix within about k·2⁻⁵³ of C: far under the default rtol of 1e-12. With an rtol of that order or 0, rounding
// decides on either path, and the floor under the pivots keeps a singular C from this one.
bool solve_regular(const Machine& machine, const Active& active, double rtol, std::vector<double>& solution) {
    const int64_t k = active.size();
    Factor u(k);
    for (int64_t i = 0; i < k; ++i) std::copy_n(&active.unit[i * k], k, u.row(i));
    // Every pivot is at least λ_min.
    if (!u.factor(machine, std::max(rtol * k, std::numeric_limits<double>::epsilon() * k))) return false;
    // Row i of L⁻¹ is minus (row i of L = Uᵀ before the diagonal) times the rows above, over the diagonal.
    std::vector<double> inverse(k * k, 0.0);
    double trace = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        double* row = &inverse[i * k];
        const double scale = u.row(i)[i];
        for (int64_t j = 0; j < i; ++j) machine.add(-scale * u.row(j)[i], &inverse[j * k], row, j + 1);
        row[i] = scale;
        trace += machine.dot(row, row, i + 1);
    }
    if (!(rtol * k * trace < 1.0)) return false;
    solution.assign(k, 0.0);
    for (int64_t i = 0; i < k; ++i) {
        const double forward = machine.dot(&inverse[i * k], active.direction.data(), i + 1);
        machine.add(forward, &inverse[i * k], solution.data(), i + 1);
    }
    return true;
}

// a = C⁺w from the eigen-decomposition, truncated as the contract says. Returns λ_max.
double solve_truncated(const Machine& machine, const Active& active, double rtol, std::vector<double>& solution) {
    const int64_t k = active.size();
    const Spectrum spectrum(machine, active.unit.data(), k);
    const std::vector<double>& values = spectrum.values();
    const double largest = *std::max_element(values.begin(), values.end());
    const double threshold = std::max(rtol * largest, 0.0);
    solution = active.direction;
    spectrum.to_eigenvectors(solution.data());
    // A NaN is no small eigenvalue: it must show in the answer.
    for (int64_t e = 0; e < k; ++e) solution[e] = values[e] <= threshold ? 0.0 : solution[e] / values[e];
    spectrum.from_eigenvectors(solution.data());
    return largest;
}

// The unit direction's coefficients on the unit rows, d/|d| with d = C⁺ŵ; zeros where |d|² counts as zero.
std::vector<double> unit_direction(const Machine& machine, const Active& active, double rtol) {
    const int64_t k = active.size();
    std::vector<double> solution;
    double largest = static_cast<double>(k);  // λ_max ≤ k; with full rank |d|²·λ_max ≥ |ŵ|², so the bound is harmless
    if (!solve_regular(machine, active, rtol, solution)) largest = solve_truncated(machine, active, rtol, solution);
    const double square = machine.dot(solution.data(), active.direction.data(), k);
    const double weight = machine.dot(active.direction.data(), active.direction.data(), k);
    if (square * largest <= rtol * weight) return std::vector<double>(k, 0.0);
    const double scale = 1.0 / std::sqrt(square);
    for (double& value : solution) value *= scale;
    return solution;
}

double tracked_norm(const ConfigRule& rule, const Active& active) {
    const std::vector<double>& norm = active.norm;
    const double k = static_cast<double>(norm.size());
    switch (rule.length) {
        case Length::minimum: return *std::min_element(norm.begin(), norm.end());
        case Length::maximum: return *std::max_element(norm.begin(), norm.end());
        case Length::arithmetic: {
            double total = 0.0;
            for (double value : norm) total += value;
            return total / k;
        }
        case Length::harmonic: {
            double total = 0.0;
            for (double value : norm) total += 1.0 / value;
            return k / total;
        }
        case Length::geometric: {  // by logarithms: the product of many norms may leave float64's range
            double total = 0.0;
            for (double value : norm) total += std::log(value);
            return std::exp(total / k);
        }
        default: {
            const auto found = std::find(active.index.begin(), active.index.end(), rule.tracked);
            return found == active.index.end() ? 0.0 : norm[found - active.index.begin()];
        }
    }
}

double length_of(const Machine& machine, const ConfigRule& rule, const Active& active,
                 const std::vector<double>& direction) {
    const int64_t k = active.size();
    double cosines = 0.0, projections = 0.0;
    for (int64_t i = 0; i < k; ++i) {
        const double cosine = machine.dot(&active.unit[i * k], direction.data(), k);
        cosines += cosine;
        projections += active.norm[i] * cosine;
    }
    return rule.length == Length::projection ? projections : tracked_norm(rule, active) * cosines;
}

}  // namespace

int64_t ConfigRule::weights(const Machine& machine, const double* gramian, int64_t m, double*, double* weights) const {
    if (const int64_t bad = first_nonfinite(gramian, m); bad != kFinite && nonfinite != NonFinite::drop) {
        if (nonfinite == NonFinite::raise) return bad;
        std::fill(weights, weights + m, std::numeric_limits<double>::quiet_NaN());
        return kFinite;
    }
    const Active active = active_rows(gramian, m, direction);
    const int64_t k = active.size();
    const std::vector<double> along = k > 0 ? unit_direction(machine, active, rtol) : std::vector<double>();
    const double length = k > 0 ? length_of(machine, *this, active, along) : 0.0;
    std::fill(weights, weights + m, 0.0);
    for (int64_t i = 0; i < k; ++i)  // an opposed pair's zero stays zero whatever the length
        weights[active.index[i]] = along[i] == 0.0 ? 0.0 : along[i] / active.norm[i] * length;
    return kFinite;
}

}  // namespace fastconfig
