// M-ConFIG's two passes over a run of columns: one that looks, one that writes.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.
//
// S is the state's type, float or double; P, no wider, the gradients' and parameters'. What is of type P is made S a
// strip at a time, in the first-level cache, so that every loop that follows is written once.

constexpr int kMixed = 4;  // averages added side by side: each has two weights in registers

// The new average, rounded as it is stored.
template <class S>
INLINE inline Doubles blended(Doubles old, Doubles gradient, Doubles keep, Doubles enter) {
    return S::unpack(S::pack(keep * old + enter * gradient));
}

// Calls step(k, whole, left) for each vector of S: whole ones first, then one of `left` elements.
template <class Step>
INLINE inline void for_each_vector_of(int64_t count, Step step) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) step(k, static_cast<int64_t>(kLanes));
    if (k < count) step(k, count - k);
}

// The vector at p, zeros after its first `count` elements.
template <class S>
INLINE inline Doubles load_some(const typename S::Element* p, int64_t count) {
    if (count == kLanes) return S::load(p, 0);
    typename S::Element padded[kLanes] = {};
    __builtin_memcpy(padded, p, count * sizeof *p);
    return S::load(padded, 0);
}

template <class S>
INLINE inline void store_some(typename S::Element* p, Doubles value, int64_t count) {
    if (count == kLanes) return S::store(p, &value);
    typename S::Element padded[kLanes];
    S::store(padded, &value);
    __builtin_memcpy(p, padded, count * sizeof *p);
}

// A gradient's strip in S: where it lies, or a copy in `room`.
template <class S, class P>
inline const typename S::Element* in_state_type(const void* gradient, Columns columns, typename S::Element* room) {
    const typename P::Element* at = static_cast<const typename P::Element*>(gradient) + columns.first;
    if constexpr (sizeof(typename P::Element) == sizeof(typename S::Element)) {
        return at;
    } else {
        Convert<S, P>::widen(at, columns.count, room);
        return room;
    }
}

template <class S>
inline typename S::Element* column_of(void* average, int64_t first) {
    return static_cast<typename S::Element*>(average) + first;
}

// Tiles of pairs of the k new averages among themselves, then with the others; as for_each_tile.
template <class Tile, class Triangle>
inline void for_each_new_tile(int64_t m, int64_t k, double* sums, Tile tile, Triangle triangle) {
    for_each_tile(k, sums, tile, triangle);
    sums += scratch_size(k);
    const int64_t bands = (k + kTileRows - 1) / kTileRows, others = m - k;
    const int64_t tiles = (others + kTileCols - 1) / kTileCols;
    for (int64_t b = 0; b < bands; ++b) {
        const int64_t i = b * k / bands, rows = (b + 1) * k / bands - i;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t j = t * others / tiles, cols = (t + 1) * others / tiles - j;
            tile(i, rows, k + j, cols, sums);
            sums += rows * cols * kLanes;
        }
    }
}

inline int64_t new_sums_size(int64_t m, int64_t k) { return scratch_size(k) + k * (m - k) * kLanes; }

// Doubles of scratch: the sums, a panel of the k new averages and of one converted gradient, and m addresses.
inline int64_t momentum_scratch(int64_t m, int64_t k) {
    return new_sums_size(m, k) + (k + 1) * kMostColumns + m + 64 / sizeof(double);
}

