// The Gramian of a run of columns.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.
//
// Tiles of at most kTileRows × kTileCols pairs, whose sums stay in registers while a panel of columns passes. Elements
// become doubles as they are loaded, in every tile anew: most processors convert on other ports than they multiply, and
// a panel converted once into the cache measured slower (bench/README.md). For the others there is packed.hpp.

#if FASTCONFIG_VECTOR_BYTES == 64
constexpr int kRegisters = 32, kTileRows = 6, kTileCols = 4;  // 24 sums + 4 + 1
#else
constexpr int kRegisters = 16, kTileRows = 4, kTileCols = 3;  // 12 sums + 3 + 1
#endif

constexpr int64_t kLeastColumns = 64;
constexpr int64_t kMostColumns = 1024;
constexpr int64_t kPanelBytes = 1 << 17;  // of rows: this panel and the next fit the second-level cache

constexpr int64_t at_most(int64_t value, int64_t bound) { return value < bound ? value : bound; }

inline int64_t panel_columns(int64_t m, int64_t element) {
    const int64_t columns = at_most(kPanelBytes / (m * element) / kLeastColumns * kLeastColumns, kMostColumns);
    return columns < kLeastColumns ? kLeastColumns : columns;
}

// The lower triangle cut into bands of rows as equal as can be; of each band, tiles as equal as can be left of the
// diagonal, then the triangle on it. tile(i, rows, j, cols, sums) and triangle(i, rows, sums) get their vector sums'
// place.
template <class Tile, class Triangle>
inline void for_each_tile(int64_t m, double* sums, Tile tile, Triangle triangle) {
    const int64_t bands = (m + kTileRows - 1) / kTileRows;
    for (int64_t b = 0; b < bands; ++b) {
        const int64_t i = b * m / bands, rows = (b + 1) * m / bands - i;
        const int64_t tiles = (i + kTileCols - 1) / kTileCols;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t j = t * i / tiles, cols = (t + 1) * i / tiles - j;
            tile(i, rows, j, cols, sums);
            sums += rows * cols * kLanes;
        }
        triangle(i, rows, sums);
        sums += packed_size(rows) * kLanes;
    }
}

// Doubles of scratch: a vector of sums for each pair.
inline int64_t scratch_size(int64_t m) { return packed_size(m) * kLanes; }

// Calls add(at, k, part, chain) for every vector of R rows, `at` being their addresses. Neighbouring steps go to
// different chains of sums, or the parts of one step do. A last short step is a copy padded with zeros, which add
// nothing. With one chain, one part follows the other: side by side, they would not fit the registers.
template <class T, int R, int Chains, class Add>
inline void for_each_vector(const void* const* rows, Columns columns, Add add) {
    typedef typename T::Element Element;
    const Element* p[R];
    Element tail[R][kStep<T>] = {};
    const Element* padded[R];
    const int64_t left = columns.count % kStep<T>, whole = columns.count - left;
    for (int i = 0; i < R; ++i) {
        p[i] = static_cast<const Element*>(rows[i]) + columns.first;
        if (left > 0) __builtin_memcpy(tail[i], p[i] + whole, left * sizeof(Element));
        padded[i] = tail[i];
    }
    if constexpr (T::kParts == 2 && Chains == 2) {
        for (int64_t k = 0; k < whole; k += kStep<T>)
            for (int part = 0; part < 2; ++part) add(p, k, part, part);
    } else {
        for (int part = 0; part < T::kParts; ++part) {
            int64_t k = 0;
            for (; k + Chains * kStep<T> <= whole; k += Chains * kStep<T>)
                for (int chain = 0; chain < Chains; ++chain) add(p, k + chain * kStep<T>, part, chain);
            for (; k < whole; k += kStep<T>) add(p, k, part, 0);
        }
    }
    if (left > 0)
        for (int part = 0; part < T::kParts; ++part) add(padded, 0, part, 0);
}

// sums (R × C vectors) += the products, lane by lane, of the first R of R + C rows with the other C.
template <class T, int R, int C>
void tile(const void* const* rows, Columns columns, double* sums) {
    typedef typename T::Element Element;
    Doubles acc[R][C];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) acc[i][j] = load_raw<Doubles>(sums + (i * C + j) * kLanes);
    for_each_vector<T, R + C, 1>(rows, columns, [&acc](const Element* const* at, int64_t k, int part, int) INLINE {
        Doubles y[C];
        for (int j = 0; j < C; ++j) y[j] = T::load(at[R + j] + k, part);
        for (int i = 0; i < R; ++i) {
            const Doubles x = T::load(at[i] + k, part);
            for (int j = 0; j < C; ++j) acc[i][j] += x * y[j];
        }
    });
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) store_raw(sums + (i * C + j) * kLanes, acc[i][j]);
}

// sums (R(R+1)/2 vectors, packed) += the products of R rows with each other.
template <class T, int R>
void triangle(const void* const* rows, Columns columns, double* sums) {
    typedef typename T::Element Element;
    constexpr int pairs = packed_size(R);
    constexpr int chains = 2 * pairs + R <= kRegisters ? 2 : 1;  // few sums alone would wait for each other's FMA
    Doubles acc[chains][pairs] = {};
    for_each_vector<T, R, chains>(rows, columns, [&acc](const Element* const* at, int64_t k, int part, int c) INLINE {
        Doubles x[R];
        for (int i = 0; i < R; ++i) x[i] = T::load(at[i] + k, part);
        for (int i = 0, e = 0; i < R; ++i)
            for (int j = 0; j <= i; ++j, ++e) acc[c][e] += x[i] * x[j];
    });
    for (int e = 0; e < pairs; ++e) {
        Doubles total = load_raw<Doubles>(sums + e * kLanes) + acc[0][e];
        if (chains == 2) total += acc[chains - 1][e];
        store_raw(sums + e * kLanes, total);
    }
}

