// Gramians, combinations and GradDrop against sums in long double, on every tier, dtype and tail.
#include <cmath>

#include "../../csrc/blocks.hpp"
#include "../../csrc/config_rule.hpp"
#include "../../csrc/engine.hpp"
#include "check.hpp"

namespace fastconfig::test {
namespace {

constexpr DType kAllDTypes[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

// What a sum of m products of together this size may be off: their sum in float64, and its rounding to the dtype. One
// below 1 may be subnormal.
double rounding(DType dtype, int64_t m, double size) {
    const int digits[] = {24, 53, 8, 11};
    return std::ldexp(size + 1.0, -digits[static_cast<int>(dtype)]) + static_cast<double>(m) * std::ldexp(size, -53);
}

void test_gramian(const Engine& engine, const Matrix& grads) {
    std::vector<double> gramian(grads.m * grads.m), norm(grads.m);
    engine.gramian(grads.rows(), gramian.data());
    for (int64_t i = 0; i < grads.m; ++i)
        for (int64_t j = 0; j <= i; ++j) {
            long double exact = 0;
            for (int64_t k = 0; k < grads.n; ++k) exact += static_cast<long double>(grads.at(i, k)) * grads.at(j, k);
            // The numbers are multiples of 1/16 and their sums far below 2⁵³ of these: nothing is rounded.
            CHECK(gramian[i * grads.m + j] == static_cast<double>(exact), "%s m=%lld n=%lld", engine.tier->name,
                  static_cast<long long>(grads.m), static_cast<long long>(grads.n));
            CHECK(gramian[i * grads.m + j] == gramian[j * grads.m + i], "not symmetric");
        }
}

// `slack`: what may be off besides, relative to the terms' size.
void check_combination(const Engine& engine, const Matrix& grads, const std::vector<double>& weights, const Matrix& out,
                       double slack) {
    for (int64_t k = 0; k < grads.n; ++k) {
        long double exact = 0, size = 0;
        for (int64_t i = 0; i < grads.m; ++i) {
            exact += static_cast<long double>(weights[i]) * grads.at(i, k);
            size += std::fabs(weights[i] * grads.at(i, k));
        }
        CHECK(std::fabs(out.at(0, k) - static_cast<double>(exact)) <=
                  rounding(grads.dtype, grads.m, static_cast<double>(size)) + slack * static_cast<double>(size),
              "%s m=%lld n=%lld k=%lld: %g, not %g", engine.tier->name, static_cast<long long>(grads.m),
              static_cast<long long>(grads.n), static_cast<long long>(k), out.at(0, k), static_cast<double>(exact));
    }
}

void test_combination(const Engine& engine, const Matrix& grads, Random& random) {
    std::vector<double> weights(grads.m);
    for (double& weight : weights) weight = random.below(4) ? random.unit() - 0.5 : 0.0;
    Matrix out(1, grads.n, grads.dtype, random.below(5), random);
    engine.apply(grads.rows(), weights.data(), out.row(0));
    check_combination(engine, grads, weights, out, 0.0);
    const auto single = engine.tier->combine_single[static_cast<int>(grads.dtype)];
    if (!single) return;
    Matrix other(1, grads.n, grads.dtype, random.below(5), random);
    single(grads.rows().row, weights.data(), grads.m, {0, grads.n}, other.row(0), random.below(2) == 1);
    check_combination(engine, grads, weights, other, static_cast<double>(grads.m + 1) * 0x1p-24);
}

void test_graddrop(const Engine& engine, const Matrix& grads, Random& random) {
    const Draw draw = {random.next(), random.below(1000)};
    std::vector<double> leak(grads.m, 0.25);
    Matrix out(1, grads.n, grads.dtype, random.below(5), random);
    for (const double* leaks : {static_cast<const double*>(nullptr), static_cast<const double*>(leak.data())}) {
        engine.graddrop(grads.rows(), leaks, draw, out.row(0));
        for (int64_t k = 0; k < grads.n; ++k) {
            double positive = 0, negative = 0;
            for (int64_t i = 0; i < grads.m; ++i) (grads.at(i, k) > 0 ? positive : negative) += grads.at(i, k);
            const double passes = leaks ? 0.25 : 0.0, got = out.at(0, k);
            const double slack = 2 * rounding(grads.dtype, grads.m, positive - negative);
            const bool kept = std::fabs(got - (positive + passes * negative)) <= slack ||
                              std::fabs(got - (negative + passes * positive)) <= slack;
            CHECK(kept, "%s m=%lld k=%lld: %g", engine.tier->name, static_cast<long long>(grads.m),
                  static_cast<long long>(k), got);
        }
    }
}

// A call that runs out of memory writes no result.
void test_failing_allocations(const Engine& engine, DType dtype, Random& random) {
    const Matrix grads(9, 300, dtype, 1, random);
    const ConfigRule rule({}, Length::projection, 0, 1e-12, NonFinite::propagate);
    std::vector<double> gramian(81, -7.0), weights(9, -7.0);
    Matrix out(1, 300, dtype, 0, random), before(1, 300, dtype), wanted(1, 300, dtype);
    std::memcpy(before.row(0), out.row(0), 300 * size_of(dtype));
    const int64_t made = with_every_allocation_failing(
        [&] { engine.combine(grads.rows(), rule, nullptr, out.row(0), gramian.data(), weights.data()); },
        [&] { CHECK(out.same_bits(before), "a combination that failed has written"); });
    CHECK(made > 0 || !allocations_can_fail, "no allocation has failed");
    engine.combine(grads.rows(), rule, nullptr, wanted.row(0), gramian.data(), weights.data());
    CHECK(out.same_bits(wanted), "another answer after failures");
    std::memcpy(out.row(0), before.row(0), 300 * size_of(dtype));
    const std::vector<Part> parts = {{{0, 100}, &rule, nullptr}, {{100, 200}, &rule, nullptr}};
    std::vector<double> gramians(162), both(18);
    with_every_allocation_failing(
        [&] { engine.combine_parts(grads.rows(), parts, out.row(0), gramians.data(), both.data()); },
        [&] { CHECK(out.same_bits(before), "a combination of parts that failed has written"); });
    std::memcpy(out.row(0), before.row(0), 300 * size_of(dtype));
    with_every_allocation_failing([&] { engine.apply(grads.rows(), weights.data(), out.row(0)); },
                                  [&] { CHECK(out.same_bits(before), "an application that failed has written"); });
    gramian.assign(81, -7.0);
    said.clear();
    with_every_allocation_failing([&] { engine.gramian(grads.rows(), gramian.data()); },
                                  [&] {
                                      for (const double product : gramian) CHECK(product == -7.0, "half a Gramian");
                                  });
    const std::string asked =
        "fastconfig could not allocate 360 bytes for the partial Gramians of 9 rows of 300 elements";
    CHECK(!allocations_can_fail || said.count(asked) == 1, "what was asked for is not said");
}

}  // namespace

void test_streams(bool quick) {
    Random random(1);
    const std::vector<int64_t> ms =
        quick ? std::vector<int64_t>{1, 2, 5, 13, 37}
              : std::vector<int64_t>{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 16, 17, 25, 37, 40, 65, 104};
    const std::vector<int64_t> ns = quick ? std::vector<int64_t>{1, 17, 515}
                                          : std::vector<int64_t>{1,  2,  3,  7,  8,   9,   15,  16,  17,   31,  32,
                                                                 33, 63, 64, 65, 127, 511, 512, 513, 1030, 2051};
    for (const Tier* tier : tiers()) {
        const Engine engine{tier, 1};
        for (const DType dtype : kAllDTypes) {
            for (const int64_t m : ms)
                for (const int64_t n : ns) {
                    const Matrix grads(m, n, dtype, random.below(9), random);
                    test_gramian(engine, grads);
                    test_combination(engine, grads, random);
                    if (m < 20) test_graddrop(engine, grads, random);
                }
            test_failing_allocations(engine, dtype, random);
        }
    }
}

}  // namespace fastconfig::test