template <class S, class P>
void momentum_products(const MomentumRows& rows, Columns columns, double* partial, double* scratch) {
    typedef typename S::Element Element;
    const int64_t m = rows.m, k = rows.k, last = columns.first + columns.count;
    const int64_t width = panel_columns(m + k, sizeof(Element));
    double* sums = scratch;
    __builtin_memset(sums, 0, new_sums_size(m, k) * sizeof *sums);
    const void** at = reinterpret_cast<const void**>(sums + new_sums_size(m, k));
    Element* fresh = reinterpret_cast<Element*>((reinterpret_cast<uintptr_t>(at + m) + 63) & ~uintptr_t{63});
    Element* room = fresh + k * width;
    const Doubles keep = Doubles{} + rows.keep;
    for (int64_t first = columns.first; first < last; first += width) {
        const Columns panel = {first, at_most(last - first, width)};
        const int64_t after = first + panel.count;
        Prefetcher prefetcher(rows.average, m, {after, m < kPrefetchedRows ? 0 : at_most(last - after, width)},
                              sizeof(Element));
        const int64_t lines_a_tile = prefetcher.total() * kTileRows * kTileCols / (m * k) + 1;
        for (int64_t i = 0; i < m; ++i) at[i] = column_of<S>(rows.average[i], first);
        for (int64_t i = 0; i < k; ++i) {
            const Element* old = static_cast<const Element*>(at[i]);
            const Element* gradient = in_state_type<S, P>(rows.gradient[i], panel, room);
            Element* target = fresh + i * width;
            const Doubles enter = Doubles{} + rows.enter[i];
            for_each_vector_of(panel.count, [&](int64_t e, int64_t left) INLINE {
                const Doubles x = load_some<S>(old + e, left), g = load_some<S>(gradient + e, left);
                store_some<S>(target + e, blended<S>(x, g, keep, enter), left);
            });
            at[i] = target;
        }
        for_each_new_tile(
            m, k, sums,
            [&](int64_t i, int64_t height, int64_t j, int64_t cols, double* to) {
                const void* tile_row[kTileRows + kTileCols];
                for (int64_t r = 0; r < height; ++r) tile_row[r] = at[i + r];
                for (int64_t c = 0; c < cols; ++c) tile_row[height + c] = at[j + c];
                prefetcher.advance(lines_a_tile);
                tile_of<S>(height, cols)(tile_row, {0, panel.count}, to);
            },
            [&](int64_t i, int64_t height, double* to) { triangle_of<S>(height)(at + i, {0, panel.count}, to); });
    }
    const auto put = [&](int64_t i, int64_t j, const double* from) {
        partial[i * m + j] = sum(load_raw<Doubles>(from));
        if (j < k) partial[j * m + i] = partial[i * m + j];
    };
    for_each_new_tile(
        m, k, sums,
        [&](int64_t i, int64_t height, int64_t j, int64_t cols, const double* from) {
            for (int64_t r = 0; r < height; ++r)
                for (int64_t c = 0; c < cols; ++c) put(i + r, j + c, from + (r * cols + c) * kLanes);
        },
        [&](int64_t i, int64_t height, const double* from) {
            for (int64_t r = 0; r < height; ++r)
                for (int64_t c = 0; c <= r; ++c) put(i + r, i + c, from + (packed_size(r) + c) * kLanes);
        });
}

// What a strip's columns sum up to: f_t = Σ forward_i m_i, and f_t - β₁ f_{t-1}, which is (1 - β₁) q.
struct Sums {
    alignas(64) double f[kStrip];
    alignas(64) double difference[kStrip];
};

// Starts or continues the sums with a row that has a new gradient, and stores its new average where told to.
template <class S, bool First>
void add_new_row(typename S::Element* average, const typename S::Element* gradient, int64_t count, double keep_,
                 double enter_, double forward_, double backward_, bool store, Sums& sums) {
    const Doubles keep = Doubles{} + keep_, enter = Doubles{} + enter_;
    const Doubles forward = Doubles{} + forward_, backward = Doubles{} + backward_;
    for_each_vector_of(count, [&](int64_t k, int64_t left) INLINE {
        const Doubles old = load_some<S>(average + k, left);
        const Doubles fresh = blended<S>(old, load_some<S>(gradient + k, left), keep, enter);
        if (store) store_some<S>(average + k, fresh, left);
        Doubles f = forward * fresh, difference = f - backward * old;
        if (!First) {
            f += load_raw<Doubles>(sums.f + k);
            difference += load_raw<Doubles>(sums.difference + k);
        }
        store_raw(sums.f + k, f);
        store_raw(sums.difference + k, difference);
    });
}

// Adds R rows whose averages stay: sums.f += Σ forward_i m_i, sums.difference += Σ (forward_i - backward_i) m_i.
template <class S, int R>
void add_old_rows(void* const* average, const double* forward, const double* mixed, Columns columns, Sums& sums) {
    const typename S::Element* p[R];
    Doubles f_weight[R], d_weight[R];
    for (int i = 0; i < R; ++i) {
        p[i] = column_of<S>(average[i], columns.first);
        f_weight[i] = Doubles{} + forward[i];
        d_weight[i] = Doubles{} + mixed[i];
    }
    for_each_vector_of(columns.count, [&](int64_t k, int64_t left) INLINE {
        Doubles f = load_raw<Doubles>(sums.f + k), difference = load_raw<Doubles>(sums.difference + k);
        for (int i = 0; i < R; ++i) {
            const Doubles x = load_some<S>(p[i] + k, left);
            f += f_weight[i] * x;
            difference += d_weight[i] * x;
        }
        store_raw(sums.f + k, f);
        store_raw(sums.difference + k, difference);
    });
}

template <class S>
void add_all_old_rows(const MomentumUpdate& update, Columns columns, Sums& sums) {
    int64_t i = 0;
    const auto add = [&](auto adder, int64_t rows) {
        adder(update.old + i, update.old_forward + i, update.old_mixed + i, columns, sums);
        i += rows;
    };
    while (update.old_count - i >= kMixed) add(add_old_rows<S, kMixed>, kMixed);
    switch (update.old_count - i) {
        case 1: return add(add_old_rows<S, 1>, 1);
        case 2: return add(add_old_rows<S, 2>, 2);
        case 3: return add(add_old_rows<S, 3>, 3);
        default: return;
    }
}

