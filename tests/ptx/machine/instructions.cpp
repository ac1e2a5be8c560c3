// What the opcodes that Triton emits mean; an opcode that is not here is an error, not a guess.

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>

#include "machine.hpp"
#include "values.hpp"

namespace ptx {

namespace {

// ------------------------------------------------------------------------------------------- one lane at a time

// Applies a function of up to three values to every active lane.
template <uint64_t (*function)(uint64_t, uint64_t, uint64_t)>
void lanewise(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    const uint64_t* a = machine.source(warp, i, 0);
    const uint64_t* b = i.sources > 1 ? machine.source(warp, i, 1) : a;
    const uint64_t* c = i.sources > 2 ? machine.source(warp, i, 2) : a;
    uint64_t* out = warp.row(i.destination[0]);
    if (active == kAllLanes) {
        for (int lane = 0; lane < kLanes; ++lane) out[lane] = function(a[lane], b[lane], c[lane]);
        return;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        if (active >> lane & 1) out[lane] = function(a[lane], b[lane], c[lane]);
    }
}

// The same of functions that also take the instruction's mode.
template <uint64_t (*function)(uint64_t, uint64_t, int)>
void lanewise_by_mode(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    const uint64_t* a = machine.source(warp, i, 0);
    const uint64_t* b = i.sources > 1 ? machine.source(warp, i, 1) : a;
    uint64_t* out = warp.row(i.destination[0]);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (active >> lane & 1) out[lane] = function(a[lane], b[lane], i.mode);
    }
}

template <class T>
using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;

// Whatever overflows wraps, in signed types, too.
template <class T, class F>
uint64_t combined(uint64_t a, uint64_t b, F operation) {
    if constexpr (std::is_integral_v<T>) {
        return bits_of(T(operation(Wide<T>(value_of<T>(a)), Wide<T>(value_of<T>(b)))));
    } else {
        return bits_of(T(operation(value_of<T>(a), value_of<T>(b))));
    }
}

template <class T>
uint64_t add(uint64_t a, uint64_t b, uint64_t) {
    return combined<T>(a, b, [](auto x, auto y) { return x + y; });
}
template <class T>
uint64_t subtract(uint64_t a, uint64_t b, uint64_t) {
    return combined<T>(a, b, [](auto x, auto y) { return x - y; });
}
template <class T>
uint64_t multiply(uint64_t a, uint64_t b, uint64_t) {
    return combined<T>(a, b, [](auto x, auto y) { return x * y; });
}
template <class T>
uint64_t divide(uint64_t a, uint64_t b, uint64_t) {
    if constexpr (std::is_integral_v<T>) {
        if (value_of<T>(b) == 0) return bits_of(T(-1));
    }
    return combined<T>(a, b, [](auto x, auto y) { return x / y; });
}
template <class T>
uint64_t remainder_of(uint64_t a, uint64_t b, uint64_t) {
    return value_of<T>(b) == 0 ? a : combined<T>(a, b, [](auto x, auto y) { return x % y; });
}
template <class T>
uint64_t high_product(uint64_t a, uint64_t b, uint64_t) {
    return combined<T>(a, b, [](auto x, auto y) { return (x * y) >> (8 * sizeof(T)); });
}
template <class T, class Double>
uint64_t wide_product(uint64_t a, uint64_t b, uint64_t) {
    return bits_of(Double(Double(value_of<T>(a)) * Double(value_of<T>(b))));
}
template <class T>
uint64_t multiply_add(uint64_t a, uint64_t b, uint64_t c) {
    return add<T>(multiply<T>(a, b, 0), c, 0);
}
template <class T, class Double>
uint64_t wide_multiply_add(uint64_t a, uint64_t b, uint64_t c) {
    return add<Double>(wide_product<T, Double>(a, b, 0), c, 0);
}
template <class T>
uint64_t fused(uint64_t a, uint64_t b, uint64_t c) {
    return bits_of(T(std::fma(value_of<T>(a), value_of<T>(b), value_of<T>(c))));
}
template <class T>
uint64_t square_root(uint64_t a, uint64_t, uint64_t) {
    return bits_of(T(std::sqrt(value_of<T>(a))));
}
template <class T>
uint64_t least(uint64_t a, uint64_t b, uint64_t) {
    return bits_of(extreme<T, true>(value_of<T>(a), value_of<T>(b)));
}
template <class T>
uint64_t most(uint64_t a, uint64_t b, uint64_t) {
    return bits_of(extreme<T, false>(value_of<T>(a), value_of<T>(b)));
}
template <class T>
uint64_t negated(uint64_t a, uint64_t, uint64_t) {
    return combined<T>(a, a, [](auto x, auto) { return -x; });
}
template <class T>
uint64_t absolute(uint64_t a, uint64_t, uint64_t) {
    if constexpr (std::is_floating_point_v<T>) return bits_of(T(std::fabs(value_of<T>(a))));
    return value_of<T>(a) < T(0) ? negated<T>(a, 0, 0) : a;
}
template <class T>
uint64_t with_sign(uint64_t a, uint64_t b, uint64_t) {  // of the first operand
    return bits_of(T(std::copysign(value_of<T>(b), value_of<T>(a))));
}
template <class T>
uint64_t shifted_left(uint64_t a, uint64_t b, uint64_t) {
    const uint32_t by = uint32_t(b);
    return by >= 8 * sizeof(T) ? 0 : bits_of(T(value_of<T>(a) << by));
}
template <class T>
uint64_t shifted_right(uint64_t a, uint64_t b, uint64_t) {
    const uint32_t by = uint32_t(b), width = 8 * sizeof(T);
    if (by >= width) return std::is_signed_v<T> ? bits_of(T(value_of<T>(a) >> (width - 1))) : 0;
    return bits_of(T(value_of<T>(a) >> by));
}
template <class T>
uint64_t both(uint64_t a, uint64_t b, uint64_t) {
    return a & b;
}
template <class T>
uint64_t either(uint64_t a, uint64_t b, uint64_t) {
    return a | b;
}
template <class T>
uint64_t differing(uint64_t a, uint64_t b, uint64_t) {
    return a ^ b;
}
template <class T>
uint64_t inverted(uint64_t a, uint64_t, uint64_t) {
    return bits_of(T(~value_of<T>(a)));
}
uint64_t not_predicate(uint64_t a, uint64_t, uint64_t) { return ~a & 1; }
uint64_t selected(uint64_t a, uint64_t b, uint64_t predicate) { return predicate & 1 ? a : b; }
template <class T>
uint64_t field(uint64_t a, uint64_t b, uint64_t c) {
    const int first = int(b & 255), width = int(c & 255), bits = 8 * sizeof(T);
    if (width == 0) return 0;
    // Past the value's end it is continued by its sign.
    const Wide<T> value = Wide<T>(value_of<T>(a)) >> std::min(first, 100);
    if (width >= bits) return bits_of(T(value));
    const uint64_t low = uint64_t(value) & ((uint64_t(1) << width) - 1);
    const bool negative = std::is_signed_v<T> && (low >> (width - 1) & 1);
    return bits_of(T(negative ? low | ~uint64_t(0) << width : low));
}
uint64_t ones(uint64_t a, uint64_t, uint64_t) { return uint64_t(__builtin_popcount(uint32_t(a))); }
uint64_t permuted(uint64_t a, uint64_t b, uint64_t selector) {
    const uint64_t bytes = (a & 0xffffffffu) | b << 32;
    uint64_t out = 0;
    for (int k = 0; k < 4; ++k) {
        const int which = int(selector >> (4 * k) & 15);
        uint8_t byte = uint8_t(bytes >> (8 * (which & 7)));
        if (which & 8) byte = byte & 0x80 ? 0xff : 0;  // its sign alone
        out |= uint64_t(byte) << (8 * k);
    }
    return out;
}
template <bool kLeft>
uint64_t funnel_wrapped(uint64_t a, uint64_t b, uint64_t c) {
    const uint64_t value = (a & 0xffffffffu) | b << 32;
    const int by = int(c & 31);
    return kLeft ? (value << by) >> 32 : (value >> by) & 0xffffffffu;
}
template <class T, bool kLogarithm>
uint64_t binary_exponential(uint64_t a, uint64_t, uint64_t) {
    return bits_of(T(kLogarithm ? std::log2(value_of<T>(a)) : std::exp2(value_of<T>(a))));
}
template <class T>
uint64_t reciprocal(uint64_t a, uint64_t, uint64_t) {
    return bits_of(T(T(1) / value_of<T>(a)));
}
uint64_t reciprocal_root(uint64_t a, uint64_t, uint64_t) {
    return bits_of(float(1.0 / std::sqrt(double(value_of<float>(a)))));
}
// The approximate functions of float32, whose denormal numbers are zero.
uint64_t flushed_value(uint64_t bits) {
    const float value = value_of<float>(bits);
    return bits_of(std::fabs(value) < std::numeric_limits<float>::min() ? std::copysign(0.0f, value) : value);
}
template <uint64_t (*function)(uint64_t, uint64_t, uint64_t)>
uint64_t flushed(uint64_t a, uint64_t b, uint64_t) {
    return flushed_value(function(flushed_value(a), flushed_value(b), 0));
}
uint64_t approximate_reciprocal(uint64_t a, uint64_t, uint64_t) {  // of a float64: the upper half alone
    return reciprocal<double>(a, 0, 0) & 0xffffffff00000000ull;
}
template <class T>
uint64_t comparison(uint64_t a, uint64_t b, int how) {
    return compared<T>(value_of<T>(a), value_of<T>(b), how);
}
template <class T>
uint64_t comparison_of_halves(uint64_t a, uint64_t b, int how) {
    return compared<float>(widened(value_of<T>(a)), widened(value_of<T>(b)), how);
}
// Both halves of a register, into a predicate each.
template <class T>
void compare_pairs(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    const uint64_t* a = machine.source(warp, i, 0);
    const uint64_t* b = machine.source(warp, i, 1);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        for (int k = 0; k < i.destinations; ++k) {
            warp.row(i.destination[k])[lane] =
                comparison_of_halves<T>(a[lane] >> (16 * k), b[lane] >> (16 * k), i.mode);
        }
    }
}

