// Runs the tests of the core without Python: under sanitizers, or on a machine that is only emulated.
#include <atomic>
#include <new>
#include <string>

#include "check.hpp"

namespace {

// Allocations left until one fails; negative: none does.
std::atomic<int64_t> left{-1};

[[maybe_unused]] void* allocate(std::size_t size) {
    if (left.load(std::memory_order_relaxed) >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
    if (void* memory = std::malloc(size)) return memory;
    throw std::bad_alloc();
}

}  // namespace

// ThreadSanitizer brings operators of its own, and where it looks on, every allocation succeeds.
#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define WITH_THREAD_SANITIZER
#endif
#endif
#ifndef WITH_THREAD_SANITIZER
void* operator new(std::size_t size) { return allocate(size); }
void* operator new[](std::size_t size) { return allocate(size); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
#endif

namespace fastconfig::test {

int64_t checks = 0;

#ifdef WITH_THREAD_SANITIZER
const bool allocations_can_fail = false;
#else
const bool allocations_can_fail = true;
#endif

void encode(double value, DType dtype, void* to) {
    const float single = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &single, sizeof bits);
    uint16_t half = 0;
    switch (dtype) {
        case DType::float64: std::memcpy(to, &value, 8); return;
        case DType::float32: std::memcpy(to, &single, 4); return;
        case DType::bfloat16: half = static_cast<uint16_t>(bits >> 16); break;
        case DType::float16: {
            const uint32_t exponent = bits >> 23 & 0xff, fraction = bits >> 13 & 0x3ff;
            half = static_cast<uint16_t>(bits >> 16 & 0x8000);
            if (exponent > 0) half = static_cast<uint16_t>(half | (exponent - 112) << 10 | fraction);
        }
    }
    std::memcpy(to, &half, 2);
}

double decode(const void* from, DType dtype) {
    double wide;
    float single;
    uint16_t half;
    uint32_t bits;
    switch (dtype) {
        case DType::float64: std::memcpy(&wide, from, 8); return wide;
        case DType::float32: std::memcpy(&single, from, 4); return single;
        case DType::bfloat16:
            std::memcpy(&half, from, 2);
            bits = static_cast<uint32_t>(half) << 16;
            std::memcpy(&single, &bits, 4);
            return single;
        default: break;
    }
    std::memcpy(&half, from, 2);
    const int exponent = half >> 10 & 0x1f, fraction = half & 0x3ff;
    const double magnitude = exponent
                                 ? static_cast<double>(1024 + fraction) * static_cast<double>(1 << exponent) * 0x1p-25
                                 : static_cast<double>(fraction) * 0x1p-24;
    return half & 0x8000 ? -magnitude : magnitude;
}

Random& Matrix::zeros() {
    static Random never(0);
    return never;
}

Matrix::Matrix(int64_t m, int64_t n, DType dtype, int64_t shift, Random& random) : m(m), n(n), dtype(dtype) {
    const int64_t size = size_of(dtype);
    for (int64_t i = 0; i < m; ++i) {
        memory_.emplace_back(new char[(shift + n) * size]());
        char* start = memory_.back().get() + shift * size;
        row_.push_back(start);
        for (int64_t j = 0; j < n && &random != &zeros(); ++j) encode(random.small(), dtype, start + j * size);
    }
}

std::vector<void*> Matrix::addresses() const {
    std::vector<void*> result;
    for (int64_t i = 0; i < m; ++i) result.push_back(row(i));
    return result;
}

bool Matrix::same_bits(const Matrix& other) const {
    for (int64_t i = 0; i < m; ++i)
        if (std::memcmp(row_[i], other.row_[i], n * size_of(dtype)) != 0) return false;
    return true;
}

std::vector<const Tier*> tiers() {
    const Tier* found[3];
    return std::vector<const Tier*>(found, found + available_tiers(found, 3));
}

std::set<std::string> said;

int64_t with_every_allocation_failing(const std::function<void()>& attempt, const std::function<void()>& after) {
    for (int64_t failing = 0;; ++failing) {
        bool failed = false;
        left = failing;
        try {
            attempt();
        } catch (const std::bad_alloc& error) {
            failed = true;
            left = -1;
            said.insert(error.what());
        }
        left = -1;
        if (!failed) return failing;
        after();
    }
}

}  // namespace fastconfig::test

int main(int count, char** arguments) {
    using namespace fastconfig::test;
    const bool quick = count > 1 && std::strcmp(arguments[1], "--quick") == 0;
    test_streams(quick);
    test_rules(quick);
    test_momentum(quick);
    test_threads(quick);
    for (const fastconfig::Tier* tier : tiers()) std::printf("%s ", tier->name);
    std::printf("%lld checks\n", static_cast<long long>(checks));
    return 0;
}
