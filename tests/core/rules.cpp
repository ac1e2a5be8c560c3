// Every rule from the Gramian to the weights: finite answers on regular and degenerate Gramians, nothing half-written.
#include <cmath>

#include "../../csrc/config_rule.hpp"
#include "../../csrc/gramian_rule.hpp"
#include "check.hpp"

namespace fastconfig::test {
namespace {

struct Kind {
    const char* name;
    std::vector<double> parameters;
    int64_t operand;  // times m·m, or -1: m
};

const Kind kKinds[] = {
    {"constant", {1.0}, 0},
    {"inverse_norm", {-0.5}, 0},
    {"imtlg", {}, 0},
    {"aligned", {0.0}, 0},
    {"aligned", {1.0}, 0},
    {"aligned", {2.0}, 0},
    {"pcgrad", {}, 0},
    {"pcgrad", {}, 1},
    {"priority", {}, 0},
    {"gradvac", {0.01}, 2},
    {"mgda", {}, 0},
    {"cagrad", {0.5, 1.0}, 0},
    {"dualproj", {}, 0},
    {"upgrad", {}, 0},
    {"sdmgrad", {0.3, 5.0, 0.5, 20.0}, -1},
    {"nash", {1.0}, 0},
    {"fairgrad", {1.0}, 0},
};

// (m, m) of random rows of `rank` dimensions and sizes over many orders of magnitude; some equal, opposed, zero, NaN.
std::vector<double> gramian_of(int64_t m, int64_t rank, int kind, Random& random) {
    std::vector<double> rows(m * rank), gramian(m * m);
    for (int64_t i = 0; i < m; ++i) {
        const double scale = std::ldexp(1.0, kind == 1 ? static_cast<int>(random.below(400)) - 200 : 0);
        for (int64_t k = 0; k < rank; ++k) rows[i * rank + k] = scale * (random.unit() - 0.5);
    }
    for (int64_t k = 0; k < rank && m > 2; ++k) {
        if (kind == 2) rows[rank + k] = rows[k];
        if (kind == 3) rows[rank + k] = -2.0 * rows[k];
        if (kind == 4) rows[2 * rank + k] = 0.0;
        if (kind == 5) rows[rank + k] = std::nan("");
    }
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < m; ++j)
            for (int64_t k = 0; k < rank; ++k) gramian[i * m + j] += rows[i * rank + k] * rows[j * rank + k];
    return gramian;
}

void test_rule(const Machine& machine, const Rule& rule, const std::vector<double>& gramian, int64_t m,
               std::vector<double> operand, bool finite) {
    const std::vector<double> before = operand;
    std::vector<double> weights(m, -7.0);
    int64_t bad = Rule::kFinite;
    with_every_allocation_failing(
        [&] {
            bad = rule.weights(machine, gramian.data(), m, operand.empty() ? nullptr : operand.data(), weights.data());
        },
        [&] {
            for (const double weight : weights) CHECK(weight == -7.0, "half of the weights");
            CHECK(operand == before, "what the method remembers has changed");
        });
    CHECK(bad == Rule::kFinite || !finite, "row %lld is not finite", static_cast<long long>(bad));
    for (const double weight : weights) CHECK(!finite || std::isfinite(weight), "a weight that is not finite");
}

void test_rules_on(const Machine& machine, bool quick, Random& random) {
    for (const int64_t m : quick ? std::vector<int64_t>{1, 3, 12} : std::vector<int64_t>{1, 2, 3, 4, 7, 12, 40})
        for (int kind = 0; kind <= 5; ++kind)
            for (const int64_t rank : {m + 2, m / 2 + 1}) {
                const std::vector<double> gramian = gramian_of(m, rank, kind, random);
                const bool finite = kind != 5 || m <= 2;
                for (const NonFinite nonfinite : {NonFinite::propagate, NonFinite::drop, NonFinite::raise}) {
                    const bool answers = finite || nonfinite == NonFinite::drop;
                    for (const Length length : {Length::projection, Length::minimum, Length::maximum, Length::harmonic,
                                                Length::arithmetic, Length::geometric, Length::tracked})
                        test_rule(machine, ConfigRule({}, length, m - 1, 1e-12, nonfinite), gramian, m, {}, answers);
                    const std::vector<double> preferences(m, 0.5);
                    test_rule(machine, ConfigRule(preferences, Length::projection, 0, 1e-12, nonfinite), gramian, m, {},
                              answers);
                    for (const Kind& each : kKinds) {
                        std::vector<double> operand(each.operand < 0 ? m : each.operand * m * m);
                        for (double& number : operand)
                            number = each.operand < 0 ? 1.0 / static_cast<double>(m) : random.unit();
                        const NamedMethod* method = method_named(each.name);
                        CHECK(method != nullptr, "%s", each.name);
                        test_rule(machine, GramianRule(method, each.parameters, {}, nonfinite), gramian, m, operand,
                                  answers);
                        test_rule(machine, GramianRule(method, each.parameters, preferences, nonfinite), gramian, m,
                                  operand, answers);
                    }
                }
            }
}

}  // namespace

void test_rules(bool quick) {
    Random random(2);
    for (const Tier* tier : tiers()) test_rules_on({tier->dense, 3}, quick, random);
}

}  // namespace fastconfig::test
