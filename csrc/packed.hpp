// The Gramian of many rows over a run of columns, where converting takes the ports that multiply.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.
//
// A panel of columns is converted once and transposed, so that a vector holds eight rows of one column: what it gains
// by a column is itself times one row's number, and a sum of a pair of rows is one lane, not a vector. So all sums and
// the panel stay in the first-level cache, where the tiles of gramian.hpp fetch both from the second.

#if FASTCONFIG_VECTOR_BYTES == 64

constexpr int64_t kPackedBytes = 32 << 10;   // of a panel, which shares the first-level cache with its rows and sums
constexpr int64_t kLeastPackedColumns = 64;  // else a tile's beginning and end outweigh it
constexpr int64_t kColumnsBeyond = 96;       // of a panel that lies in the second-level cache instead
constexpr int64_t kMostVectors = 5;          // of rows in a tile: with 4 others 20 sums, 5 + 1 registers beside them

inline int64_t packed_vectors(int64_t m) { return (m + kLanes - 1) / kLanes; }

// Doubles of a packed column: all vectors of rows, those behind the last row being 0.
inline int64_t packed_stride(int64_t m) { return packed_vectors(m) * kLanes; }

inline int64_t packed_columns(int64_t m) {
    const int64_t columns = kPackedBytes / (packed_stride(m) * sizeof(double)) / 16 * 16;
    return columns < kLeastPackedColumns ? kColumnsBeyond : columns;
}

// The elements numbered I of a and b together, a's first.
template <int... I, class V>
INLINE inline V pick(V a, V b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    typedef decltype(a < b) Indices;
    return __builtin_shuffle(a, b, Indices{I...});
#endif
}

