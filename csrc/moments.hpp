// M-ConFIG's two passes over a run of columns: one that looks, one that writes.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.
//
// S is the state's type, float or double; P, no wider, the gradients' and parameters'. What is of type P is made S a
// strip at a time, in the first-level cache, so that every loop that follows is written once.

#if FASTCONFIG_VECTOR_BYTES == 64
constexpr int kMixed = 8;  // averages added side by side, each with two weights in registers
#else
constexpr int kMixed = 4;
#endif

constexpr int kLine = 8;  // averages that one new average is multiplied by side by side

constexpr int64_t kLinePanel = 2048;  // columns of that one which stay in the first-level cache meanwhile

constexpr int64_t kMomentumStrip = 512;  // columns whose two sums stay in the first-level cache while rows pass

// The new average, as it is stored.
template <class S>
INLINE inline typename S::Vector blended(Doubles old, Doubles gradient, Doubles keep, Doubles enter) {
    return S::pack(keep * old + enter * gradient);
}

// Calls step(k, whole, left) for each vector of S: whole ones first, then one of `left` elements.
template <class Step>
INLINE inline void for_each_vector_of(int64_t count, Step step) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) step(k, static_cast<int64_t>(kLanes));
    if (k < count) step(k, count - k);
}

// The vector at p, zeros after its first `count` elements; as it lies there, or in doubles.
template <class S>
INLINE inline typename S::Vector load_packed(const typename S::Element* p, int64_t count) {
    if (count == kLanes) return load_raw<typename S::Vector>(p);
    typename S::Vector v = {};
    __builtin_memcpy(&v, p, count * sizeof *p);
    return v;
}

template <class S>
INLINE inline Doubles load_some(const typename S::Element* p, int64_t count) {
    return S::unpack(load_packed<S>(p, count));
}

