// What the tests of the core share: numbers, rows in memory that ends where they end, an allocator that can fail.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "../../csrc/tier.hpp"

namespace fastconfig::test {

extern int64_t checks;  // how many were made

#define CHECK(condition, ...)                                                    \
    do {                                                                         \
        ++fastconfig::test::checks;                                              \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                   \
            std::fputc('\n', stderr);                                            \
            std::exit(1);                                                        \
        }                                                                        \
    } while (0)

// Numbers that do not depend on the library (splitmix64).
class Random {
    uint64_t state_;

 public:
    explicit Random(uint64_t seed) : state_(seed) {}
    uint64_t next() {
        uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    int64_t below(int64_t bound) { return static_cast<int64_t>(next() % static_cast<uint64_t>(bound)); }
    // k/16 for |k| < 128: exact in every dtype.
    double small() { return static_cast<double>(below(255) - 127) / 16.0; }
    double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }
};

// A number as a dtype stores it, and back. `encode` is for those that the dtype holds exactly.
void encode(double value, DType dtype, void* to);
double decode(const void* from, DType dtype);

// m rows of n elements, each in an allocation of its own that ends with the row, `shift` elements into it: a sanitizer
// sees every read and write past either end.
class Matrix {
    std::vector<std::unique_ptr<char[]>> memory_;
    std::vector<const void*> row_;

 public:
    const int64_t m, n;
    const DType dtype;

    Matrix(int64_t m, int64_t n, DType dtype, int64_t shift, Random& random);
    Matrix(int64_t m, int64_t n, DType dtype) : Matrix(m, n, dtype, 0, zeros()) {}

    Rows rows() const { return {row_.data(), m, n, dtype}; }
    void* row(int64_t i) const { return const_cast<void*>(row_[i]); }
    std::vector<void*> addresses() const;
    std::vector<const void*> sources() const { return row_; }
    double at(int64_t i, int64_t j) const {
        return decode(static_cast<const char*>(row_[i]) + j * size_of(dtype), dtype);
    }
    bool same_bits(const Matrix& other) const;

 private:
    static Random& zeros();
};

std::vector<const Tier*> tiers();

// Calls `attempt` again and again, the first allocation failing, then the second, until one call needs no more: after
// each that failed, `after` looks at what it left. Returns how many allocations a call makes.
// Whether this build's allocator is the one that can fail.
extern const bool allocations_can_fail;

// What failures said since it was cleared.
extern std::set<std::string> said;

int64_t with_every_allocation_failing(const std::function<void()>& attempt, const std::function<void()>& after);

void test_streams(bool quick);
void test_rules(bool quick);
void test_momentum(bool quick);
void test_threads(bool quick);

}  // namespace fastconfig::test