// Second moment and parameters of a strip from its sums. Returns Σ update², unscaled, where Measure, and then writes
// nothing.
template <class S, bool Measure>
double finish(const Sums& sums, const MomentumUpdate& update, const MomentumGroup& group, int64_t count,
              typename S::Element* second, typename S::Element* theta) {
    typedef typename S::Vector Vector;
    typedef typename S::Element Element;
    const Doubles keep = Doubles{} + update.beta2, enter = Doubles{} + update.enter_second;
    const Doubles gradient = Doubles{} + update.gradient;
    const Vector unbias = Vector{} + static_cast<Element>(update.second_unbiased);
    const Vector eps = Vector{} + static_cast<Element>(group.eps);
    const Doubles stay = Doubles{} + group.stay, rate = Doubles{} + group.rate * update.clip;
    Doubles square = {};
    for_each_vector_of(count, [&](int64_t k, int64_t left) INLINE {
        const Doubles difference = load_raw<Doubles>(sums.difference + k);
        const Doubles v = keep * load_some<S>(second + k, left) + enter * (difference * difference);
        const Vector stored = S::pack(v);
        const Vector step = S::pack(gradient * load_raw<Doubles>(sums.f + k)) / (root(stored * unbias) + eps);
        if (Measure) {
            Doubles wide = S::unpack(step);
            for (int64_t lane = left; lane < kLanes; ++lane) wide[lane] = 0.0;  // 0/0 with ε = 0
            square += wide * wide;
            return;
        }
        store_some<S>(second + k, S::unpack(stored), left);
        store_some<S>(theta + k, stay * load_some<S>(theta + k, left) + rate * S::unpack(step), left);
    });
    return Measure ? sum(square) : 0.0;
}

// Reads or writes the parameters of a strip, which may be spread over several pieces, the first being `piece`.
template <class S, class P>
void gather(const MomentumPiece* piece, Columns columns, typename S::Element* theta) {
    for (int64_t done = 0; done < columns.count; ++piece) {
        const int64_t from = columns.first + done - piece->first;
        const int64_t count = at_most(piece->count - from, columns.count - done);
        Convert<S, P>::widen(static_cast<const typename P::Element*>(piece->values) + from, count, theta + done);
        done += count;
    }
}

template <class S, class P>
void scatter(const MomentumPiece* piece, Columns columns, const typename S::Element* theta) {
    for (int64_t done = 0; done < columns.count; ++piece) {
        const int64_t from = columns.first + done - piece->first;
        const int64_t count = at_most(piece->count - from, columns.count - done);
        Convert<S, P>::narrow(theta + done, count, static_cast<typename P::Element*>(piece->values) + from);
        done += count;
    }
}

template <class S, class P>
double momentum_update(const MomentumRows& rows, const MomentumUpdate& update, const MomentumGroup* group,
                       const MomentumPiece* piece, Columns columns) {
    typedef typename S::Element Element;
    constexpr bool same = sizeof(Element) == sizeof(typename P::Element);
    const int64_t last = columns.first + columns.count;
    const bool writes = !update.measure;
    Sums sums;
    alignas(64) Element room[kStrip], gathered[kStrip];
    double square = 0.0;
    for (int64_t first = columns.first; first < last; first += kStrip) {
        const Columns strip = {first, at_most(last - first, kStrip)};
        for (int64_t i = 0; i < rows.k; ++i) {
            const Element* gradient = in_state_type<S, P>(rows.gradient[i], strip, room);
            const auto add = i == 0 ? add_new_row<S, true> : add_new_row<S, false>;
            add(column_of<S>(rows.average[i], first), gradient, strip.count, rows.keep, rows.enter[i],
                update.forward[i], update.backward[i], writes, sums);
        }
        if (group == nullptr) continue;
        add_all_old_rows<S>(update, strip, sums);
        Element* second = column_of<S>(update.second, first);
        while (piece->first + piece->count <= first) ++piece;
        if (update.measure) {
            square += finish<S, true>(sums, update, *group, strip.count, second, nullptr);
            continue;
        }
        const bool whole = same && first + strip.count <= piece->first + piece->count;
        Element* theta = whole ? static_cast<Element*>(piece->values) + (first - piece->first) : gathered;
        if (group->assign) {
            __builtin_memset(theta, 0, strip.count * sizeof *theta);  // so that nothing is read
        } else if (!whole) {
            gather<S, P>(piece, strip, theta);
        }
        finish<S, false>(sums, update, *group, strip.count, second, theta);
        if (!whole) scatter<S, P>(piece, strip, theta);
    }
    return square;
}
