#include "engine.hpp"

#include <omp.h>

#include <algorithm>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastconfig {
namespace {

// Columns of one block. Blocks depend on n alone, never on threads, and their sums are added in block order: the bits
// are the same for any number of threads. At least 64·m, so that the blocks' partial Gramians stay under 1/32 of the
// rows; a multiple of 16 Ki, so that a vector aligned in one block is aligned in all.
constexpr int64_t kBlockColumns = 1 << 14;

// Under this many elements a call runs serially: waking a second thread costs more than it saves.
constexpr int64_t kSerialElements = 1 << 17;

// Doubles between two threads' scratch: two cache lines, so that no thread writes where another's line begins.
constexpr int64_t kApart = 16;

// From this output size on, streaming stores: the result would push the rows out of the last-level cache.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

struct Blocks {
    int64_t n, columns;

    explicit Blocks(const Rows& rows)
        : n(rows.n), columns((rows.m * 64 + kBlockColumns - 1) / kBlockColumns * kBlockColumns) {}

    int64_t count() const { return (n + columns - 1) / columns; }
    Columns operator[](int64_t block) const {
        const int64_t first = block * columns;
        return {first, std::min(columns, n - first)};
    }
};

int threads_for(const Rows& rows, int threads) {
    if (rows.m * rows.n < kSerialElements) return 1;
    return static_cast<int>(std::clamp<int64_t>(Blocks(rows).count(), 1, threads));
}

// Whether subnormal numbers are flushed is each thread's own setting, and torch.set_flush_denormal sets it on one: here
// no thread flushes, so that the bits do not depend on which thread a block goes to.
class KeepSubnormals {
#if defined(__x86_64__)
    static constexpr unsigned kFlush = 0x8040;  // flush-to-zero and denormals-are-zero
    const unsigned before_ = _mm_getcsr();

 public:
    KeepSubnormals() { _mm_setcsr(before_ & ~kFlush); }
    ~KeepSubnormals() { _mm_setcsr(before_); }
#else
 public:
    KeepSubnormals() {}
#endif
    KeepSubnormals(const KeepSubnormals&) = delete;
    KeepSubnormals& operator=(const KeepSubnormals&) = delete;
};

// Calls work(block, thread) for every block, each thread on a run of its own: the same run in both passes, so that a
// pass finds in a core's cache what the pass before left there. The second pass goes backwards for the same reason.
template <class Work>
void for_each_block(int64_t count, int threads, bool backwards, Work work) {
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
        const int64_t first = count * thread / team, last = count * (thread + 1) / team;
        const KeepSubnormals keep;
        for (int64_t block = first; block < last; ++block) work(backwards ? first + last - 1 - block : block, thread);
    }
}

// Adds the blocks' packed partial sums in block order and writes both triangles.
void reduce(const std::vector<double>& partials, int64_t blocks, int64_t m, double* gramian) {
    const int64_t size = packed_size(m);
    std::vector<double> total(size);
    for (int64_t block = 0; block < blocks; ++block)
        for (int64_t e = 0; e < size; ++e) total[e] += partials[block * size + e];
    for (int64_t i = 0, e = 0; i < m; ++i)
        for (int64_t j = 0; j <= i; ++j, ++e) gramian[i * m + j] = gramian[j * m + i] = total[e];
}

// The rows that combine reads, with their weights.
struct Used {
    std::vector<const void*> row;
    std::vector<double> weight;

    Used(const Rows& rows, const double* weights) {
        for (int64_t i = 0; i < rows.m; ++i)
            if (weights[i] != 0.0) {
                row.push_back(rows.row[i]);
                weight.push_back(weights[i]);
            }
    }
    int64_t size() const { return static_cast<int64_t>(row.size()); }
};

void combine_block(const Tier& tier, const Rows& rows, const Used& used, Columns columns, void* out) {
    const bool stream = rows.n * size_of(rows.dtype) >= kStreamBytes;
    tier.combine[static_cast<int>(rows.dtype)](used.row.data(), used.weight.data(), used.size(), columns, out, stream);
}

}  // namespace

void Engine::gramian(const Rows& rows, double* gramian) const {
    const Blocks blocks(rows);
    const int team = threads_for(rows, threads);
    const int64_t count = blocks.count(), size = packed_size(rows.m);
    const int64_t scratch = tier->scratch_size(rows.m) + kApart;
    // All of it before the threads start: an exception must not leave a parallel region.
    std::vector<double> partials(count * size), scratches(team * scratch);
    const auto kernel = tier->gramian[static_cast<int>(rows.dtype)];
    for_each_block(count, team, false, [&](int64_t block, int64_t thread) {
        kernel(rows.row, rows.m, blocks[block], &partials[block * size], &scratches[thread * scratch]);
    });
    reduce(partials, count, rows.m, gramian);
}

void Engine::apply(const Rows& rows, const double* weights, void* out) const {
    const Used used(rows, weights);
    const Blocks blocks(rows);
    for_each_block(blocks.count(), threads_for(rows, threads), true,
                   [&](int64_t block, int64_t) { combine_block(*tier, rows, used, blocks[block], out); });
}

int64_t Engine::config_combine(const Rows& rows, const ConfigRule& rule, void* out, double* gramian,
                               double* weights) const {
    this->gramian(rows, gramian);
    const int64_t bad = rule.weights(gramian, rows.m, weights);
    if (bad == ConfigRule::kFinite) apply(rows, weights, out);
    return bad;
}

}  // namespace fastconfig
