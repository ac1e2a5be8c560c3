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

}  // namespace

void test_threads(bool quick) {
    Random random(3);
    const ConfigRule config({}, Length::projection, 0, 1e-12, NonFinite::propagate);
    const GramianRule upgrad(method_named("upgrad"), {}, {}, NonFinite::propagate);
    for (const Tier* tier : tiers()) {
        // Enough columns for several blocks and for more than one thread.
        const Matrix grads(5, quick ? 40000 : 300001, DType::float32, 1, random);
        const Answer wanted(Engine{tier, 1}, grads, config), other(Engine{tier, 1}, grads, upgrad);
        for (const int count : quick ? std::vector<int>{2, 3} : std::vector<int>{2, 3, 5, 8, 17, 64})
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