template <class To, class From>
uint64_t convert(uint64_t a, uint64_t, int mode) {
    return converted<To, From>(a, mode);
}
template <class T>
uint64_t pair_of(uint64_t high, uint64_t low, uint64_t) {
    const T first = narrowed<T>(value_of<float>(high)), second = narrowed<T>(value_of<float>(low));
    return uint64_t(first.bits) << 16 | second.bits;
}

// ------------------------------------------------------------------------------------------------------ the warp

void move(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    const int parts = std::max(i.sources, i.destinations);
    const int bits = 8 * i.bytes / parts;
    const uint64_t mask = bits >= 64 ? ~uint64_t(0) : (uint64_t(1) << bits) - 1;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        uint64_t value = 0;
        for (int k = 0; k < i.sources; ++k) {
            const uint64_t part = machine.source(warp, i, k)[lane];
            value |= i.sources == 1 ? part : (part & mask) << (bits * k);
        }
        for (int k = 0; k < i.destinations; ++k) {
            if (i.destination[k] < 0) continue;
            warp.row(i.destination[k])[lane] = i.destinations == 1 ? value : value >> (bits * k) & mask;
        }
    }
}

enum Special { kThread, kBlock, kBlocks, kThreads, kLane, kZero, kOne };

void special(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        const uint64_t values[] = {uint64_t(warp.thread(lane)),
                                   uint64_t(warp.block->number),
                                   uint64_t(machine.launch().programs),
                                   uint64_t(machine.launch().warps) * kLanes,
                                   uint64_t(lane),
                                   0,
                                   1};
        warp.row(i.destination[0])[lane] = values[i.mode];
    }
}

