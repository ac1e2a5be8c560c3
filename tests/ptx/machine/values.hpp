// Registers hold 64 bits; a value of a narrower type lies in the lowest of them, the rest being zero.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace ptx {

// 16-bit floats: storage alone, computed with as float.
struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

template <class T>
inline constexpr bool is_float = std::is_floating_point_v<T> || std::is_same_v<T, Half> || std::is_same_v<T, BFloat>;

template <class T>
T value_of(uint64_t bits) {
    T value;
    std::memcpy(&value, &bits, sizeof(T));
    return value;
}

// A NaN that was computed is always the same one, whichever of the operands' processors here would pass on.
template <class T>
uint64_t bits_of(T value) {
    if constexpr (std::is_floating_point_v<T>) {
        if (std::isnan(value)) value = std::numeric_limits<T>::quiet_NaN();
    }
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof(T));
    return bits;
}

inline float widened(Half x) {
    _Float16 value;
    std::memcpy(&value, &x.bits, 2);
    return float(value);
}
inline float widened(BFloat x) { return value_of<float>(uint64_t(x.bits) << 16); }
inline double widened(double x) { return x; }
inline float widened(float x) { return x; }

// Round to nearest, ties to even, as every conversion without another mode does.
template <class To>
To narrowed(double x) {
    return To(x);
}
template <>
inline Half narrowed<Half>(double x) {
    const _Float16 value = _Float16(x);
    Half out;
    std::memcpy(&out.bits, &value, 2);
    return out;
}
template <>
inline BFloat narrowed<BFloat>(double x) {
    const float value = float(x);  // PTX converts to bf16 from float32 alone
    if (std::isnan(value)) return {0x7fff};
    const uint32_t bits = uint32_t(bits_of(value));
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

enum Rounding { kNearest, kTowardsZero, kNearestInteger, kDown, kUp };

inline double rounded(double x, int mode) {
    switch (mode) {
        case kTowardsZero: return std::trunc(x);
        case kDown: return std::floor(x);
        case kUp: return std::ceil(x);
        default: return std::nearbyint(x);
    }
}

// Into the type's range, as PTX does; NaN is 0.
template <class To>
To saturated(double x) {
    if (std::isnan(x)) return 0;
    if (x <= double(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
    if (x >= double(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
    return To(x);
}

template <class To, class From>
uint64_t converted(uint64_t bits, int mode) {
    const From from = value_of<From>(bits);
    if constexpr (is_float<From> && is_float<To>) {
        const double x = widened(from);
        return bits_of(narrowed<To>(mode == kNearest ? x : rounded(x, mode)));
    } else if constexpr (is_float<From>) {
        return bits_of(saturated<To>(rounded(widened(from), mode)));
    } else if constexpr (std::is_same_v<To, float>) {
        return bits_of(float(from));
    } else if constexpr (is_float<To>) {
        return bits_of(narrowed<To>(double(from)));
    } else {
        return bits_of(To(from));
    }
}

// min and max: a number rather than a NaN, and -0 under +0.
template <class T, bool kLeast>
T extreme(T x, T y) {
    if constexpr (std::is_floating_point_v<T>) {
        if (std::isnan(x)) return y;
        if (std::isnan(y)) return x;
        if (x == y) return std::signbit(x) == kLeast ? x : y;
    }
    return (x < y) == kLeast ? x : y;
}

enum Comparison { kEq, kNe, kLt, kLe, kGt, kGe, kEqu, kNeu, kLtu, kLeu, kGtu, kGeu, kNum, kNan };

template <class T>
bool compared(T x, T y, int how) {
    bool unordered = false;
    if constexpr (std::is_floating_point_v<T>) unordered = std::isnan(x) || std::isnan(y);
    switch (how) {
        case kEq: return !unordered && x == y;
        case kNe: return !unordered && x != y;
        case kLt: return !unordered && x < y;
        case kLe: return !unordered && x <= y;
        case kGt: return !unordered && x > y;
        case kGe: return !unordered && x >= y;
        case kEqu: return unordered || x == y;
        case kNeu: return unordered || x != y;
        case kLtu: return unordered || x < y;
        case kLeu: return unordered || x <= y;
        case kGtu: return unordered || x > y;
        case kGeu: return unordered || x >= y;
        case kNum: return !unordered;
        default: return unordered;
    }
}

}  // namespace ptx
