// The two streaming kernels as one instruction-set tier provides them, and the choice among tiers at run time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastconfig {

enum class DType : int { float32 = 0, float64 = 1, bfloat16 = 2, float16 = 3 };
constexpr int kDTypes = 4;

constexpr int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// m rows of n elements each, anywhere in memory; each row is contiguous.
struct Rows {
    const void* const* row;
    int64_t m;
    int64_t n;
    DType dtype;
};

// Entries of a symmetric m×m matrix stored once, row by row: (i, j) with j <= i stands at i(i+1)/2 + j.
constexpr int64_t packed_size(int64_t m) { return m * (m + 1) / 2; }

// A run of columns.
struct Columns {
    int64_t first;
    int64_t count;
};

struct Tier {
    const char* name;

    // Doubles of scratch that gramian needs for m rows: a vector of sums for each pair.
    int64_t (*scratch_size)(int64_t m);

    // partial (packed_size(m)) = Σ over the columns of g_i · g_j, in float64; reads each element from memory once.
    void (*gramian[kDTypes])(const void* const* row, int64_t m, Columns columns, double* partial, double* scratch);

    // out[columns] = Σ c_i g_i over `m` rows, accumulated in float64 and rounded to the rows' dtype
    // (16-bit ones by way of float32); `stream` writes past the cache.
    void (*combine[kDTypes])(const void* const* row, const double* c, int64_t m, Columns columns, void* out,
                             bool stream);
};

// Tiers this build has, best last; nullptr where the architecture or the compiler lacks one.
const Tier* baseline_tier();
const Tier* avx2_tier();
const Tier* avx512_tier();

// All tiers this machine can run, weakest first, at most `capacity`; returns how many.
int available_tiers(const Tier** tiers, int capacity);

}  // namespace fastconfig