void branch(Machine&, Warp& warp, const Instruction& i, uint32_t active) {
    for (int lane = 0; lane < kLanes; ++lane) {
        if (active >> lane & 1) warp.pcs[lane] = i.target;
    }
}
void leave(Machine& machine, Warp& warp, const Instruction&, uint32_t active) { machine.leave(warp, active); }
void arrive(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    if (i.sources > 0 && machine.source(warp, i, 0)[0] != 0) throw Fault("only barrier 0 is known");
    if (i.sources > 1) throw Fault("only barriers of all threads are known");
    machine.arrive(warp, i, active);
}
void meet(Machine& machine, Warp& warp, const Instruction&, uint32_t active) { machine.meet(warp, active); }

enum Shuffle { kButterfly, kIndexed, kUpwards, kDownwards };

void shuffle(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    uint64_t values[kLanes];
    std::memcpy(values, machine.source(warp, i, 0), sizeof values);
    const uint64_t* by = machine.source(warp, i, 1);
    uint64_t* out = warp.row(i.destination[0]);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        const int amount = int(by[lane] & 31);
        int from = amount;
        if (i.mode == kButterfly) from = lane ^ amount;
        if (i.mode == kUpwards) from = lane - amount;
        if (i.mode == kDownwards) from = lane + amount;
        out[lane] = values[from < 0 || from >= kLanes ? lane : from];
    }
}

enum Reduction { kSum, kLeast, kMost, kAnd, kOr, kXor };

template <class T>
void reduce(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    const uint64_t* values = machine.source(warp, i, 0);
    bool is_first = true;
    T total = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        const T value = value_of<T>(values[lane]);
        switch (is_first ? -1 : i.mode) {
            case -1: total = value; break;
            case kSum: total = T(total + value); break;
            case kLeast: total = std::min(total, value); break;
            case kMost: total = std::max(total, value); break;
            case kAnd: total &= value; break;
            case kOr: total |= value; break;
            default: total ^= value;
        }
        is_first = false;
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        if (active >> lane & 1) warp.row(i.destination[0])[lane] = bits_of(total);
    }
}

enum Vote { kBallot, kAny, kAll };

