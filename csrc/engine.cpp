#include "engine.hpp"

#include <cmath>
#include <vector>

#include "blocks.hpp"
#include "machine.hpp"

namespace fastconfig {
namespace {

// From this output size on, streaming stores: the result would push the rows out of the last-level cache.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

// Adds the blocks' packed partial sums in block order and writes both triangles.
void reduce(const double* partials, int64_t blocks, int64_t m, double* gramian) {
    const int64_t size = packed_size(m);
    for (int64_t i = 0, e = 0; i < m; ++i)
        for (int64_t j = 0; j <= i; ++j, ++e) {
            double total = 0.0;
            for (int64_t block = 0; block < blocks; ++block) total += partials[block * size + e];
            gramian[i * m + j] = gramian[j * m + i] = total;
        }
}

// The rows that combine reads, with their weights.
struct Used {
    std::vector<const void*> row;
    std::vector<double> weight;

    explicit Used(int64_t m) {
        row.reserve(m);
        weight.reserve(m);
    }
    void choose(const Rows& rows, const double* weights) {
        for (int64_t i = 0; i < rows.m; ++i)
            if (weights[i] != 0.0) {
                row.push_back(rows.row[i]);
                weight.push_back(weights[i]);
            }
    }
    int64_t size() const { return static_cast<int64_t>(row.size()); }
};

// Whether 16-bit rows may be combined in float32. Its error is at most (m + 1)·2⁻²⁴·Σ|c_i||g_i| in the norm: where that
// is no more than 2⁻¹⁴ of the result, it is an eighth of what rounding to float16 may cost, and a 64th for bfloat16. It
// is not where large terms cancel, as with nearly opposed gradients. NaN is not.
bool float32_will_do(const double* gramian, const double* weights, int64_t m) {
    double square = 0.0, terms = 0.0;
    for (int64_t i = 0; i < m; ++i) {
        const double weight = weights[i], size = std::fabs(weight);
        if (weight == 0.0) continue;  // whose row may hold NaN
        if (!(size >= 0x1p-126 && size <= 0x1p127)) return false;
        terms += size * std::sqrt(gramian[i * m + i]);
        double along = 0.0;
        for (int64_t j = 0; j < m; ++j)
            if (weights[j] != 0.0) along += gramian[i * m + j] * weights[j];
        square += weight * along;
    }
    return static_cast<double>(m + 1) * terms * 0x1p-24 <= 0x1p-14 * std::sqrt(square);
}

bool is_streamed(const Rows& rows) { return rows.n * size_of(rows.dtype) >= kStreamBytes; }

void apply_used(const Engine& engine, const Rows& rows, const Used& used, bool in_float32, void* out) {
    const Blocks blocks(rows.m, rows.n);
    const int dtype = static_cast<int>(rows.dtype);
    const auto kernel = (in_float32 ? engine.tier->combine_single : engine.tier->combine)[dtype];
    for_each_block(blocks.count(), threads_for(blocks, rows.m * rows.n, engine.threads), true,
                   [&](int64_t block, int64_t) {
                       kernel(used.row.data(), used.weight.data(), used.size(), blocks[block], out, is_streamed(rows));
                   });
}

}  // namespace

void Engine::gramian(const Rows& rows, double* gramian) const {
    const Blocks blocks(rows.m, rows.n);
    const int team = threads_for(blocks, rows.m * rows.n, threads);
    const int64_t count = blocks.count(), size = packed_size(rows.m);
    const int64_t scratch = tier->scratch_size(rows.m) + kApart;
    // All of it before the threads start: an exception must not leave a parallel region.
    std::vector<double> partials = zeros_for("the partial Gramians", count * size, rows.m, rows.n);
    std::vector<double> scratches = zeros_for("the threads' sums", team * scratch, rows.m, rows.n);
    const auto kernel = tier->gramian[static_cast<int>(rows.dtype)];
    for_each_block(count, team, false, [&](int64_t block, int64_t thread) {
        kernel(rows.row, rows.m, blocks[block], &partials[block * size], &scratches[thread * scratch]);
    });
    reduce(partials.data(), count, rows.m, gramian);
}

void Engine::apply(const Rows& rows, const double* weights, void* out) const {
    Used used(rows.m);
    used.choose(rows, weights);
    apply_used(*this, rows, used, false, out);
}

void Engine::graddrop(const Rows& rows, const double* leak, Draw draw, void* out) const {
    const Blocks blocks(rows.m, rows.n);
    const auto kernel = tier->graddrop[static_cast<int>(rows.dtype)];
    for_each_block(blocks.count(), threads_for(blocks, rows.m * rows.n, threads), true, [&](int64_t block, int64_t) {
        kernel(rows.row, leak, rows.m, blocks[block], draw, out, is_streamed(rows));
    });
}

int64_t Engine::combine(const Rows& rows, const Rule& rule, double* operand, void* out, double* gramian,
                        double* weights) const {
    Used used(rows.m);  // nothing may fail once the method has updated what it remembers
    this->gramian(rows, gramian);
    const int64_t bad = rule.weights({tier->dense, threads}, gramian, rows.m, operand, weights);
    if (bad != Rule::kFinite) return bad;
    used.choose(rows, weights);
    const bool in_float32 = tier->combine_single[static_cast<int>(rows.dtype)] && used.size() > 0 &&
                            float32_will_do(gramian, weights, rows.m);
    apply_used(*this, rows, used, in_float32, out);
    return bad;
}

namespace {

// The blocks of several parts, one part's after the other's.
struct PartBlocks {
    std::vector<Blocks> blocks;    // of each part
    std::vector<int64_t> begin;    // of each part, its first block; and how many there are
    std::vector<int64_t> part;     // of each block
    std::vector<const void*> row;  // of each part, where its m rows begin
    int64_t elements = 0;

