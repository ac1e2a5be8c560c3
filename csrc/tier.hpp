// The streaming kernels as one instruction-set tier provides them, and the choice among tiers at run time.
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

// What GradDrop draws by: Philox's key, and the number in the whole of the column 0 of these rows.
struct Draw {
    uint64_t seed;
    int64_t column;
};

// M-ConFIG's averages and the gradients that enter them. The first k of the m averages are those with a new gradient.
struct MomentumRows {
    void* const* average;         // m rows of the state's type
    const void* const* gradient;  // k rows
    const double* enter;          // k: (1 - β₁) times what each gradient is scaled by
    int64_t m, k;
    double keep;  // β₁
};

// What a step writes, as moments.py's Decision says it.
struct MomentumUpdate {
    void* second;                           // n second moments
    const double *forward, *backward;       // k, of the averages with a new gradient
    void* const* old;                       // the other averages that take part
    const double *old_forward, *old_mixed;  // their forward weights, and forward minus backward
    int64_t old_count;
    double gradient, second_unbiased, clip;
    double beta2, enter_second;  // v ← β₂ v + enter_second (f_t - β₁ f_{t-1})²
    bool measure;                // sum up the squared update and write nothing
};

// θ ← θ + rate·update - decay·θ; or, where `assign`, the update itself, θ not being read.
struct MomentumGroup {
    double decay, rate, eps;
    bool assign;
};

// A run of columns that lies in one parameter.
struct MomentumPiece {
    void* values;
    int64_t first, count;
    int group;
};

// On vectors of `count` numbers and matrices (size, size), row-major, of a few dozen.
struct Dense {
    double (*dot)(const double* a, const double* b, int64_t count);

    // The same, and Σ |a_i b_i| to `size`.
    double (*dot_and_size)(const double* a, const double* b, int64_t count, double* size);

    // y += factor·x
    void (*add)(double factor, const double* x, double* y, int64_t count);

    // y = A x for a symmetric A.
    void (*multiply)(const double* a, const double* x, double* y, int64_t size);

    // How many of the keys come before key j in ascending order, equal ones as they stand.
    int64_t (*place)(const double* keys, int64_t count, int64_t j);

    // A = UᵀU in place: the upper triangle becomes U, row by row, so that the inner loop runs along memory, but for its
    // diagonal, where 1/U_ii stands. Row i stands at i·stride; the stride is a multiple of 8, and all of a row may be
    // overwritten. False where a pivot is not over `least`.
    bool (*factor)(double* a, int64_t size, int64_t stride, double least);

    // x ← A⁻¹x for A = UᵀU.
    void (*solve)(const double* u, double* x, int64_t size, int64_t stride);

    // Householder's reduction QᵀAQ = T of a symmetric a (m, m) to tridiagonal form, in place: the diagonal stays in
    // `a`, `off` (m,) receives what is beside it. Q is the product of I - scale·vvᵀ, k from 0 to m - 3, with v in row k
    // of `reflectors` behind entry k; the scale is 0 where there was nothing to do, the squares' sum being under
    // `least`. `spare`: (m,).
    void (*tridiagonalise)(double* a, int64_t m, double least, double* reflectors, double* scales, double* off,
                           double* spare);
};

struct Tier {
    const char* name;
    Dense dense;

    // Doubles of scratch that gramian needs for m rows.
    int64_t (*scratch_size)(int64_t m);

    // partial (packed_size(m)) = Σ over the columns of g_i · g_j, in float64; reads each element from memory once.
    void (*gramian[kDTypes])(const void* const* row, int64_t m, Columns columns, double* partial, double* scratch);

    // out[columns] = Σ c_i g_i over `m` rows, accumulated in float64 and rounded to the rows' dtype
    // (16-bit ones by way of float32); `stream` writes past the cache.
    void (*combine[kDTypes])(const void* const* row, const double* c, int64_t m, Columns columns, void* out,
                             bool stream);

    // The same for a 16-bit type with sums in float32, else null; m ≥ 1, no weight's magnitude under 2⁻¹²⁶ or beyond
    // 2¹²⁷.
    void (*combine_single[kDTypes])(const void* const* row, const double* c, int64_t m, Columns columns, void* out,
                                    bool stream);

    // out[columns] = Σ (leak_i + (1 - leak_i) kept_i) g_i, kept_i being 1 for the elements of the sign that was drawn,
    // else 0; `leak` null for zeros. Accumulated and rounded as combine does.
    void (*graddrop[kDTypes])(const void* const* row, const double* leak, int64_t m, Columns columns, Draw draw,
                              void* out, bool stream);

    // M-ConFIG's, by the state's type (float32, float64) and the gradients', which is no wider; else null.

    // Doubles of scratch that momentum_products needs for k of m rows.
    int64_t (*momentum_scratch)(int64_t m, int64_t k);

    // partial (k, m) = the products of the new averages with all m, these k in their new state, too.
    void (*momentum_products[2][kDTypes])(const MomentumRows& rows, Columns columns, double* partial, double* scratch);

    // Writes the columns' averages and, where they have a group, second moments and parameters, which begin in `piece`
    // or after it. Returns Σ update² where it only measures.
    double (*momentum_update[2][kDTypes])(const MomentumRows& rows, const MomentumUpdate& update,
                                          const MomentumGroup* group, const MomentumPiece* piece, Columns columns);
};

// Tiers this build has, best last; nullptr where the architecture or the compiler lacks one.
const Tier* baseline_tier();
const Tier* avx2_tier();
const Tier* avx512_tier();

// All tiers this machine can run, weakest first, at most `capacity`; returns how many.
int available_tiers(const Tier** tiers, int capacity);

}  // namespace fastconfig