void vote(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    const uint64_t* values = machine.source(warp, i, 0);
    uint32_t ballot = 0;
    for (int lane = 0; lane < kLanes; ++lane) ballot |= uint32_t((active >> lane & 1) && (values[lane] & 1)) << lane;
    const uint64_t out = i.mode == kBallot ? ballot : i.mode == kAny ? ballot != 0 : ballot == active;
    for (int lane = 0; lane < kLanes; ++lane) {
        if (active >> lane & 1) warp.row(i.destination[0])[lane] = out;
    }
}

// ----------------------------------------------------------------------------------------------- matrix products

// PTX ISA, "Matrix Fragments for mma.m8n8k4 with .f64": a lane's group is lane / 4, its place in it lane % 4.
void multiply_8x8(Machine& machine, Warp& warp, const Instruction& i, uint32_t) {
    double a[8][4], b[4][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        a[lane / 4][lane % 4] = value_of<double>(machine.source(warp, i, 0)[lane]);
        b[lane % 4][lane / 4] = value_of<double>(machine.source(warp, i, 1)[lane]);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int k = 0; k < 2; ++k) {
            double sum = value_of<double>(machine.source(warp, i, 2 + k)[lane]);
            for (int j = 0; j < 4; ++j) sum = std::fma(a[lane / 4][j], b[j][lane % 4 * 2 + k], sum);
            warp.row(i.destination[k])[lane] = bits_of(sum);
        }
    }
}

// The same of m16n8k4, k8 and k16; mode is k.
void multiply_16x8(Machine& machine, Warp& warp, const Instruction& i, uint32_t) {
    const int depth = i.mode, of_a = depth / 2, of_b = depth / 4;
    double a[16][16], b[16][8];
    for (int lane = 0; lane < kLanes; ++lane) {
        const int group = lane / 4, place = lane % 4;
        for (int k = 0; k < of_a; ++k) {
            a[group + k % 2 * 8][place + k / 2 * 4] = value_of<double>(machine.source(warp, i, k)[lane]);
        }
        for (int k = 0; k < of_b; ++k) {
            b[place + k * 4][group] = value_of<double>(machine.source(warp, i, of_a + k)[lane]);
        }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
        for (int k = 0; k < 4; ++k) {
            const int row = lane / 4 + k / 2 * 8, column = lane % 4 * 2 + k % 2;
            double sum = value_of<double>(machine.source(warp, i, of_a + of_b + k)[lane]);
            for (int j = 0; j < depth; ++j) sum = std::fma(a[row][j], b[j][column], sum);
            warp.row(i.destination[k])[lane] = bits_of(sum);
        }
    }
}

// -------------------------------------------------------------------------------------------------------- memory

constexpr int kRowBytes = 16;  // of an 8×8 matrix of 16-bit elements

// Lane 8k + r points to row r of matrix k, and holds elements 2(l % 4) and the next of row l / 4; or, where mode is
// set, of the transposed matrix.
void load_matrix(Machine& machine, Warp& warp, const Instruction& i, uint32_t) {
    uint16_t rows[4][8][8];
    for (int k = 0; k < i.destinations; ++k) {
        for (int r = 0; r < 8; ++r) {
            const int lane = 8 * k + r;
            const uint64_t address = uint32_t(machine.source(warp, i, 0)[lane] + i.offset);
            machine.read_shared(warp, lane, i, address, kRowBytes, reinterpret_cast<uint8_t*>(rows[k][r]));
        }
    }
    for (int k = 0; k < i.destinations; ++k) {
        for (int lane = 0; lane < kLanes; ++lane) {
            uint64_t value = 0;
            for (int half = 0; half < 2; ++half) {
                const int row = lane / 4, column = lane % 4 * 2 + half;
                value |= uint64_t(i.mode ? rows[k][column][row] : rows[k][row][column]) << (16 * half);
            }
            warp.row(i.destination[k])[lane] = value;
        }
    }
}

void store_matrix(Machine& machine, Warp& warp, const Instruction& i, uint32_t) {
    for (int k = 0; k + 1 < i.sources; ++k) {
        uint16_t rows[8][8];
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint64_t value = machine.source(warp, i, 1 + k)[lane];
            for (int half = 0; half < 2; ++half) {
                const int row = lane / 4, column = lane % 4 * 2 + half;
                (i.mode ? rows[column][row] : rows[row][column]) = uint16_t(value >> (16 * half));
            }
        }
        for (int r = 0; r < 8; ++r) {
            const int lane = 8 * k + r;
            const uint64_t address = uint32_t(machine.source(warp, i, 0)[lane] + i.offset);
            machine.write_shared(warp, lane, i, address, kRowBytes, reinterpret_cast<uint8_t*>(rows[r]));
        }
    }
}

enum class Space { kGlobal, kShared, kParameter };

