// The Python module fastconfig._core: addresses in, results in place. Checks nothing that fastconfig.validation has.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "config_rule.hpp"
#include "engine.hpp"
#include "gramian_rule.hpp"
#include "memory.hpp"
#include "momentum.hpp"
#include "sweep.hpp"

namespace py = pybind11;

namespace fastconfig {
namespace {

constexpr int kMostTiers = 3;

std::vector<const Tier*> tiers() {
    const Tier* found[kMostTiers];
    return std::vector<const Tier*>(found, found + available_tiers(found, kMostTiers));
}

const Tier* active_tier = tiers().back();

void use_tier(const std::string& name) {
    for (const Tier* tier : tiers())
        if (name == tier->name) {
            active_tier = tier;
            return;
        }
    std::string names;
    for (const Tier* tier : tiers()) names += std::string(names.empty() ? "" : ", ") + tier->name;
    throw std::invalid_argument("ISA tier (FASTCONFIG_ISA) must be one this machine runs, " + names + ", got '" + name +
                                "'");
}

double* doubles(std::uintptr_t address) { return reinterpret_cast<double*>(address); }

// A tensor whose storage was emptied lies at 0, whatever its shape says.
std::invalid_argument without_memory(const std::string& name) {
    return std::invalid_argument(name +
                                 " has no memory: its storage was emptied, as untyped_storage().resize_(0) does and a "
                                 "sharded model with what it gathered; use it while it is there");
}

// Where the rows are, given as (first address, bytes between rows, m) or as a list of m addresses.
std::vector<const void*> addresses(const py::handle& rows, int64_t n) {
    std::vector<const void*> result;
    if (PyTuple_Check(rows.ptr())) {
        const auto [first, step, m] = py::cast<std::tuple<std::uintptr_t, std::intptr_t, int64_t>>(rows);
        if (first == 0 && n > 0) throw without_memory("grads");
        result.reserve(m);
        for (int64_t i = 0; i < m; ++i) result.push_back(reinterpret_cast<const void*>(first + i * step));
    } else {
        for (const py::handle item : py::cast<py::list>(rows)) {
            const std::uintptr_t address = py::cast<std::uintptr_t>(item);
            if (address == 0 && n > 0) throw without_memory("grads[" + std::to_string(result.size()) + "]");
            result.push_back(reinterpret_cast<const void*>(address));
        }
    }
    return result;
}

void gramian(const py::handle& where, int64_t n, DType dtype, std::uintptr_t out, int threads) {
    const std::vector<const void*> row = addresses(where, n);
    const Engine engine{active_tier, threads};
    py::gil_scoped_release release;
    engine.gramian({row.data(), static_cast<int64_t>(row.size()), n, dtype}, doubles(out));
}

void apply(const py::handle& where, int64_t n, DType dtype, std::uintptr_t weights, std::uintptr_t out, int threads) {
    const std::vector<const void*> row = addresses(where, n);
    if (out == 0 && n > 0) throw without_memory("out");
    const Engine engine{active_tier, threads};
    py::gil_scoped_release release;
    engine.apply({row.data(), static_cast<int64_t>(row.size()), n, dtype}, doubles(weights),
                 reinterpret_cast<void*>(out));
}

// leak may be 0: nothing leaks. `seed` is where the 64-bit seed stands.
void graddrop(const py::handle& where, int64_t n, DType dtype, std::uintptr_t leak, std::uintptr_t seed, int64_t column,
              std::uintptr_t out, int threads) {
    const std::vector<const void*> row = addresses(where, n);
    if (out == 0 && n > 0) throw without_memory("out");
    const Engine engine{active_tier, threads};
    py::gil_scoped_release release;
    engine.graddrop({row.data(), static_cast<int64_t>(row.size()), n, dtype}, doubles(leak),
                    {*reinterpret_cast<const std::uint64_t*>(seed), column}, reinterpret_cast<void*>(out));
}

// operand may be 0, where the rule takes none; gramian and weights too: then they are kept nowhere.
int64_t combine(const py::handle& where, int64_t n, DType dtype, const Rule& rule, std::uintptr_t operand,
                std::uintptr_t out, std::uintptr_t gramian, std::uintptr_t weights, int threads) {
    const std::vector<const void*> row = addresses(where, n);
    if (out == 0 && n > 0) throw without_memory("out");
    const Engine engine{active_tier, threads};
    const int64_t m = static_cast<int64_t>(row.size());
    py::gil_scoped_release release;
    std::vector<double> own((gramian ? 0 : m * m) + (weights ? 0 : m));
    double* k = gramian ? doubles(gramian) : own.data();
    double* c = weights ? doubles(weights) : own.data() + own.size() - m;
    return engine.combine({row.data(), m, n, dtype}, rule, doubles(operand), reinterpret_cast<void*>(out), k, c);
}

typedef std::vector<std::tuple<int64_t, int64_t, const Rule*, std::uintptr_t>> Parts;  // first, last, rule, operand

// As combine, for parts of the columns; gramian (parts, m, m) and weights (parts, m).
int64_t combine_parts(const py::handle& where, int64_t n, DType dtype, const Parts& parts, std::uintptr_t out,
                      std::uintptr_t gramian, std::uintptr_t weights, int threads) {
    const std::vector<const void*> row = addresses(where, n);
    if (out == 0 && n > 0) throw without_memory("out");
    std::vector<Part> native;
    for (const auto& [first, last, rule, operand] : parts)
        native.push_back({{first, last - first}, rule, doubles(operand)});
    const Engine engine{active_tier, threads};
    py::gil_scoped_release release;
    return engine.combine_parts({row.data(), static_cast<int64_t>(row.size()), n, dtype}, native,
                                reinterpret_cast<void*>(out), doubles(gramian), doubles(weights));
}

int64_t rule_weights(std::uintptr_t gramian, int64_t m, const Rule& rule, std::uintptr_t operand,
                     std::uintptr_t weights, int threads) {
    py::gil_scoped_release release;
    return rule.weights({active_tier->dense, threads}, doubles(gramian), m, doubles(operand), doubles(weights));
}

GramianRule gramian_rule(const std::string& name, std::vector<double> parameters, std::vector<double> preferences,
                         NonFinite nonfinite) {
    const NamedMethod* method = method_named(name.c_str());
    if (!method) throw std::invalid_argument("the core has no method '" + name + "'");
    return {method, std::move(parameters), std::move(preferences), nonfinite};
}

std::vector<void*> row_addresses(std::uintptr_t first, std::intptr_t step, int64_t m) {
    std::vector<void*> result;
    for (int64_t i = 0; i < m; ++i) result.push_back(reinterpret_cast<void*>(first + i * step));
    return result;
}

typedef std::vector<std::tuple<std::uintptr_t, int64_t, int64_t, int>> Pieces;  // address, first column, count, group

MomentumSegment momentum_segment(std::uintptr_t first, std::intptr_t step, int64_t m, std::uintptr_t second, int64_t n,
                                 DType state, const Pieces& pieces) {
    std::vector<MomentumPiece> native;
    for (const auto& [address, column, count, group] : pieces)
        native.push_back({reinterpret_cast<void*>(address), column, count, group});
    return MomentumSegment(row_addresses(first, step, m), reinterpret_cast<void*>(second), n, state, std::move(native));
}

Recorded recorded(std::vector<int64_t> losses, const std::vector<std::uintptr_t>& gradients, DType dtype) {
    Recorded result{std::move(losses), {}, dtype};
    for (const std::uintptr_t address : gradients) result.gradient.push_back(reinterpret_cast<const void*>(address));
    return result;
}

typedef std::vector<std::tuple<double, double, double, bool>> Groups;  // decay, rate, ε, assign

StepRule step_rule(double beta1, double beta2, const Groups& groups) {
    StepRule rule{beta1, beta2, {}};
    for (const auto& [decay, rate, eps, assign] : groups) rule.group.push_back({decay, rate, eps, assign});
    return rule;
}

std::vector<std::string> tier_names() {
    std::vector<std::string> names;
    for (const Tier* tier : tiers()) names.emplace_back(tier->name);
    return names;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.doc() = "The compiled core of fastconfig. Private: fastconfig.backends.cpu is its only user.";
    py::enum_<DType>(module, "DType")
        .value("float32", DType::float32)
        .value("float64", DType::float64)
        .value("bfloat16", DType::bfloat16)
        .value("float16", DType::float16);
    py::enum_<Length>(module, "Length")
        .value("projection", Length::projection)
        .value("minimum", Length::minimum)
        .value("maximum", Length::maximum)
        .value("harmonic", Length::harmonic)
        .value("arithmetic", Length::arithmetic)
        .value("geometric", Length::geometric)
        .value("tracked", Length::tracked);
    py::enum_<NonFinite>(module, "NonFinite")
        .value("propagate", NonFinite::propagate)
        .value("drop", NonFinite::drop)
        .value("raise", NonFinite::raise);
    py::class_<Rule>(module, "Rule");
    py::class_<ConfigRule, Rule>(module, "ConfigRule")
        .def(py::init<std::vector<double>, Length, int64_t, double, NonFinite>());
    py::class_<GramianRule, Rule>(module, "GramianRule").def(py::init(&gramian_rule));
    py::class_<Recorded>(module, "Recorded").def(py::init(&recorded));
    py::class_<StepRule>(module, "StepRule").def(py::init(&step_rule));
    py::class_<MomentumSegment>(module, "MomentumSegment")
        .def(py::init(&momentum_segment))
        .def("products",
             [](const MomentumSegment& segment, const Recorded& recorded, std::uintptr_t scales, double beta1,
                std::uintptr_t out, int threads) {
                 py::gil_scoped_release release;
                 segment.products(*active_tier, threads, recorded, doubles(scales), beta1, doubles(out));
             })
        .def("update",
             [](const MomentumSegment& segment, const Recorded& recorded, const StepRule& rule, std::uintptr_t decision,
                int threads) {
                 py::gil_scoped_release release;
                 segment.update(*active_tier, threads, recorded, rule, doubles(decision));
             })
        .def("update_square",
             [](const MomentumSegment& segment, const Recorded& recorded, const StepRule& rule, std::uintptr_t decision,
                int threads) {
                 py::gil_scoped_release release;
                 return segment.update_square(*active_tier, threads, recorded, rule, doubles(decision));
             })
        .def("step",
             [](const MomentumSegment& segment, const Recorded& recorded, const StepRule& rule, const Rule& method,
                std::uintptr_t operand, std::uintptr_t scales, bool found_inf, std::uintptr_t gramian,
                std::uintptr_t weights, std::uintptr_t counts, std::uintptr_t totals, int threads) {
                 py::gil_scoped_release release;
                 return segment.step(*active_tier, threads, recorded, rule, method, doubles(operand), doubles(scales),
                                     found_inf, {doubles(gramian), doubles(weights), doubles(counts), doubles(totals)});
             });
    add_sweeps(module);
    module.def("advise_huge_pages", [](std::uintptr_t address, std::size_t bytes) {
        return advise_huge_pages(reinterpret_cast<void*>(address), bytes);
    });
    module.attr("FINITE") = Rule::kFinite;
    module.def("gramian", &gramian);
    module.def("apply", &apply);
    module.def("combine", &combine);
    module.def("combine_parts", &combine_parts);
    module.def("rule_weights", &rule_weights);
    module.def("graddrop", &graddrop);
    module.def("tiers", &tier_names, "ISA tiers this machine can run, weakest first.");
    module.def("active_tier", [] { return active_tier->name; });
    module.def("use_tier", &use_tier);
}

}  // namespace fastconfig
