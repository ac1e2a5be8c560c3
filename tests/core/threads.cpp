// Any number of threads gives the same bits, and calls from several threads at once do not disturb each other.
#include <thread>

#include "../../csrc/config_rule.hpp"
#include "../../csrc/engine.hpp"
#include "../../csrc/gramian_rule.hpp"
#include "check.hpp"

namespace fastconfig::test {
namespace {

struct Answer {
    std::vector<double> gramian, weights;
    Matrix out;

    Answer(const Engine& engine, const Matrix& grads, const Rule& rule)
        : gramian(grads.m * grads.m), weights(grads.m), out(1, grads.n, grads.dtype) {
        engine.combine(grads.rows(), rule, nullptr, out.row(0), gramian.data(), weights.data());
    }
    bool operator==(const Answer& other) const {
        return gramian == other.gramian && weights == other.weights && out.same_bits(other.out);
    }
};

// Rules that give each thread some of the rows.
void test_shared_rules(const Tier* tier, const std::vector<int>& counts, Random& random) {
    constexpr int64_t m = 24;
    const Matrix grads(m, 40, DType::float32, 0, random);
    std::vector<double> gramian(m * m), operand(2 * m * m);
    Engine{tier, 1}.gramian(grads.rows(), gramian.data());
    for (double& number : operand) number = random.unit() - 0.5;
    for (const char* name : {"pcgrad", "priority", "gradvac", "upgrad"}) {
        const GramianRule rule(method_named(name),
                               name == std::string("gradvac") ? std::vector<double>{0.01} : std::vector<double>{}, {},
                               NonFinite::propagate);
        std::vector<double> wanted(m), remembered(operand);
        rule.weights({tier->dense, 1}, gramian.data(), m, remembered.data(), wanted.data());
        for (const int count : counts) {
            std::vector<double> weights(m), state(operand);
            rule.weights({tier->dense, count}, gramian.data(), m, state.data(), weights.data());
            CHECK(weights == wanted && state == remembered, "%s: %d threads change the bits", name, count);
        }
    }
}

}  // namespace

void test_threads(bool quick) {
    Random random(3);
    const ConfigRule config({}, Length::projection, 0, 1e-12, NonFinite::propagate);
    const GramianRule upgrad(method_named("upgrad"), {}, {}, NonFinite::propagate);
    const std::vector<int> counts = quick ? std::vector<int>{2, 3} : std::vector<int>{2, 3, 5, 8, 17, 64};
    for (const Tier* tier : tiers()) {
        test_shared_rules(tier, counts, random);
        // Enough columns for several blocks and for more than one thread.
        const Matrix grads(5, quick ? 40000 : 300001, DType::float32, 1, random);
        const Answer wanted(Engine{tier, 1}, grads, config), other(Engine{tier, 1}, grads, upgrad);
        for (const int count : counts)
            CHECK(Answer(Engine{tier, count}, grads, config) == wanted, "%d threads change the bits", count);
        std::vector<std::thread> callers;
        std::vector<char> same(quick ? 3 : 8);
        for (size_t caller = 0; caller < same.size(); ++caller)
            callers.emplace_back([&, caller] {
                const bool first = caller % 2 == 0;
                bool all = true;
                for (int call = 0; call < 4; ++call)
                    all = all && Answer(Engine{tier, 1}, grads, first ? static_cast<const Rule&>(config) : upgrad) ==
                                     (first ? wanted : other);
                same[caller] = all;
            });
        for (std::thread& caller : callers) caller.join();
        for (const char all : same) CHECK(all, "calls at once change the bits");
    }
}

}  // namespace fastconfig::test