template <Space space>
void load(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    const uint64_t* base = machine.source(warp, i, 0);
    const int bytes = i.bytes * i.elements;
    uint64_t addresses[kLanes];
    std::memcpy(addresses, base, sizeof addresses);  // the value may land in the register of the address
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        const uint64_t address = addresses[lane] + i.offset;
        uint8_t loaded[32];
        if (space == Space::kShared) {
            machine.read_shared(warp, lane, i, uint32_t(address), bytes, loaded);
        } else if (space == Space::kGlobal) {
            machine.read(warp, lane, i, address, bytes, loaded);
        } else {
            if (address + bytes > uint64_t(machine.launch().parameter_bytes)) throw Fault("no such parameter");
            std::memcpy(loaded, machine.parameters() + address, bytes);
        }
        for (int k = 0; k < i.elements; ++k) {
            uint64_t value = 0;
            std::memcpy(&value, loaded + k * i.bytes, i.bytes);
            if (i.is_signed) value = uint64_t(int64_t(value << (64 - 8 * i.bytes)) >> (64 - 8 * i.bytes));
            if (i.destination[k] >= 0) warp.row(i.destination[k])[lane] = value;
        }
    }
}

template <Space space>
void store(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    const uint64_t* base = machine.source(warp, i, 0);
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        uint8_t stored[32];
        for (int k = 0; k < i.elements; ++k) {
            std::memcpy(stored + k * i.bytes, &machine.source(warp, i, 1 + k)[lane], i.bytes);
        }
        const uint64_t address = base[lane] + i.offset;
        if (space == Space::kShared) {
            machine.write_shared(warp, lane, i, uint32_t(address), i.bytes * i.elements, stored);
        } else {
            machine.write(warp, lane, i, address, i.bytes * i.elements, stored);
        }
    }
}

void take_ticket(Machine& machine, Warp& warp, const Instruction& i, uint32_t active) {
    for (int lane = 0; lane < kLanes; ++lane) {
        if (!(active >> lane & 1)) continue;
        const uint64_t address = machine.source(warp, i, 0)[lane] + i.offset;
        const uint32_t added = uint32_t(machine.source(warp, i, 1)[lane]);
        const uint32_t before = machine.add_atomically(warp, lane, i, address, added);
        if (i.destination[0] >= 0) warp.row(i.destination[0])[lane] = before;
    }
}

// ------------------------------------------------------------------------------------------------------ decoding

using Parts = std::vector<std::string>;

Parts split(const std::string& opcode) {
    Parts parts;
    size_t from = 0;
    for (size_t dot; (dot = opcode.find('.', from)) != std::string::npos; from = dot + 1) {
        parts.push_back(opcode.substr(from, dot - from));
    }
    parts.push_back(opcode.substr(from));
    return parts;
}

bool holds(const Parts& parts, const char* part) { return std::find(parts.begin(), parts.end(), part) != parts.end(); }

int index_of(const std::string& name, const std::vector<const char*>& names) {
    for (size_t k = 0; k < names.size(); ++k) {
        if (name == names[k]) return int(k);
    }
    throw std::invalid_argument("unknown: " + name);
}

int bytes_of(const std::string& type) {
    static const std::map<std::string, int> bytes = {
        {"pred", 1}, {"u8", 1},  {"s8", 1},  {"b8", 1},  {"u16", 2}, {"s16", 2}, {"b16", 2}, {"f16", 2}, {"bf16", 2},
        {"u32", 4},  {"s32", 4}, {"b32", 4}, {"f32", 4}, {"u64", 8}, {"s64", 8}, {"b64", 8}, {"f64", 8}};
    const auto found = bytes.find(type);
    if (found == bytes.end()) throw std::invalid_argument("unknown type: " + type);
    return found->second;
}

struct Meaning {
    Execute execute;
    Unit unit;
};
using Meanings = std::map<std::string, Meaning>;

template <class T>
void add_integer(Meanings& all, const std::string& type) {
    const auto as = [&](const char* name, Execute execute, Unit unit = Unit::kInteger) {
        all[std::string(name) + "." + type] = {execute, unit};
    };
    as("add", lanewise<add<T>>);
    as("sub", lanewise<subtract<T>>);
    as("mul.lo", lanewise<multiply<T>>);
    as("mul.hi", lanewise<high_product<T>>);
    as("mad.lo", lanewise<multiply_add<T>>);
    as("div", lanewise<divide<T>>, Unit::kDivision);
    as("rem", lanewise<remainder_of<T>>, Unit::kDivision);
    as("min", lanewise<least<T>>);
    as("max", lanewise<most<T>>);
    as("neg", lanewise<negated<T>>);
    as("abs", lanewise<absolute<T>>);
    as("shl", lanewise<shifted_left<T>>);
    as("shr", lanewise<shifted_right<T>>);
    as("and", lanewise<both<T>>);
    as("or", lanewise<either<T>>);
    as("xor", lanewise<differing<T>>);
    as("not", lanewise<inverted<T>>);
    as("selp", lanewise<selected>);
    as("bfe", lanewise<field<T>>);
    as("setp", lanewise_by_mode<comparison<T>>);
    as("redux.sync", reduce<T>, Unit::kShuffle);
}

