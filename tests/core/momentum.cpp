// Steps of M-ConFIG: the same bits on any number of threads, nothing half-written, nothing outside the rows.
#include "../../csrc/momentum.hpp"

#include <cmath>
#include <optional>

#include "../../csrc/config_rule.hpp"
#include "../../csrc/gramian_rule.hpp"
#include "check.hpp"

namespace fastconfig::test {
namespace {

// All that a step changes.
struct State {
    Matrix average, second, values;
    std::vector<double> gramian, weights, counts, totals, operand;

    State(int64_t m, int64_t n, DType state, DType dtype, Random& random)
        : average(m, n, state, 3, random),
          second(1, n, state),
          values(1, n, dtype, 1, random),
          gramian(m * m),
          weights(m),
          counts(m),
          totals(2),
          operand(2 * m * m, 0.5) {}

    void copy_from(const State& other) {
        for (int64_t i = 0; i < average.m; ++i) std::memcpy(average.row(i), other.average.row(i), bytes(average));
        std::memcpy(second.row(0), other.second.row(0), bytes(second));
        std::memcpy(values.row(0), other.values.row(0), bytes(values));
        gramian = other.gramian, weights = other.weights, counts = other.counts, totals = other.totals;
        operand = other.operand;
    }
    bool operator==(const State& other) const {
        return average.same_bits(other.average) && second.same_bits(other.second) && values.same_bits(other.values) &&
               gramian == other.gramian && weights == other.weights && counts == other.counts &&
               totals == other.totals && operand == other.operand;
    }

 private:
    static int64_t bytes(const Matrix& matrix) { return matrix.n * size_of(matrix.dtype); }
};

struct Problem {
    int64_t m, k, n;
    DType state, dtype;
};

int64_t step(State& state, const Problem& problem, const Tier& tier, int threads, const Rule& method,
             const Matrix& gradients, int64_t first_loss, bool found_inf = false) {
    const int64_t size = size_of(problem.dtype), n = problem.n, used = n * 2 / 3;
    char* values = static_cast<char*>(state.values.row(0));
    // Two parameters, each with a group; behind them columns that no parameter has.
    std::vector<MomentumPiece> pieces = {{values + used / 2 * size, used / 2, used - used / 2, 1},
                                         {values, 0, used / 2, 0}};
    const MomentumSegment segment(state.average.addresses(), state.second.row(0), n, problem.state, std::move(pieces));
    std::vector<int64_t> losses;
    for (int64_t s = 0; s < problem.k; ++s) losses.push_back((first_loss + s) % problem.m);
    const Recorded recorded{losses, gradients.sources(), problem.dtype};
    const StepRule rule{0.9, 0.999, {{0.01, -0.1, 1e-8, false}, {0.0, 1.0, 1e-8, true}}};
    const std::vector<double> scales(problem.k, 1.0);
    const Ledger ledger{state.gramian.data(), state.weights.data(), state.counts.data(), state.totals.data()};
    return segment.step(tier, threads, recorded, rule, method, state.operand.data(), scales.data(), found_inf, ledger);
}

// A few steps: on one thread and on several the bits are the same, and what no step may write is as it was.
void test_problem(const Problem& problem, const Tier& tier, const Rule& method, uint64_t seed) {
    Random random(seed), again(seed);
    State one(problem.m, problem.n, problem.state, problem.dtype, random);
    State several(problem.m, problem.n, problem.state, problem.dtype, again);
    for (int64_t t = 0; t < 2 * problem.m + 2; ++t) {
        const Matrix gradients(problem.k, problem.n, problem.dtype, t % 3, random);
        step(one, problem, tier, 1, method, gradients, t * problem.k, t == 2);
        step(several, problem, tier, 5, method, gradients, t * problem.k, t == 2);
        CHECK(one == several, "threads change the bits");
    }
    CHECK(one.totals[0] > 0.0 && one.totals[1] == 1.0, "%g updates, %g left out", one.totals[0], one.totals[1]);
    for (int64_t k = 0; k < problem.n; ++k) CHECK(std::isfinite(one.values.at(0, k)), "a value that is not finite");
}

// A step that runs out of memory changes nothing, and the next one does as if it had not been.
void test_failing_allocations(const Problem& problem, const Tier& tier, const Rule& method) {
    Random random(7), again(7);
    State failing(problem.m, problem.n, problem.state, problem.dtype, random);
    State wanted(problem.m, problem.n, problem.state, problem.dtype, again);
    State before(problem.m, problem.n, problem.state, problem.dtype, again);
    for (int64_t t = 0; t < 2 * problem.m + 2; ++t) {
        const Matrix gradients(problem.k, problem.n, problem.dtype, 0, random);
        before.copy_from(failing);
        with_every_allocation_failing(
            [&] { step(failing, problem, tier, 1, method, gradients, t * problem.k, t == 2); },
            [&] { CHECK(failing == before, "step %d that failed has written", (int)t); });
        step(wanted, problem, tier, 1, method, gradients, t * problem.k, t == 2);
        CHECK(failing == wanted, "another step after failures");
    }
}

}  // namespace

void test_momentum(bool quick) {
    const ConfigRule config({}, Length::projection, 0, 1e-12, NonFinite::propagate);
    const GramianRule gradvac(method_named("gradvac"), {0.01}, {}, NonFinite::propagate);
    const std::vector<std::pair<DType, DType>> dtypes = {{DType::float32, DType::float32},
                                                         {DType::float64, DType::float64},
                                                         {DType::float32, DType::bfloat16},
                                                         {DType::float32, DType::float16},
                                                         {DType::float64, DType::float32}};
    uint64_t seed = 0;
    for (const Tier* tier : tiers())
        for (const auto& [state, dtype] : dtypes) {
            for (const int64_t m : quick ? std::vector<int64_t>{3} : std::vector<int64_t>{1, 2, 3, 9, 20})
                for (const int64_t k : {int64_t{1}, m})
                    for (const int64_t n :
                         quick ? std::vector<int64_t>{67} : std::vector<int64_t>{1, 5, 67, 1030, 70001})
                        if (n < 70001 || m == 3) test_problem({m, k, n, state, dtype}, *tier, config, ++seed);
            test_problem({4, 2, 131, state, dtype}, *tier, gradvac, ++seed);
            test_failing_allocations({3, 1, 67, state, dtype}, *tier, config);
            test_failing_allocations({3, 2, 67, state, dtype}, *tier, gradvac);
        }
}

}  // namespace fastconfig::test
