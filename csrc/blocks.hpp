// How columns are divided into blocks and blocks among threads, so that the bits do not depend on how many there are.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <new>
#include <vector>

#include "fork.hpp"
#include "tier.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastconfig {

// Under this many elements a call runs serially: waking a second thread costs more than it saves.
constexpr int64_t kSerialElements = 1 << 17;

// Doubles between two threads' scratch: two cache lines, so that no thread writes where another's line begins.
constexpr int64_t kApart = 16;

// Columns of one block. Blocks depend on m and n alone, never on threads, and their sums are added in block order: the
// bits are the same for any number of threads. Where several threads take part there are about sixteen or more, so that
// threads end at about the same time. But none has under 64·m columns, so that the blocks' partial Gramians stay under
// 1/32 of the rows; and all have a multiple of 512, so that a vector aligned in one is aligned in all.
constexpr int64_t kMostBlockColumns = 1 << 14;
constexpr int64_t kLeastBlockColumns = 512;

struct Blocks {
    int64_t n, columns;

    Blocks(int64_t m, int64_t n) : n(n) {
        const int64_t shared = m * n < kSerialElements ? n : n / 16;
        const int64_t wanted = std::max(std::min(shared, kMostBlockColumns), m * 64);
        columns = std::max((wanted + kLeastBlockColumns - 1) / kLeastBlockColumns, int64_t{1}) * kLeastBlockColumns;
    }

    // Of n columns among others, in blocks as large as those of all of them.
    Blocks(const Blocks& all, int64_t n) : n(n), columns(all.columns) {}

    int64_t count() const { return (n + columns - 1) / columns; }
    Columns operator[](int64_t block) const {
        const int64_t first = block * columns;
        return {first, std::min(columns, n - first)};
    }
};

// How many threads take part where `elements` are read.
inline int threads_for(const Blocks& blocks, int64_t elements, int threads) {
    if (elements < kSerialElements) return 1;
    return threads_after_fork(static_cast<int>(std::clamp<int64_t>(blocks.count(), 1, threads)));
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

// An allocation that failed, with what it was for. Python sees a MemoryError.
class OutOfMemory : public std::bad_alloc {
    char text_[160];

 public:
    OutOfMemory(const char* purpose, int64_t bytes, int64_t m, int64_t n) {
        std::snprintf(text_, sizeof text_,
                      "fastconfig could not allocate %lld bytes for %s of %lld rows of %lld elements",
                      static_cast<long long>(bytes), purpose, static_cast<long long>(m), static_cast<long long>(n));
    }
    const char* what() const noexcept override { return text_; }
};

// Zeros: the working memory of a pass over m rows of n elements.
inline std::vector<double> zeros_for(const char* purpose, int64_t count, int64_t m, int64_t n) {
    try {
        return std::vector<double>(count);
    } catch (const std::bad_alloc&) {
        throw OutOfMemory(purpose, count * static_cast<int64_t>(sizeof(double)), m, n);
    }
}

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

}  // namespace fastconfig