template <class T>
void add_float(Meanings& all, const std::string& type, Unit unit, Unit slow) {
    const auto as = [&](const char* name, Execute execute, Unit its) {
        all[std::string(name) + "." + type] = {execute, its};
    };
    as("add", lanewise<add<T>>, unit);
    as("sub", lanewise<subtract<T>>, unit);
    as("mul", lanewise<multiply<T>>, unit);
    as("fma", lanewise<fused<T>>, unit);
    as("div", lanewise<divide<T>>, slow);
    as("sqrt", lanewise<square_root<T>>, slow);
    as("rcp", lanewise<reciprocal<T>>, slow);
    as("min", lanewise<least<T>>, unit);
    as("max", lanewise<most<T>>, unit);
    as("neg", lanewise<negated<T>>, Unit::kInteger);
    as("abs", lanewise<absolute<T>>, Unit::kInteger);
    as("copysign", lanewise<with_sign<T>>, Unit::kInteger);
    as("selp", lanewise<selected>, Unit::kInteger);
    as("setp", lanewise_by_mode<comparison<T>>, unit);
    as("ex2.approx", lanewise<binary_exponential<T, false>>, slow);
    as("lg2.approx", lanewise<binary_exponential<T, true>>, slow);
}

template <class T, class Double>
void add_wide(Meanings& all, const std::string& type) {
    all["mul.wide." + type] = {lanewise<wide_product<T, Double>>, Unit::kInteger};
    all["mad.wide." + type] = {lanewise<wide_multiply_add<T, Double>>, Unit::kInteger};
}

template <class To, class From>
void add_conversion(Meanings& all, const std::string& to, const std::string& from) {
    const bool is_slow = (is_float<From> || is_float<To>) && (sizeof(To) == 8 || sizeof(From) == 8);
    all["cvt." + to + "." + from] = {lanewise_by_mode<convert<To, From>>, is_slow ? Unit::kFloat64 : Unit::kInteger};
}

template <class To>
void add_conversions(Meanings& all, const std::string& to) {
    add_conversion<To, uint8_t>(all, to, "u8");
    add_conversion<To, int8_t>(all, to, "s8");
    add_conversion<To, uint16_t>(all, to, "u16");
    add_conversion<To, int16_t>(all, to, "s16");
    add_conversion<To, uint32_t>(all, to, "u32");
    add_conversion<To, int32_t>(all, to, "s32");
    add_conversion<To, uint64_t>(all, to, "u64");
    add_conversion<To, int64_t>(all, to, "s64");
    add_conversion<To, float>(all, to, "f32");
    add_conversion<To, double>(all, to, "f64");
    add_conversion<To, Half>(all, to, "f16");
    add_conversion<To, BFloat>(all, to, "bf16");
}