// x[r][c] becomes x[c][r].
INLINE inline void transpose(Doubles (&x)[kLanes]) {
    Doubles two[kLanes], four[kLanes];  // of each row in a vector
    for (int i = 0; i < kLanes; i += 2) {
        two[i] = pick<0, 8, 2, 10, 4, 12, 6, 14>(x[i], x[i + 1]);
        two[i + 1] = pick<1, 9, 3, 11, 5, 13, 7, 15>(x[i], x[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4)
        for (int odd = 0; odd < 2; ++odd) {
            four[i + odd] = pick<0, 1, 4, 5, 8, 9, 12, 13>(two[i + odd], two[i + 2 + odd]);
            four[i + 2 + odd] = pick<2, 3, 6, 7, 10, 11, 14, 15>(two[i + odd], two[i + 2 + odd]);
        }
    for (int c = 0; c < 4; ++c) {
        x[c] = pick<0, 1, 4, 5, 8, 9, 12, 13>(four[c], four[c + 4]);
        x[c + 4] = pick<2, 3, 6, 7, 10, 11, 14, 15>(four[c], four[c + 4]);
    }
}

// A step of R ≤ kLanes rows, zeros instead of the others, to one vector of each of its packed columns.
template <class T, int R>
INLINE inline void pack_step(const typename T::Element* const* at, int64_t k, int64_t stride, double* to) {
    for (int part = 0; part < T::kParts; ++part) {
        Doubles x[kLanes] = {};
        for (int r = 0; r < R; ++r) x[r] = T::load(at[r] + k, part);
        transpose(x);
        for (int c = 0; c < kLanes; ++c) store_raw(to + (part * kLanes + c) * stride, x[c]);
    }
}

// All steps of a panel, the last with zeros behind its end.
template <class T, int R>
void pack(const void* const* rows, Columns columns, int64_t stride, double* to) {
    typedef typename T::Element Element;
    const Element* p[R];
    for (int r = 0; r < R; ++r) p[r] = static_cast<const Element*>(rows[r]) + columns.first;
    int64_t k = 0;
    for (; k + kStep<T> <= columns.count; k += kStep<T>) pack_step<T, R>(p, k, stride, to + k * stride);
    if (const int64_t left = columns.count - k; left > 0) {
        Element tail[R][kStep<T>] = {};
        const Element* padded[R];
        for (int r = 0; r < R; ++r) {
            __builtin_memcpy(tail[r], p[r] + k, left * sizeof(Element));
            padded[r] = tail[r];
        }
        pack_step<T, R>(padded, 0, stride, to + k * stride);
    }
}

template <class T>
void pack(const void* const* rows, int64_t count, Columns columns, int64_t stride, double* to) {
    switch (count) {
        case 1: return pack<T, 1>(rows, columns, stride, to);
        case 2: return pack<T, 2>(rows, columns, stride, to);
        case 3: return pack<T, 3>(rows, columns, stride, to);
        case 4: return pack<T, 4>(rows, columns, stride, to);
        case 5: return pack<T, 5>(rows, columns, stride, to);
        case 6: return pack<T, 6>(rows, columns, stride, to);
        case 7: return pack<T, 7>(rows, columns, stride, to);
        default: return pack<T, 8>(rows, columns, stride, to);
    }
}

// sums (B × V vectors) += Σ over packed columns, B rows j times V vectors of rows i.
template <int V, int B>
void outer(const double* i, const double* j, int64_t columns, int64_t stride, double* sums) {
    Doubles acc[B * V];
#pragma GCC unroll 24
    for (int e = 0; e < B * V; ++e) acc[e] = load_raw<Doubles>(sums + e * kLanes);
    for (int64_t k = 0; k < columns; ++k, i += stride, j += stride) {
        Doubles x[V];
        for (int v = 0; v < V; ++v) x[v] = load_raw<Doubles>(i + v * kLanes);
        for (int b = 0; b < B; ++b) {
            const Doubles y = {j[b], j[b], j[b], j[b], j[b], j[b], j[b], j[b]};
            for (int v = 0; v < V; ++v) acc[b * V + v] += x[v] * y;
        }
    }
#pragma GCC unroll 24
    for (int e = 0; e < B * V; ++e) store_raw(sums + e * kLanes, acc[e]);
}

typedef void (*Outer)(const double* i, const double* j, int64_t columns, int64_t stride, double* sums);

// By how many vectors; up to three meet eight rows, more of them four.
constexpr Outer kOuter[] = {nullptr, outer<1, 8>, outer<2, 8>, outer<3, 8>, outer<4, 4>, outer<5, 4>};

// Cuts the lower triangle of `vectors` vectors of rows into tiles: calls tile(v, count, j, rows) for the products of
// `count` vectors, from the v-th on, with so many rows from j on.
template <class Tile>
inline void for_each_outer(int64_t vectors, Tile tile) {
    for (int64_t from = 0; from < vectors; ++from) {
        const int64_t left = vectors - from, tiles = (left + kMostVectors - 1) / kMostVectors;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t v = from + t * left / tiles, count = from + (t + 1) * left / tiles - v;
            const int64_t rows = count <= 3 ? 8 : 4;
            for (int64_t j = from * kLanes; j < (from + 1) * kLanes; j += rows) tile(v, count, j, rows);
        }
    }
}

// Doubles of scratch: the sums, a panel, and what aligns them.
inline int64_t packed_scratch_size(int64_t m) {
    const int64_t stride = packed_stride(m);
    return stride * stride + stride * packed_columns(m) + kLanes;
}

template <class T>
void packed_gramian(const void* const* row, int64_t m, Columns columns, double* partial, double* scratch) {
    const int64_t vectors = packed_vectors(m), stride = packed_stride(m);
    double* const sums = reinterpret_cast<double*>((reinterpret_cast<uintptr_t>(scratch) + sizeof(Doubles) - 1) /
                                                   sizeof(Doubles) * sizeof(Doubles));
    double* const packed = sums + stride * stride;
    __builtin_memset(sums, 0, stride * stride * sizeof *sums);
    int64_t tiles = 0;
    for_each_outer(vectors, [&](int64_t, int64_t, int64_t, int64_t) { ++tiles; });
    by_panels<T>(row, m, columns, packed_columns(m), tiles, [&](Columns panel, auto fetch) {
        for (int64_t v = 0; v < vectors; ++v)
            pack<T>(row + v * kLanes, at_most(m - v * kLanes, kLanes), panel, stride, packed + v * kLanes);
        const int64_t count = (panel.count + kStep<T> - 1) / kStep<T> * kStep<T>;
        double* at = sums;
        for_each_outer(vectors, [&](int64_t v, int64_t many, int64_t j, int64_t rows) {
            fetch();
            kOuter[many](packed + v * kLanes, packed + j, count, stride, at);
            at += rows * many * kLanes;
        });
    });
    const double* at = sums;
    for_each_outer(vectors, [&](int64_t v, int64_t many, int64_t first, int64_t rows) {
        for (int64_t j = first; j < first + rows; ++j)
            for (int64_t i = v * kLanes; i < (v + many) * kLanes; ++i, ++at)
                if (j <= i && i < m) partial[packed_size(i) + j] = *at;
    });
}

// From this many rows on, where what the last vector's zeros cost is no more than 40 % (not for 33 to 36 rows, or 41 to
// 43): else gramian.hpp's tiles are as quick.
constexpr int64_t kPackedRows = 32;
inline bool packs(int64_t m) {
    const int64_t vectors = packed_vectors(m), done = kLanes * kLanes * vectors * (vectors + 1), wanted = m * (m + 1);
    return FASTCONFIG_PACKS && m >= kPackedRows && 5 * done <= 7 * wanted;
}

inline int64_t gramian_scratch_size(int64_t m) { return packs(m) ? packed_scratch_size(m) : scratch_size(m); }

template <class T>
void gramian(const void* const* row, int64_t m, Columns columns, double* partial, double* scratch) {
    return (packs(m) ? packed_gramian<T> : tiled_gramian<T>)(row, m, columns, partial, scratch);
}

#else

inline int64_t gramian_scratch_size(int64_t m) { return scratch_size(m); }

template <class T>
void gramian(const void* const* row, int64_t m, Columns columns, double* partial, double* scratch) {
    tiled_gramian<T>(row, m, columns, partial, scratch);
}

#endif