template <class S>
INLINE inline void store_packed(typename S::Element* p, typename S::Vector v, int64_t count) {
    if (count == kLanes) return store_raw(p, v);
    __builtin_memcpy(p, &v, count * sizeof *p);
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

// A strip's part in an average with a new gradient.
template <class S>
struct NewRow {
    typename S::Element* average;
    const typename S::Element* gradient;
    double keep, enter, forward, backward;
    bool store;  // the new average, too
};

// x ← x/(√(v·unbias) + ε), of a vector.
template <class V>
INLINE inline V divided(V x, V v, V unbias, V eps) {
    return x / (root(v * unbias) + eps);
}

// Of two: a register that holds both takes no longer than one.
template <class V>
INLINE inline void divide(V* x, const V* v, V unbias, V eps) {
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 32
    if constexpr (sizeof(V) == 16) {
        typedef float Both __attribute__((vector_size(32)));
        const auto both = [](V low, V high) INLINE { return (Both)_mm256_set_m128((__m128)high, (__m128)low); };
        const Both quotient = divided(both(x[0], x[1]), both(v[0], v[1]), both(unbias, unbias), both(eps, eps));
        x[0] = (V)_mm256_castps256_ps128((__m256)quotient);
        x[1] = (V)_mm256_extractf128_ps((__m256)quotient, 1);
        return;
    }
#endif
    for (int i = 0; i < 2; ++i) x[i] = divided(x[i], v[i], unbias, eps);
}

// A strip's new average into `fresh`, which may be where the old one lies.
template <class S>
void blend(const typename S::Element* old, const typename S::Element* gradient, int64_t count, double keep_,
           double enter_, typename S::Element* fresh) {
    const Doubles keep = Doubles{} + keep_, enter = Doubles{} + enter_;
    for_each_vector_of(count, [&](int64_t k, int64_t left) INLINE {
        const Doubles x = load_some<S>(old + k, left), g = load_some<S>(gradient + k, left);
        store_packed<S>(fresh + k, blended<S>(x, g, keep, enter), left);
    });
}

// The products of a panel of one new average with C others, added to as many vectors of sums; where New, the average is
// formed on the way, its square joins the sums before theirs, and it is kept where `fresh` is given.
template <class S, bool New, int C>
void line(const NewRow<S>& row, const void* const* others, int64_t count, typename S::Element* fresh, double* sums) {
    constexpr int terms = C + New;
    constexpr int chains = 2 * terms + C + 2 <= kRegisters ? 2 : 1;  // few sums alone would wait for each other's FMA
    const typename S::Element* p[C + 1];
    Doubles acc[chains][terms] = {};
    for (int c = 0; c < C; ++c) p[c] = static_cast<const typename S::Element*>(others[c]);
    const Doubles keep = Doubles{} + row.keep, enter = Doubles{} + row.enter;
    const auto add = [&](int64_t k, int64_t left, int chain) INLINE {
        Doubles x;
        if (New) {
            const Doubles old = load_some<S>(row.average + k, left), gradient = load_some<S>(row.gradient + k, left);
            const auto stored = blended<S>(old, gradient, keep, enter);
            if (fresh != nullptr) store_packed<S>(fresh + k, stored, left);
            x = S::unpack(stored);
            acc[chain][0] += x * x;
        } else {
            x = load_some<S>(fresh + k, left);
        }
        for (int c = 0; c < C; ++c) {
            if (C == kLine && chain == 0) __builtin_prefetch(p[c] + k + kLinePanel, 0, 2);
            acc[chain][New + c] += x * load_some<S>(p[c] + k, left);
        }
    };
    int64_t k = 0;
    for (; k + chains * kLanes <= count; k += chains * kLanes)
        for (int chain = 0; chain < chains; ++chain) add(k + chain * kLanes, kLanes, chain);
    for (; k < count; k += kLanes) add(k, at_most(count - k, kLanes), 0);
    for (int e = 0; e < terms; ++e) {
        Doubles total = load_raw<Doubles>(sums + e * kLanes) + acc[0][e];
        if (chains == 2) total += acc[chains - 1][e];
        store_raw(sums + e * kLanes, total);
    }
}

// The line of `others` rows, for up to kLine.
template <class S, bool New, int C = kLine, class... Rest>
void line_of(int64_t others, Rest&&... rest) {
    if constexpr (C > 0)
        if (others < C) return line_of<S, New, C - 1>(others, rest...);
    if constexpr (C + New > 0) line<S, New, C>(rest...);
}

// The products where one average of the m is new: partial (m).
template <class S, class P>
void products_of_one(const MomentumRows& rows, Columns columns, double* partial, double* scratch) {
    typedef typename S::Element Element;
    const int64_t m = rows.m, last = columns.first + columns.count;
    double* sums = scratch;
    __builtin_memset(sums, 0, m * kLanes * sizeof *sums);
    const void** at = reinterpret_cast<const void**>(sums + m * kLanes);
    alignas(64) Element room[kLinePanel], kept[kLinePanel];
    for (int64_t first = columns.first; first < last; first += kLinePanel) {
        const Columns panel = {first, at_most(last - first, kLinePanel)};
        for (int64_t i = 0; i < m; ++i) at[i] = column_of<S>(rows.average[i], first);
        const NewRow<S> row = {column_of<S>(rows.average[0], first),
                               in_state_type<S, P>(rows.gradient[0], panel, room),
                               rows.keep,
                               rows.enter[0],
                               0.0,
                               0.0,
                               false};
        Element* fresh = m - 1 > kLine ? kept : nullptr;
        const int64_t beside = at_most(m - 1, kLine);
        line_of<S, true>(beside, row, at + 1, panel.count, fresh, sums);
        for (int64_t j = 1 + beside; j < m; j += kLine)
            line_of<S, false>(at_most(m - j, kLine), row, at + j, panel.count, fresh, sums + j * kLanes);
    }
    for (int64_t j = 0; j < m; ++j) partial[j] = sum(load_raw<Doubles>(sums + j * kLanes));
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
void products_of_several(const MomentumRows& rows, Columns columns, double* partial, double* scratch) {
    typedef typename S::Element Element;
    const int64_t m = rows.m, k = rows.k, last = columns.first + columns.count;
    const int64_t width = panel_columns(m + k, sizeof(Element));
    double* sums = scratch;
    __builtin_memset(sums, 0, new_sums_size(m, k) * sizeof *sums);
    const void** at = reinterpret_cast<const void**>(sums + new_sums_size(m, k));
    Element* fresh = reinterpret_cast<Element*>((reinterpret_cast<uintptr_t>(at + m) + 63) & ~uintptr_t{63});
    Element* room = fresh + k * width;
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
            blend<S>(old, gradient, panel.count, rows.keep, rows.enter[i], target);
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

template <class S, class P>
void momentum_products(const MomentumRows& rows, Columns columns, double* partial, double* scratch) {
    return (rows.k == 1 ? products_of_one<S, P> : products_of_several<S, P>)(rows, columns, partial, scratch);
}

// What a strip's columns sum up to: f_t = Σ forward_i m_i, and f_t - β₁ f_{t-1}, which is (1 - β₁) q.
struct Sums {
    alignas(64) double f[kMomentumStrip];
    alignas(64) double difference[kMomentumStrip];
};

// Where a strip's second moments and parameters lie.
template <class S>
struct Place {
    typename S::Element *second, *theta;
    const MomentumGroup* group;
};

constexpr int kUnfinished = 0, kWritten = 1, kMeasured = 2;

// One sweep over a strip: the sums begin with a row that has a new gradient (Begin, New), or go on; R averages that
// stay join them; then they are kept (kUnfinished), make second moments and parameters (kWritten), or Σ update², which
// is returned (kMeasured). Few rows need one sweep, in which no sum leaves the registers.
template <class S, bool Begin, bool New, int R, int End>
double sweep(int64_t count, Sums& sums, const NewRow<S>& row, const MomentumUpdate& update, int64_t first_old,
             int64_t column, const Place<S>& place) {
    typedef typename S::Vector Vector;
    typedef typename S::Element Element;
    const Element* p[R + 1];
    Doubles old_forward[R + 1], old_mixed[R + 1];
    for (int i = 0; i < R; ++i) {
        p[i] = column_of<S>(update.old[first_old + i], column);
        old_forward[i] = Doubles{} + update.old_forward[first_old + i];
        old_mixed[i] = Doubles{} + update.old_mixed[first_old + i];
    }
    const Doubles keep = Doubles{} + row.keep, enter = Doubles{} + row.enter;
    const Doubles forward = Doubles{} + row.forward, backward = Doubles{} + row.backward;
    const Doubles keep_second = Doubles{} + update.beta2, enter_second = Doubles{} + update.enter_second;
    const Doubles gradient = Doubles{} + update.gradient;
    const Vector unbias = Vector{} + static_cast<Element>(update.second_unbiased);
    const Vector eps = Vector{} + static_cast<Element>(End ? place.group->eps : 0.0);
    const Vector decay = Vector{} + static_cast<Element>(End ? place.group->decay : 0.0);
    const Vector rate = Vector{} + static_cast<Element>(End ? place.group->rate * update.clip : 0.0);
    // Copies in registers: a store to a row might else change the address that it is told by.
    Element *const average = row.average, *const second = place.second, *const theta = place.theta;
    const Element* const entering = row.gradient;
    const bool store = row.store;
    Doubles square = {};
    // The sums of a vector of columns, whose second moment is written, too; what is left to do is to divide.
    const auto add = [&](int64_t k, int64_t left, Doubles& f, Vector& stored) INLINE {
        Doubles difference;
        if (!Begin) {
            f = load_raw<Doubles>(sums.f + k);
            difference = load_raw<Doubles>(sums.difference + k);
        }
        if (New) {
            const Doubles old = load_some<S>(average + k, left);
            const Vector fresh = blended<S>(old, load_some<S>(entering + k, left), keep, enter);
            if (store) store_packed<S>(average + k, fresh, left);
            const Doubles added = forward * S::unpack(fresh);
            f = Begin ? added : f + added;
            difference = (Begin ? added : difference + added) - backward * old;
        }
        for (int i = 0; i < R; ++i) {
            const Doubles x = load_some<S>(p[i] + k, left);
            f += old_forward[i] * x;
            difference += old_mixed[i] * x;
        }
        if (End == kUnfinished) {
            store_raw(sums.f + k, f);
            store_raw(sums.difference + k, difference);
            return;
        }
        const Doubles v = keep_second * load_some<S>(second + k, left) + enter_second * (difference * difference);
        stored = S::pack(v);
        if (End == kWritten) store_packed<S>(second + k, stored, left);
    };
    const auto write = [&](int64_t k, int64_t left, Vector step) INLINE {
        if (End == kMeasured) {
            Doubles wide = S::unpack(step);
            for (int64_t lane = left; lane < kLanes; ++lane) wide[lane] = 0.0;  // with ε = 0 it is 0/0
            square += wide * wide;
        } else {
            // What is added is small and rounded for itself, so the parameter is rounded once.
            const Vector old = load_packed<S>(theta + k, left);
            store_packed<S>(theta + k, old + (rate * step - decay * old), left);
        }
    };
    int64_t k = 0;
    for (; k + 2 * kLanes <= count; k += 2 * kLanes) {
        Doubles f[2];
        Vector stored[2];
        for (int i = 0; R == kMixed && i < R; ++i) __builtin_prefetch(p[i] + k + kMomentumStrip, 0, 2);
        for (int half = 0; half < 2; ++half) add(k + half * kLanes, kLanes, f[half], stored[half]);
        if (End == kUnfinished) continue;
        Vector step[2] = {S::pack(gradient * f[0]), S::pack(gradient * f[1])};
        divide(step, stored, unbias, eps);
        for (int half = 0; half < 2; ++half) write(k + half * kLanes, kLanes, step[half]);
    }
    for (; k < count; k += kLanes) {
        const int64_t left = at_most(count - k, kLanes);
        Doubles f;
        Vector stored;
        add(k, left, f, stored);
        if (End == kUnfinished) continue;
        write(k, left, divided(S::pack(gradient * f), stored, unbias, eps));
    }
    return End == kMeasured ? sum(square) : 0.0;
}

// The sweep of R rows, for R up to kMixed.
template <class S, bool Begin, bool New, int End, int R = kMixed, class... Rest>
double sweep_of(int64_t rows, Rest&&... rest) {
    if constexpr (R > 0)
        if (rows < R) return sweep_of<S, Begin, New, End, R - 1>(rows, rest...);
    return sweep<S, Begin, New, R, End>(rest...);
}

// All rows of a strip, and then its end.
template <class S, int End, class NewRowOf>
double sweep_all(const MomentumRows& rows, NewRowOf new_row, const MomentumUpdate& update, Columns strip,
                 const Place<S>& place) {
    const int64_t count = strip.count, column = strip.first;
    Sums sums;
    if (rows.k == 1 && update.old_count <= kMixed)
        return sweep_of<S, true, true, End>(update.old_count, count, sums, new_row(0), update, 0, column, place);
    for (int64_t i = 0; i < rows.k; ++i) {
        const NewRow<S> row = new_row(i);
        const bool ends = i == rows.k - 1 && update.old_count == 0;
        const auto one = i == 0 ? ends ? sweep<S, true, true, 0, End> : sweep<S, true, true, 0, kUnfinished>
                         : ends ? sweep<S, false, true, 0, End>
                                : sweep<S, false, true, 0, kUnfinished>;
        const double square = one(count, sums, row, update, 0, column, place);
        if (ends) return square;
    }
    int64_t i = 0;
    for (; update.old_count - i > kMixed; i += kMixed)
        sweep<S, false, false, kMixed, kUnfinished>(count, sums, {}, update, i, column, place);
    return sweep_of<S, false, false, End>(update.old_count - i, count, sums, NewRow<S>{}, update, i, column, place);
}

// Stores a strip's new averages, and no more.
template <class S, class NewRowOf>
void store_new_rows(const MomentumRows& rows, NewRowOf new_row, int64_t count) {
    for (int64_t i = 0; i < rows.k; ++i) {
        const NewRow<S> row = new_row(i);
        blend<S>(row.average, row.gradient, count, row.keep, row.enter, row.average);
    }
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
    alignas(64) Element room[kMomentumStrip], gathered[kMomentumStrip];
    double square = 0.0;
    for (int64_t first = columns.first; first < last; first += kMomentumStrip) {
        const Columns strip = {first, at_most(last - first, kMomentumStrip)};
        const auto new_row = [&](int64_t i) {
            return NewRow<S>{column_of<S>(rows.average[i], first),
                             in_state_type<S, P>(rows.gradient[i], strip, room),
                             rows.keep,
                             rows.enter[i],
                             update.forward[i],
                             update.backward[i],
                             !update.measure};
        };
        if (group == nullptr) {
            store_new_rows<S>(rows, new_row, strip.count);
            continue;
        }
        while (piece->first + piece->count <= first) ++piece;
        Element* second = column_of<S>(update.second, first);
        if (update.measure) {
            square += sweep_all<S, kMeasured>(rows, new_row, update, strip, {second, nullptr, group});
            continue;
        }
        const bool whole = same && first + strip.count <= piece->first + piece->count;
        Element* theta = whole ? static_cast<Element*>(piece->values) + (first - piece->first) : gathered;
        if (group->assign) {
            __builtin_memset(theta, 0, strip.count * sizeof *theta);  // so that nothing is read
        } else if (!whole) {
            gather<S, P>(piece, strip, theta);
        }
        sweep_all<S, kWritten>(rows, new_row, update, strip, {second, theta, group});
        if (!whole) scatter<S, P>(piece, strip, theta);
    }
    return square;
}