// What works on one lane at a time, and reductions, by name without how they round.
const Meanings& meanings() {
    static const Meanings all = [] {
        Meanings all;
        add_integer<uint16_t>(all, "u16");
        add_integer<int16_t>(all, "s16");
        add_integer<uint16_t>(all, "b16");
        add_integer<uint32_t>(all, "u32");
        add_integer<int32_t>(all, "s32");
        add_integer<uint32_t>(all, "b32");
        add_integer<uint64_t>(all, "u64");
        add_integer<int64_t>(all, "s64");
        add_integer<uint64_t>(all, "b64");
        add_wide<uint16_t, uint32_t>(all, "u16");
        add_wide<int16_t, int32_t>(all, "s16");
        add_wide<uint32_t, uint64_t>(all, "u32");
        add_wide<int32_t, int64_t>(all, "s32");
        add_float<float>(all, "f32", Unit::kInteger, Unit::kDivision);
        add_float<double>(all, "f64", Unit::kFloat64, Unit::kDivision);
        add_conversions<uint8_t>(all, "u8");
        add_conversions<int8_t>(all, "s8");
        add_conversions<uint16_t>(all, "u16");
        add_conversions<int16_t>(all, "s16");
        add_conversions<uint32_t>(all, "u32");
        add_conversions<int32_t>(all, "s32");
        add_conversions<uint64_t>(all, "u64");
        add_conversions<int64_t>(all, "s64");
        add_conversions<float>(all, "f32");
        add_conversions<double>(all, "f64");
        add_conversions<Half>(all, "f16");
        add_conversions<BFloat>(all, "bf16");
        all["cvt.bf16x2.f32"] = {lanewise<pair_of<BFloat>>, Unit::kInteger};
        all["cvt.f16x2.f32"] = {lanewise<pair_of<Half>>, Unit::kInteger};
        all["setp.bf16"] = {lanewise_by_mode<comparison_of_halves<BFloat>>, Unit::kInteger};
        all["setp.f16"] = {lanewise_by_mode<comparison_of_halves<Half>>, Unit::kInteger};
        all["setp.bf16x2"] = {compare_pairs<BFloat>, Unit::kInteger};
        all["setp.f16x2"] = {compare_pairs<Half>, Unit::kInteger};
        all["and.pred"] = {lanewise<both<uint64_t>>, Unit::kInteger};
        all["or.pred"] = {lanewise<either<uint64_t>>, Unit::kInteger};
        all["xor.pred"] = {lanewise<differing<uint64_t>>, Unit::kInteger};
        all["not.pred"] = {lanewise<not_predicate>, Unit::kInteger};
        all["popc.b32"] = {lanewise<ones>, Unit::kInteger};
        all["prmt.b32"] = {lanewise<permuted>, Unit::kInteger};
        all["shf.l.wrap.b32"] = {lanewise<funnel_wrapped<true>>, Unit::kInteger};
        all["shf.r.wrap.b32"] = {lanewise<funnel_wrapped<false>>, Unit::kInteger};
        for (const char* flushing : {"", ".ftz"}) {
            const std::string end = std::string(flushing) + ".f32";
            all["rsqrt.approx" + end] = {lanewise<flushed<reciprocal_root>>, Unit::kSpecial};
            all["sqrt.approx" + end] = {lanewise<flushed<square_root<float>>>, Unit::kSpecial};
            all["div.full" + end] = {lanewise<flushed<divide<float>>>, Unit::kSpecial};
        }
        all["abs.ftz.f32"] = {lanewise<flushed<absolute<float>>>, Unit::kInteger};
        all["rcp.approx.ftz.f64"] = {lanewise<approximate_reciprocal>, Unit::kDivision};
        return all;
    }();
    return all;
}

void decode_memory(const Parts& parts, Instruction& i) {
    static const std::vector<std::string> known = {
        "ld", "st", "global", "shared",         "shared::cta",     "param",           "cg", "ca", "cs", "nc",
        "v2", "v4", "v8",     "L1::evict_last", "L1::evict_first", "L1::evict_normal"};
    const std::string type = parts.back();
    for (size_t k = 0; k + 1 < parts.size(); ++k) {
        if (std::find(known.begin(), known.end(), parts[k]) == known.end()) {
            throw std::invalid_argument("unknown: " + parts[k]);
        }
        if (parts[k][0] == 'v') i.elements = parts[k][1] - '0';
    }
    i.bytes = bytes_of(type), i.is_memory = true;
    i.is_signed = type[0] == 's' && i.bytes < 8;
    i.past_l1 = holds(parts, "cg");
    const bool is_load = parts[0] == "ld";
    if (holds(parts, "global")) {
        i.execute = is_load ? load<Space::kGlobal> : store<Space::kGlobal>;
        i.unit = i.past_l1 ? Unit::kGlobalPast1 : Unit::kGlobal;
    } else if (holds(parts, "param")) {
        i.execute = load<Space::kParameter>;
    } else {
        i.execute = is_load ? load<Space::kShared> : store<Space::kShared>;
        i.unit = Unit::kShared;
    }
}

void decode_product(const std::string& opcode, Instruction& i) {
    const std::string tail = ".row.col.f64.f64.f64.f64", head = "mma.sync.aligned.";
    if (opcode.compare(0, head.size(), head) != 0 || opcode.size() <= head.size() + tail.size() ||
        opcode.compare(opcode.size() - tail.size(), tail.size(), tail) != 0) {
        throw std::invalid_argument("unknown matrix product");
    }
    const std::string shape = opcode.substr(head.size(), opcode.size() - head.size() - tail.size());
    static const std::vector<const char*> shapes = {"m8n8k4", "m16n8k4", "m16n8k8", "m16n8k16"};
    const int which = index_of(shape, shapes);
    i.execute = which == 0 ? multiply_8x8 : multiply_16x8;
    i.mode = 2 << which;
    i.unit = Unit::kMatrix;
    i.is_collective = true;
}

// "cvt.rzi.s32.f64" without its rounding, which becomes the mode.
std::string without_rounding(const Parts& parts, Instruction& i) {
    static const std::map<std::string, int> roundings = {
        {"rn", kNearest}, {"rzi", kTowardsZero}, {"rni", kNearestInteger}, {"rmi", kDown}, {"rpi", kUp}};
    std::string name;
    for (const std::string& part : parts) {
        const auto rounding = roundings.find(part);
        if (rounding != roundings.end()) {
            i.mode = rounding->second;
        } else {
            name += (name.empty() ? "" : ".") + part;
        }
    }
    return name;
}

}  // namespace

