#include "gramian_rule.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "config_rule.hpp"
#include "spectrum.hpp"

namespace fastconfig {
namespace {

Problem problem_of(const Machine& machine, const double* gramian, int64_t m, const std::vector<double>& preferences,
                   bool only_preferred) {
    Problem problem{machine, m, 0, {}, {}, {}, {}, {}, 0.0};
    for (int64_t i = 0; i < m; ++i) {
        const double square = gramian[i * m + i];
        if (std::isfinite(square)) problem.total += preferences.empty() ? 1.0 : preferences[i];
        if (!(std::isfinite(square) && square > 0.0)) continue;
        if (only_preferred && !preferences.empty() && preferences[i] == 0.0) continue;
        problem.index.push_back(i);
        problem.norm.push_back(std::sqrt(square));
        if (!preferences.empty()) problem.preference.push_back(preferences[i]);
    }
    const int64_t k = problem.k = static_cast<int64_t>(problem.index.size());
    problem.gramian.resize(k * k);
    problem.unit.resize(k * k);
    for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < k; ++j) {
            const double product = gramian[problem.index[i] * m + problem.index[j]];
            problem.gramian[i * k + j] = product;
            problem.unit[i * k + j] = i == j ? 1.0 : product * (1.0 / problem.norm[j]) * (1.0 / problem.norm[i]);
        }
    return problem;
}

}  // namespace

std::vector<double> Problem::preferences() const {
    return preference.empty() ? std::vector<double>(k, 1.0) : preference;
}

std::vector<double> Problem::shares() const {
    std::vector<double> result = preferences();
    for (double& share : result) share = total > 0.0 ? share / total : 0.0;
    return result;
}

std::vector<double> Problem::products(const std::vector<double>& weights) const {
    std::vector<double> result(k);
    machine.multiply(gramian.data(), weights.data(), result.data(), k);
    return result;
}

int64_t GramianRule::weights(const Machine& machine, const double* gramian, int64_t m, double* operand,
                             double* weights) const {
    if (const int64_t bad = first_nonfinite(gramian, m); bad != kFinite && nonfinite != NonFinite::drop) {
        if (nonfinite == NonFinite::raise) return bad;
        std::fill(weights, weights + m, std::numeric_limits<double>::quiet_NaN());
        return kFinite;
    }
    const Problem problem = problem_of(machine, gramian, m, preferences, method->only_preferred);
    std::vector<double> c(problem.k, 0.0);
    if (problem.k > 0) method->solve(problem, parameters, operand, c.data());
    std::fill(weights, weights + m, 0.0);
    for (int64_t i = 0; i < problem.k; ++i) weights[problem.index[i]] = c[i];
    return kFinite;
}

const NamedMethod* method_named(const char* name) {
    static const NamedMethod methods[] = {
        {"constant", constant, false}, {"inverse_norm", inverse_norm, true},
        {"imtlg", imtlg, false},       {"aligned", aligned, false},
        {"pcgrad", pcgrad, false},     {"priority", priority, false},
        {"gradvac", gradvac, false},   {"mgda", mgda, false},
        {"cagrad", cagrad, true},      {"dualproj", dualproj, false},
        {"upgrad", upgrad, false},     {"sdmgrad", sdmgrad, false},
        {"nash", nash, true},          {"fairgrad", fairgrad, true},
    };
    for (const NamedMethod& method : methods)
        if (std::strcmp(method.name, name) == 0) return &method;
    return nullptr;
}

// parameters: whether to divide by the number of rows. operand: (m,) the weights, or null for the preferences.
void constant(const Problem& problem, const std::vector<double>& parameters, double* operand, double* c) {
    const double divisor = parameters[0] != 0.0 ? problem.total : 1.0;
    const std::vector<double> preferences = problem.preferences();
    for (int64_t i = 0; i < problem.k; ++i) c[i] = (operand ? operand[problem.index[i]] : preferences[i]) / divisor;
}

// parameters: the power.
void inverse_norm(const Problem& problem, const std::vector<double>& parameters, double*, double* c) {
    const std::vector<double> preferences = problem.preferences();
    // Relative to the norm whose factor is largest, so that no power overflows.
    const auto [least, most] = std::minmax_element(problem.norm.begin(), problem.norm.end());
    const double reference = parameters[0] >= 0.0 ? *least : *most;
    double given = 0.0, found = 0.0;
    for (int64_t i = 0; i < problem.k; ++i) {
        c[i] = preferences[i] * std::pow(reference / problem.norm[i], parameters[0]);
        given += preferences[i];
        found += c[i];
    }
    for (int64_t i = 0; i < problem.k; ++i) c[i] *= given / found;
}

void imtlg(const Problem& problem, const std::vector<double>&, double*, double* c) {
    const ConfigRule config({}, Length::minimum, 0, kNothing, NonFinite::propagate);
    config.weights(problem.machine, problem.gramian.data(), problem.k, nullptr, c);
    double total = 0.0;
    for (int64_t i = 0; i < problem.k; ++i) total += c[i];
    for (int64_t i = 0; i < problem.k; ++i) c[i] = total == 0.0 ? 0.0 : c[i] / total;
}

// parameters: the scale, 0 for the smallest singular value, 1 for the median, 2 for the root mean square.
void aligned(const Problem& problem, const std::vector<double>& parameters, double*, double* c) {
    const int64_t k = problem.k;
    const double unit = *std::max_element(problem.norm.begin(), problem.norm.end());
    std::vector<double> scaled(problem.gramian);
    for (double& product : scaled) product = product / unit / unit;
    const Spectrum spectrum(problem.machine, scaled.data(), k);
    const std::vector<double>& values = spectrum.values();
    const double cut = kNothing * *std::max_element(values.begin(), values.end());
    std::vector<double> kept;
    for (const double value : values)
        if (value > cut) kept.push_back(value);
    std::sort(kept.begin(), kept.end());
    double scale = kept[0];
    if (parameters[0] == 1.0) scale = kept[(kept.size() - 1) / 2];
    if (parameters[0] == 2.0) {
        scale = 0.0;
        for (const double value : kept) scale += value;
        scale /= static_cast<double>(kept.size());
    }
    const std::vector<double> shares = problem.shares();
    std::copy(shares.begin(), shares.end(), c);
    spectrum.to_eigenvectors(c);
    for (int64_t e = 0; e < k; ++e) c[e] *= values[e] > cut ? std::sqrt(scale / values[e]) : 0.0;
    spectrum.from_eigenvectors(c);
}

}  // namespace fastconfig
