#include "momentum.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>

#include "blocks.hpp"
#include "machine.hpp"

namespace fastconfig {
namespace {

// The averages in the order of the kernels: those with a new gradient first.
struct Arranged {
    std::vector<int64_t> order;
    std::vector<void*> average;
    std::vector<double> enter;
    MomentumRows rows;

    Arranged(const std::vector<void*>& averages, const Recorded& recorded, const double* scales, double beta1)
        : order(recorded.loss) {
        const int64_t m = static_cast<int64_t>(averages.size());
        std::vector<bool> is_new(m);
        for (const int64_t i : recorded.loss) is_new[i] = true;
        for (int64_t i = 0; i < m; ++i)
            if (!is_new[i]) order.push_back(i);
        for (const int64_t i : order) average.push_back(averages[i]);
        for (size_t s = 0; s < recorded.loss.size(); ++s) enter.push_back((1.0 - beta1) * scales[s]);
        rows = {average.data(), recorded.gradient.data(), enter.data(), m, static_cast<int64_t>(enter.size()), beta1};
    }
};

// Whether this step's gradients are finite: their products with themselves say so. Returns the first that is not.
int64_t first_nonfinite_of(const Recorded& recorded, int64_t m, const double* products) {
    for (size_t s = 0; s < recorded.loss.size(); ++s)
        if (!std::isfinite(products[s * m + recorded.loss[s]])) return recorded.loss[s];
    return Rule::kFinite;
}

template <class Word>
void fill(void* values, int64_t count, Word word) {
    std::fill_n(static_cast<Word*>(values), count, word);
}

}  // namespace

MomentumSegment::MomentumSegment(std::vector<void*> average, void* second, int64_t n, DType state,
                                 std::vector<MomentumPiece> pieces)
    : average_(std::move(average)), second_(second), n_(n), state_(state), pieces_(std::move(pieces)) {
    pieces_.erase(std::remove_if(pieces_.begin(), pieces_.end(), [](const auto& piece) { return piece.count == 0; }),
                  pieces_.end());
    std::sort(pieces_.begin(), pieces_.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    int64_t covered = 0;
    const auto extend = [&](int64_t until, int group) {
        if (until == covered) return;
        if (!runs_.empty() && runs_.back().group == group)
            runs_.back().count += until - covered;
        else
            runs_.push_back({covered, until - covered, group});
        covered = until;
    };
    constexpr int none = -1;
    for (const MomentumPiece& piece : pieces_) {
        extend(piece.first, none);
        extend(piece.first + piece.count, piece.group);
    }
    extend(n_, none);
}

void MomentumSegment::products(const Tier& tier, int threads, const Recorded& recorded, const double* scales,
                               double beta1, double* out) const {
    const Arranged arranged(average_, recorded, scales, beta1);
    const MomentumRows& rows = arranged.rows;
    const Blocks blocks(rows.m + rows.k, n_);
    const int team = threads_for(blocks, (rows.m + rows.k) * n_, threads);
    const int64_t count = blocks.count(), size = rows.k * rows.m;
    const int64_t scratch = tier.momentum_scratch(rows.m, rows.k) + kApart;
    // All of it before the threads start: an exception must not leave a parallel region.
    std::vector<double> partials = zeros_for("the partial products", count * size, rows.m, n_);
    std::vector<double> scratches = zeros_for("the threads' sums", team * scratch, rows.m, n_);
    const auto kernel = tier.momentum_products[static_cast<int>(state_)][static_cast<int>(recorded.dtype)];
    for_each_block(count, team, false, [&](int64_t block, int64_t thread) {
        kernel(rows, blocks[block], &partials[block * size], &scratches[thread * scratch]);
    });
    std::fill(out, out + size, 0.0);
    for (int64_t block = 0; block < count; ++block)
        for (int64_t s = 0; s < rows.k; ++s)
            for (int64_t j = 0; j < rows.m; ++j)
                out[s * rows.m + arranged.order[j]] += partials[block * size + s * rows.m + j];
}

// All the memory of a pass that writes, taken before a step decides anything: once it writes, nothing may fail.
struct MomentumSegment::Pass {
    const Arranged arranged;
    const Blocks blocks;
    std::vector<double> new_forward, new_backward, old_forward, old_mixed, squares;
    std::vector<void*> old;

    Pass(const MomentumSegment& segment, const Recorded& recorded, const double* scales, double beta1)
        : arranged(segment.average_, recorded, scales, beta1),
          blocks(arranged.rows.m + arranged.rows.k, segment.n_),
          squares(blocks.count()) {
        for (std::vector<double>* numbers : {&new_forward, &new_backward}) numbers->reserve(arranged.rows.k);
        for (std::vector<double>* numbers : {&old_forward, &old_mixed}) numbers->reserve(arranged.rows.m);
        old.reserve(arranged.rows.m);
    }

    MomentumUpdate update(const MomentumSegment& segment, const StepRule& rule, const double* decision, bool measure) {
        const MomentumRows& rows = arranged.rows;
        const double *forward = decision + kHead, *backward = forward + rows.m;
        for (int64_t i = 0; i < rows.m; ++i) {
            const int64_t loss = arranged.order[i];
            if (i < rows.k) {
                new_forward.push_back(forward[loss]);
                new_backward.push_back(backward[loss]);
            } else if (forward[loss] != 0.0 || backward[loss] != 0.0) {
                old.push_back(arranged.average[i]);
                old_forward.push_back(forward[loss]);
                old_mixed.push_back(forward[loss] - backward[loss]);
            }
        }
        const double pseudo = 1.0 / (1.0 - rule.beta1);
        return {segment.second_,
                new_forward.data(),
                new_backward.data(),
                old.data(),
                old_forward.data(),
                old_mixed.data(),
                static_cast<int64_t>(old.size()),
                decision[kGradient],
                decision[kSecond],
                decision[kClip],
                rule.beta2,
                (1.0 - rule.beta2) * pseudo * pseudo,
                measure};
    }
};

void MomentumSegment::update(const Tier& tier, int threads, const Recorded& recorded, const StepRule& rule,
                             const double* decision) const {
    Pass pass(*this, recorded, decision + kHead + 2 * m(), rule.beta1);
    write(tier, threads, recorded.dtype, rule, decision, pass);
}

double MomentumSegment::update_square(const Tier& tier, int threads, const Recorded& recorded, const StepRule& rule,
                                      const double* decision) const {
    Pass pass(*this, recorded, decision + kHead + 2 * m(), rule.beta1);
    return run(tier, threads, recorded.dtype, rule, decision, pass, true);
}

void MomentumSegment::write(const Tier& tier, int threads, DType dtype, const StepRule& rule, const double* decision,
                            Pass& pass) const {
    if (decision[kTake] == 0.0) return fill_assigned(rule, dtype, true);
    if (decision[kUpdate] == 0.0) fill_assigned(rule, dtype, false);
    run(tier, threads, dtype, rule, decision, pass, false);
}

double MomentumSegment::run(const Tier& tier, int threads, DType dtype, const StepRule& rule, const double* decision,
                            Pass& pass, bool measure) const {
    const MomentumRows& rows = pass.arranged.rows;
    const MomentumUpdate update = pass.update(*this, rule, decision, measure);
    const bool steps = measure || decision[kUpdate] != 0.0;
    const int team = threads_for(pass.blocks, (rows.m + rows.k) * n_, threads);
    const auto kernel = tier.momentum_update[static_cast<int>(state_)][static_cast<int>(dtype)];
    for_each_block(pass.blocks.count(), team, true, [&](int64_t block, int64_t) {
        const Columns columns = pass.blocks[block];
        const int64_t last = columns.first + columns.count;
        const auto after = [](int64_t column, const auto& held) { return column < held.first; };
        auto run = std::upper_bound(runs_.begin(), runs_.end(), columns.first, after) - 1;
        for (; run != runs_.end() && run->first < last; ++run) {
            const int64_t first = std::max(run->first, columns.first);
            const Columns here = {first, std::min(run->first + run->count, last) - first};
            const bool grouped = run->group >= 0;
            if (measure && !grouped) continue;
            const MomentumPiece* piece = nullptr;
            if (grouped) piece = &*(std::upper_bound(pieces_.begin(), pieces_.end(), first, after) - 1);
            pass.squares[block] +=
                kernel(rows, update, steps && grouped ? &rule.group[run->group] : nullptr, piece, here);
        }
    });
    double total = 0.0;
    for (const double square : pass.squares) total += square;
    return total;
}

void MomentumSegment::fill_assigned(const StepRule& rule, DType dtype, bool with_nan) const {
    for (const MomentumPiece& piece : pieces_) {
        if (!rule.group[piece.group].assign) continue;
        if (!with_nan)
            std::memset(piece.values, 0, piece.count * size_of(dtype));
        else if (dtype == DType::float64)
            fill(piece.values, piece.count, std::numeric_limits<double>::quiet_NaN());
        else if (dtype == DType::float32)
            fill(piece.values, piece.count, std::numeric_limits<float>::quiet_NaN());
        else
            fill(piece.values, piece.count, static_cast<uint16_t>(dtype == DType::bfloat16 ? 0x7fc0 : 0x7e00));
    }
}

int64_t MomentumSegment::step(const Tier& tier, int threads, const Recorded& recorded, const StepRule& rule,
                              const Rule& method, double* operand, const double* scales, bool found_inf,
                              const Ledger& ledger) const {
    const int64_t m = this->m(), k = static_cast<int64_t>(recorded.loss.size());
    std::vector<double> products(k * m), decision(kHead + 2 * m + k), unbiased_gramian(m * m), bias(m);
    std::vector<double> gramian(ledger.gramian, ledger.gramian + m * m), counts(ledger.counts, ledger.counts + m);
    Pass pass(*this, recorded, scales, rule.beta1);
    this->products(tier, threads, recorded, scales, rule.beta1, products.data());
    const int64_t bad = first_nonfinite_of(recorded, m, products.data());
    if (bad != Rule::kFinite && method.nonfinite == NonFinite::raise) return bad;
    if (bad != Rule::kFinite || found_inf) {
        ledger.totals[1] += 1.0;
        fill_assigned(rule, recorded.dtype, true);
        return Rule::kFinite;
    }
    for (int64_t s = 0; s < k; ++s) {
        const int64_t i = recorded.loss[s];
        counts[i] += 1.0;
        for (int64_t j = 0; j < m; ++j) gramian[i * m + j] = gramian[j * m + i] = products[s * m + j];
    }
    decision[kTake] = 1.0;
    double *forward = &decision[kHead], *backward = forward + m;
    std::copy(scales, scales + k, backward + m);
    if (std::all_of(counts.begin(), counts.end(), [](double count) { return count > 0.0; })) {
        const double t = ledger.totals[0] + 1.0, unbiased = 1.0 - std::pow(rule.beta1, t);
        for (int64_t i = 0; i < m; ++i) bias[i] = 1.0 - std::pow(rule.beta1, counts[i]);
        for (int64_t i = 0; i < m; ++i)
            for (int64_t j = 0; j < m; ++j) unbiased_gramian[i * m + j] = gramian[i * m + j] / bias[j] / bias[i];
        method.weights({tier.dense, threads}, unbiased_gramian.data(), m, operand, forward);  // the last that may fail
        ledger.totals[0] = t;
        decision[kUpdate] = 1.0;
        decision[kGradient] = 1.0 / unbiased;
        decision[kSecond] = 1.0 / (1.0 - std::pow(rule.beta2, t));
        decision[kClip] = 1.0;
        for (int64_t i = 0; i < m; ++i) {
            backward[i] = rule.beta1 * ledger.weights[i];
            forward[i] = forward[i] == 0.0 ? 0.0 : forward[i] / bias[i] * unbiased;
            ledger.weights[i] = forward[i];
        }
    }
    std::copy(gramian.begin(), gramian.end(), ledger.gramian);
    std::copy(counts.begin(), counts.end(), ledger.counts);
    write(tier, threads, recorded.dtype, rule, decision.data(), pass);
    return Rule::kFinite;
}

}  // namespace fastconfig