void decode(const std::string& opcode, Instruction& i) {
    const Parts parts = split(opcode);
    const std::string& base = parts[0];
    const auto is = [&](const char* name) { return opcode == name; };
    if (base == "mov") {
        i.execute = move, i.bytes = bytes_of(parts.back()), i.is_free = true;
    } else if (base == "special") {
        i.execute = special;
        static const std::vector<const char*> names = {"tid.x", "ctaid.x", "nctaid.x", "ntid.x", "laneid"};
        const std::string name = opcode.substr(base.size() + 1);
        const char axis = name.back();
        const bool is_number = name.compare(0, 4, "tid.") == 0 || name.compare(0, 6, "ctaid.") == 0;
        i.mode = axis == 'y' || axis == 'z' ? (is_number ? kZero : kOne) : index_of(name, names);
    } else if (is("bra") || is("bra.uni")) {
        i.execute = branch, i.unit = Unit::kControl;
    } else if (is("ret") || is("exit")) {
        i.execute = leave, i.unit = Unit::kControl;
    } else if (is("bar.sync") || is("barrier.sync") || is("barrier.sync.aligned")) {
        i.execute = arrive, i.unit = Unit::kBarrier;
    } else if (is("bar.warp.sync")) {
        i.execute = meet, i.unit = Unit::kControl;
    } else if (base == "ld" || base == "st") {
        decode_memory(parts, i);
    } else if (is("atom.global.gpu.acq_rel.add.u32") || is("atom.global.gpu.relaxed.add.u32")) {
        i.execute = take_ticket, i.unit = Unit::kAtomic, i.mode = holds(parts, "acq_rel");
    } else if (base == "shfl" && parts.size() == 4 && parts[1] == "sync" && parts[3] == "b32") {
        i.execute = shuffle, i.unit = Unit::kShuffle, i.is_collective = true;
        i.mode = index_of(parts[2], {"bfly", "idx", "up", "down"});
    } else if (base == "vote" && parts.size() == 4 && parts[1] == "sync") {
        i.execute = vote, i.unit = Unit::kShuffle, i.is_collective = true;
        i.mode = index_of(parts[2], {"ballot", "any", "all"});
    } else if (base == "mma") {
        decode_product(opcode, i);
    } else if (base == "ldmatrix" || base == "stmatrix") {
        const bool is_load = base == "ldmatrix";
        i.execute = is_load ? load_matrix : store_matrix;
        i.unit = Unit::kShared, i.is_collective = true, i.mode = holds(parts, "trans");
        if (!holds(parts, "m8n8") || parts.back() != "b16") throw std::invalid_argument("unknown matrix");
    } else {
        std::string name = without_rounding(parts, i);
        if (base == "setp" && parts.size() == 3) {
            if (i.destinations > 1 && parts[2].back() != '2') throw std::invalid_argument("two predicates");
            const bool is_unsigned = parts[2][0] == 'u';
            static const std::vector<const char*> names = {"eq",  "ne",  "lt",  "le",  "gt",  "ge",  "equ",
                                                           "neu", "ltu", "leu", "gtu", "geu", "num", "nan"};
            static const std::map<std::string, const char*> others = {
                {"lo", "lt"}, {"ls", "le"}, {"hi", "gt"}, {"hs", "ge"}};
            const auto other = others.find(parts[1]);
            i.mode = index_of(is_unsigned && other != others.end() ? other->second : parts[1], names);
            name = "setp." + parts[2];
        }
        if (base == "redux" && parts.size() == 4) {
            i.mode = index_of(parts[2], {"add", "min", "max", "and", "or", "xor"});
            i.is_collective = true;
            name = "redux.sync." + parts[3];
        }
        i.is_free = name == "cvt.u64.u32" || name == "cvt.u32.u64";
        const auto found = meanings().find(name);
        if (found == meanings().end()) throw std::invalid_argument("unknown opcode");
        i.execute = found->second.execute;
        i.unit = found->second.unit;
    }
}

void fold_offsets(Program& program) {
    std::vector<bool> is_address_alone(program.registers, true);
    for (const Instruction& i : program.instructions) {
        if (i.guard >= 0) is_address_alone[i.guard] = false;
        for (int k = i.is_memory ? 1 : 0; k < i.sources; ++k) {
            if (!i.source[k].is_constant) is_address_alone[i.source[k].number] = false;
        }
    }
    for (Instruction& i : program.instructions) {
        const bool adds = i.execute == lanewise<add<int64_t>> || i.execute == lanewise<add<int32_t>>;
        if (adds && (i.source[0].is_constant || i.source[1].is_constant)) {
            i.is_free = is_address_alone[i.destination[0]];
        }
    }
}

}  // namespace ptx
