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
    reduce(partials, count, rows.m, gramian);
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

}  // namespace fastconfig