typedef void (*Product)(const void* const* rows, Columns columns, double* sums);

template <class T, int R>
Product tile_of(int64_t cols) {
    switch (cols) {
        case 1: return tile<T, R, 1>;
        case 2: return tile<T, R, 2>;
        case 3: return tile<T, R, 3>;
        default: return tile<T, R, kTileCols>;
    }
}

template <class T>
Product tile_of(int64_t rows, int64_t cols) {
    switch (rows) {
        case 1: return tile_of<T, 1>(cols);
        case 2: return tile_of<T, 2>(cols);
        case 3: return tile_of<T, 3>(cols);
        case 4: return tile_of<T, 4>(cols);
        case 5: return tile_of<T, at_most(5, kTileRows)>(cols);
        default: return tile_of<T, kTileRows>(cols);
    }
}

template <class T>
Product triangle_of(int64_t rows) {
    switch (rows) {
        case 1: return triangle<T, 1>;
        case 2: return triangle<T, 2>;
        case 3: return triangle<T, 3>;
        case 4: return triangle<T, 4>;
        case 5: return triangle<T, at_most(5, kTileRows)>;
        default: return triangle<T, kTileRows>;
    }
}

// From this many rows on, the processor's own prefetchers lose track of the streams, and the lines are fetched by hand.
constexpr int64_t kPrefetchedRows = 12;

// Fetches the next panel's lines into the second-level cache a few at a time while the tiles of this one are computed:
// without it, memory would idle during arithmetic and arithmetic during loads.
class Prefetcher {
    static constexpr int64_t kLine = 64;
    const void* const* row_;
    int64_t m_, first_byte_, lines_, row_at_ = 0, line_at_ = 0;

 public:
    Prefetcher(const void* const* row, int64_t m, Columns next, int64_t element)
        : row_(row), m_(m), first_byte_(next.first * element), lines_((next.count * element + kLine - 1) / kLine) {}

    int64_t total() const { return m_ * lines_; }

    void advance(int64_t count) {
        while (count > 0 && row_at_ < m_) {
            const char* p = static_cast<const char*>(row_[row_at_]) + first_byte_;
            for (; count > 0 && line_at_ < lines_; --count, ++line_at_) __builtin_prefetch(p + line_at_ * kLine, 0, 2);
            if (line_at_ == lines_) line_at_ = 0, ++row_at_;
        }
    }
};

// Calls work(panel, fetch) for one panel of `width` columns after the other; `fetch`, called for each of so many tiles,
// fetches the next.
template <class T, class Panel>
inline void by_panels(const void* const* row, int64_t m, Columns columns, int64_t width, int64_t tiles, Panel work) {
    constexpr int64_t element = sizeof(typename T::Element);
    const int64_t last = columns.first + columns.count;
    for (int64_t first = columns.first; first < last; first += width) {
        const Columns panel = {first, at_most(last - first, width)};
        const int64_t after = first + panel.count;
        Prefetcher prefetcher(row, m, {after, m < kPrefetchedRows ? 0 : at_most(last - after, width)}, element);
        const int64_t lines_a_tile = prefetcher.total() / tiles + 1;
        work(panel, [&] { prefetcher.advance(lines_a_tile); });
    }
}

template <class T>
void add_tiles(const void* const* row, int64_t m, Columns columns, double* sums) {
    const int64_t tiles = m * m / (2 * kTileRows * kTileCols) + 1;
    by_panels<T>(row, m, columns, panel_columns(m, sizeof(typename T::Element)), tiles, [&](Columns panel, auto fetch) {
        for_each_tile(
            m, sums,
            [&](int64_t i, int64_t rows, int64_t j, int64_t cols, double* at) {
                const void* tile_row[kTileRows + kTileCols];
                for (int64_t r = 0; r < rows; ++r) tile_row[r] = row[i + r];
                for (int64_t c = 0; c < cols; ++c) tile_row[rows + c] = row[j + c];
                fetch();
                tile_of<T>(rows, cols)(tile_row, panel, at);
            },
            [&](int64_t i, int64_t rows, double* at) { triangle_of<T>(rows)(row + i, panel, at); });
    });
}

template <class T>
void tiled_gramian(const void* const* row, int64_t m, Columns columns, double* partial, double* sums) {
    __builtin_memset(sums, 0, scratch_size(m) * sizeof *sums);
    add_tiles<T>(row, m, columns, sums);
    const auto put = [&](int64_t i, int64_t j, const double* at) {
        partial[packed_size(i) + j] = sum(load_raw<Doubles>(at));
    };
    for_each_tile(
        m, sums,
        [&](int64_t i, int64_t rows, int64_t j, int64_t cols, const double* at) {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < cols; ++c) put(i + r, j + c, at + (r * cols + c) * kLanes);
        },
        [&](int64_t i, int64_t rows, const double* at) {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c <= r; ++c) put(i + r, i + c, at + (packed_size(r) + c) * kLanes);
        });
}