    PartBlocks(const Rows& rows, const std::vector<Part>& parts) : begin{0} {
        const Blocks all(rows.m, rows.n);
        for (const Part& one : parts) {
            const int64_t n = one.columns.count, offset = one.columns.first * size_of(rows.dtype);
            blocks.emplace_back(all, n);
            part.insert(part.end(), blocks.back().count(), static_cast<int64_t>(begin.size()) - 1);
            begin.push_back(static_cast<int64_t>(part.size()));
            for (int64_t i = 0; i < rows.m; ++i) row.push_back(static_cast<const char*>(rows.row[i]) + offset);
            elements += rows.m * n;
        }
    }

    int64_t count() const { return begin.back(); }
    int threads_of(int threads) const {
        if (elements < kSerialElements) return 1;
        return threads_after_fork(static_cast<int>(std::clamp<int64_t>(count(), 1, threads)));
    }
    Columns operator[](int64_t block) const { return blocks[part[block]][block - begin[part[block]]]; }
};

}  // namespace

int64_t Engine::combine_parts(const Rows& rows, const std::vector<Part>& parts, void* out, double* gramian,
                              double* weights) const {
    const int64_t m = rows.m, count = static_cast<int64_t>(parts.size()), size = packed_size(m);
    const int dtype = static_cast<int>(rows.dtype);
    const PartBlocks blocks(rows, parts);
    const int team = blocks.threads_of(threads);
    const int64_t scratch = tier->scratch_size(m) + kApart;
    // All of it before anything is written, and before the threads start.
    std::vector<double> partials = zeros_for("the partial Gramians", blocks.count() * size, m, rows.n);
    std::vector<double> scratches = zeros_for("the threads' sums", team * scratch, m, rows.n);
    std::vector<Used> used(count, Used(m));
    for (Used& of : used) of = Used(m);  // a copy of an empty vector has room for nothing
    std::vector<int64_t> bad(count, Rule::kFinite);
    std::vector<char> in_float32(count);
    for_each_block(blocks.count(), team, false, [&](int64_t block, int64_t thread) {
        tier->gramian[dtype](&blocks.row[blocks.part[block] * m], m, blocks[block], &partials[block * size],
                             &scratches[thread * scratch]);
    });
    const Machine each{tier->dense, count < threads ? threads : 1};
    constexpr int64_t kSolve = 64;  // multiply-adds that the least solve takes as long as
    Machine{tier->dense, threads}.share(count, count * (m * m * m + kSolve), [&](int64_t first, int64_t last) {
        for (int64_t p = first; p < last; ++p) {
            double *k = gramian + p * m * m, *c = weights + p * m;
            reduce(&partials[blocks.begin[p] * size], blocks.begin[p + 1] - blocks.begin[p], m, k);
            bad[p] = parts[p].rule->weights(each, k, m, parts[p].operand, c);
            if (bad[p] != Rule::kFinite) continue;
            used[p].choose({&blocks.row[p * m], m, parts[p].columns.count, rows.dtype}, c);
            in_float32[p] = tier->combine_single[dtype] && used[p].size() > 0 && float32_will_do(k, c, m);
        }
    });
    for (const int64_t row : bad)
        if (row != Rule::kFinite) return row;
    for_each_block(blocks.count(), team, true, [&](int64_t block, int64_t) {
        const int64_t p = blocks.part[block];
        const auto kernel = (in_float32[p] ? tier->combine_single : tier->combine)[dtype];
        kernel(used[p].row.data(), used[p].weight.data(), used[p].size(), blocks[block],
               static_cast<char*>(out) + parts[p].columns.first * size_of(rows.dtype), is_streamed(rows));
    });
    return Rule::kFinite;
}

}  // namespace fastconfig
