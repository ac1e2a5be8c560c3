// Any number of threads gives the same bits, and calls from several threads at once do not disturb each other.
#include <algorithm>
#include <cstring>
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

// Parts of none to several blocks, by two rules: the same bits for any number of threads, those of a call a part where
// a part is one block, and nothing is written beside them.
void test_parts(const Tier* tier, DType dtype, const std::vector<int>& counts, Random& random) {
    constexpr int64_t m = 5;
    const ConfigRule config({}, Length::projection, 0, 1e-12, NonFinite::propagate);
    const GramianRule upgrad(method_named("upgrad"), {}, {}, NonFinite::propagate);
    const std::vector<int64_t> sizes = {0, 1, 17, 30000, 0, 511, 3, 9000, 1};
    std::vector<Part> parts;
    int64_t n = 3;
    for (const int64_t size : sizes) {
        parts.push_back({{n, size}, parts.size() % 2 ? static_cast<const Rule*>(&config) : &upgrad, nullptr});
        n += size;
    }
    const int64_t count = static_cast<int64_t>(parts.size());
    const Matrix grads(m, n + 2, dtype, 1, random);
    Matrix wanted(1, grads.n, dtype, 0, random), untouched(1, grads.n, dtype);
    std::memcpy(untouched.row(0), wanted.row(0), grads.n * size_of(dtype));
    std::vector<double> gramians(count * m * m), weights(count * m);
    const auto run = [&](int threads, Matrix& out, std::vector<double>& k, std::vector<double>& c) {
        std::memcpy(out.row(0), untouched.row(0), grads.n * size_of(dtype));
        return Engine{tier, threads}.combine_parts(grads.rows(), parts, out.row(0), k.data(), c.data());
    };
    CHECK(run(1, wanted, gramians, weights) == Rule::kFinite, "a row that is not finite");
    for (const int threads : counts) {
        std::vector<double> k(count * m * m), c(count * m);
        Matrix out(1, grads.n, dtype);
        run(threads, out, k, c);
        CHECK(k == gramians && c == weights && out.same_bits(wanted), "%d threads change the bits", threads);
    }
    const int64_t width = size_of(dtype);
    const char *after = static_cast<const char*>(wanted.row(0)), *before = static_cast<const char*>(untouched.row(0));
    CHECK(!std::memcmp(after, before, 3 * width) && !std::memcmp(after + n * width, before + n * width, 2 * width),
          "columns of no part were written");
    for (int64_t p = 0; p < count; ++p) {
        if (sizes[p] > 1000) continue;
        std::vector<const void*> row;
        for (int64_t i = 0; i < m; ++i)
            row.push_back(static_cast<const char*>(grads.rows().row[i]) + parts[p].columns.first * width);
        std::vector<double> k(m * m), c(m);
        Matrix alone(1, sizes[p], dtype);
        Engine{tier, 1}.combine({row.data(), m, sizes[p], dtype}, *parts[p].rule, nullptr, alone.row(0), k.data(),
                                c.data());
        CHECK(!std::memcmp(after + parts[p].columns.first * width, alone.row(0), sizes[p] * width), "not as alone");
        CHECK(std::equal(k.begin(), k.end(), &gramians[p * m * m]) && std::equal(c.begin(), c.end(), &weights[p * m]),
              "another Gramian than alone");
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
        for (const DType dtype : {DType::float32, DType::float64, DType::bfloat16, DType::float16})
            test_parts(tier, dtype, counts, random);
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
