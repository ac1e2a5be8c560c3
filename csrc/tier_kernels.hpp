// The streaming kernels, once for every instruction set: included by each tier_*.cpp inside a namespace of its own,
// after it has switched its instruction set on, with
//   FASTCONFIG_VECTOR_BYTES   the width of a vector of doubles
//   FASTCONFIG_TIER_NAME      as FASTCONFIG_ISA spells it
//   FASTCONFIG_X86            1 where <immintrin.h>'s F16C and streaming stores may be used
// Vectors are the compiler's generic ones (GCC, Clang), so the arithmetic is written once and the baseline needs no
// intrinsics. No standard header may be included here: its inline functions would be compiled for this tier, and the
// linker could keep that copy for all.

constexpr int kLanes = FASTCONFIG_VECTOR_BYTES / 8;

typedef double Doubles __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES / 2)));
typedef uint16_t Halves __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES / 4)));

template <class V>
inline V load_raw(const void* source) {
    V v;
    __builtin_memcpy(&v, source, sizeof v);
    return v;
}

template <class V>
inline void store_raw(void* target, V v) {
    __builtin_memcpy(target, &v, sizeof v);
}

template <class To, class From>
inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

// GCC 12 lowers __builtin_convertvector between these two to halves and a shuffle, so x86 names its one instruction.
// (The masked AVX-512 forms, all lanes on, because the plain ones read an undefined register in GCC's header.)
inline Doubles widen(Floats f) {
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    return (Doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)f);
#elif FASTCONFIG_X86
    return (Doubles)_mm256_cvtps_pd((__m128)f);
#else
    return __builtin_convertvector(f, Doubles);
#endif
}

inline Floats narrow(Doubles d) {
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    return (Floats)_mm512_maskz_cvtpd_ps(0xff, (__m512d)d);
#elif FASTCONFIG_X86
    return (Floats)_mm256_cvtpd_ps((__m256d)d);
#else
    return __builtin_convertvector(d, Floats);
#endif
}

inline Words select(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }

// ---- element types: how kLanes of them become doubles, and how doubles become them ----

struct Float32 {
    typedef float Element;
    static Doubles load(const float* p) { return widen(load_raw<Floats>(p)); }
    static void store(float* p, Doubles v) { store_raw(p, narrow(v)); }
};

struct Float64 {
    typedef double Element;
    static Doubles load(const double* p) { return load_raw<Doubles>(p); }
    static void store(double* p, Doubles v) { store_raw(p, v); }
};

struct BFloat16 {
    typedef uint16_t Element;
    static Doubles load(const uint16_t* p) {
        Words wide = __builtin_convertvector(load_raw<Halves>(p), Words) << 16;
        return widen(bits<Floats>(wide));
    }
    // Round to nearest even on the float's upper half; a NaN keeps its sign and stays quiet.
    static void store(uint16_t* p, Doubles v) {
        Floats f = narrow(v);
        Words w = bits<Words>(f);
        Words rounded = (w + 0x7fff + ((w >> 16) & 1)) >> 16;
        Words quiet = (w >> 16) | 0x40;
        store_raw(p, __builtin_convertvector(select(bits<Words>(f != f), quiet, rounded), Halves));
    }
};

struct Float16 {
    typedef uint16_t Element;
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    static Doubles load(const uint16_t* p) {
        return widen((Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
    }
    static void store(uint16_t* p, Doubles v) {
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)narrow(v), _MM_FROUND_TO_NEAREST_INT));
    }
#elif FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 32
    static Doubles load(const uint16_t* p) { return widen((Floats)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p))); }
    static void store(uint16_t* p, Doubles v) {
        _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph((__m128)narrow(v), _MM_FROUND_TO_NEAREST_INT));
    }
#else
    // Exponent and mantissa move to the float's place, and a multiplication by 2^112 rebiases the exponent, subnormals
    // included. Inf and NaN, whose product is 2^16 or more, get the float's largest exponent.
    static Doubles load(const uint16_t* p) {
        Words h = __builtin_convertvector(load_raw<Halves>(p), Words);
        Words sign = (h & 0x8000) << 16;
        Floats magnitude = bits<Floats>((h & 0x7fff) << 13) * 0x1p112f;
        Words special = bits<Words>(magnitude >= 65536.0f) & 0x7f800000;
        return widen(bits<Floats>(bits<Words>(magnitude) | special | sign));
    }
    // Normal results: rebias the exponent and round the mantissa to nearest even by integer arithmetic, whose carry
    // runs into the exponent as it should. Subnormal results: adding 0.5, whose last bit is worth 2^-24, rounds by
    // itself.
    static void store(uint16_t* p, Doubles v) {
        Words w = bits<Words>(narrow(v));
        Words sign = (w >> 16) & 0x8000;
        Words magnitude = w & 0x7fffffff;
        Words normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        Words subnormal = bits<Words>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000u;
        Words half = select(bits<Words>(magnitude < 0x38800000u), subnormal, normal);
        half = select(bits<Words>(magnitude >= 0x47800000u), Words{} + 0x7c00u, half);
        half = select(bits<Words>(magnitude > 0x7f800000u), Words{} + 0x7e00u, half);
        store_raw(p, __builtin_convertvector(half | sign, Halves));
    }
#endif
};

// kLanes elements of which only `count` exist; the others read as zero, which adds nothing to any sum.
template <class T>
inline Doubles load_tail(const typename T::Element* p, int64_t count) {
    typename T::Element padded[kLanes] = {};
    __builtin_memcpy(padded, p, count * sizeof *p);
    return T::load(padded);
}

inline double sum(Doubles v) {
    double total = v[0];
    for (int lane = 1; lane < kLanes; ++lane) total += v[lane];
    return total;
}

// ---- gramian ----

// Up to four rows: every product of a column is formed in registers, straight from the rows.
template <class T, int M>
void gramian_few(const void* const* row, Columns columns, double* partial) {
    typedef typename T::Element Element;
    constexpr int pairs = M * (M + 1) / 2;
    constexpr int unroll = M == 1 ? 8 : M == 2 ? 4 : M == 3 ? 2 : 1;  // chains enough to hide an FMA's latency
    const Element* p[M];
    for (int i = 0; i < M; ++i) p[i] = static_cast<const Element*>(row[i]) + columns.first;

    Doubles acc[unroll][pairs] = {};
    int64_t k = 0;
    for (; k + unroll * kLanes <= columns.count; k += unroll * kLanes) {
        for (int u = 0; u < unroll; ++u) {
            Doubles x[M];
            for (int i = 0; i < M; ++i) x[i] = T::load(p[i] + k + u * kLanes);
            for (int i = 0, e = 0; i < M; ++i)
                for (int j = 0; j <= i; ++j, ++e) acc[u][e] += x[i] * x[j];
        }
    }
    for (; k < columns.count; k += kLanes) {
        int64_t left = columns.count - k;
        Doubles x[M];
        for (int i = 0; i < M; ++i) x[i] = left >= kLanes ? T::load(p[i] + k) : load_tail<T>(p[i] + k, left);
        for (int i = 0, e = 0; i < M; ++i)
            for (int j = 0; j <= i; ++j, ++e) acc[0][e] += x[i] * x[j];
    }
    for (int e = 0; e < pairs; ++e) {
        Doubles total = acc[0][e];
        for (int u = 1; u < unroll; ++u) total += acc[u][e];
        partial[e] = sum(total);
    }
}

// More rows: tiles of at most kTileRows × kTileCols pairs, whose sums stay in registers while a panel of columns
// passes. The tile's first rows are converted once a panel into a buffer of doubles that stays in the first-level
// cache; the others are converted as they are loaded, by execution ports that the multiplications leave free.
#if FASTCONFIG_VECTOR_BYTES == 64
constexpr int kTileRows = 6, kTileCols = 4;  // 24 sums + 4 + 1 of 32 registers
#else
constexpr int kTileRows = 4, kTileCols = 3;  // 12 sums + 3 + 1 of 16 registers
#endif

constexpr int64_t kLeastColumns = 64;
constexpr int64_t kMostColumns = 2048 / kTileRows / kLeastColumns * kLeastColumns;  // the buffer is at most 16 KiB
constexpr int64_t kBufferStride = kMostColumns + 8;  // rows a multiple of 4 KiB apart would share cache sets
constexpr int64_t kPanelBytes = 1 << 17;             // of rows: this panel and the next fit the second-level cache

constexpr int64_t at_most(int64_t value, int64_t bound) { return value < bound ? value : bound; }

inline int64_t panel_columns(int64_t m, int64_t element) {
    const int64_t columns = at_most(kPanelBytes / (m * element) / kLeastColumns * kLeastColumns, kMostColumns);
    return columns < kLeastColumns ? kLeastColumns : columns;
}

// The lower triangle cut into tiles as equal as can be: visit(i, rows) begins a band of rows, then
// visit(i, rows, j, cols, sums) follows for each of its tiles, with the tile's place among the vector sums.
template <class Band, class TileOf>
inline void for_each_tile(int64_t m, double* sums, Band band, TileOf tile_of) {
    const int64_t bands = (m + kTileRows - 1) / kTileRows;
    for (int64_t b = 0; b < bands; ++b) {
        const int64_t i = b * m / bands, end = (b + 1) * m / bands;
        const int64_t tiles = (end + kTileCols - 1) / kTileCols;
        band(i, end - i);
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t j = t * end / tiles, cols = (t + 1) * end / tiles - j;
            tile_of(i, end - i, j, cols, sums);
            sums += (end - i) * cols * kLanes;
        }
    }
}

// Doubles that the tiles' vector sums take: at most one tile more than the triangle in each direction.
inline int64_t sums_size(int64_t m) { return (m + kTileRows) * (m + kTileRows + kTileCols) * kLanes; }

inline int64_t scratch_size(int64_t m) { return m <= 4 ? 0 : kTileRows * kBufferStride + sums_size(m); }

// Converts `count` columns of `rows` rows, padded with zeros to whole vectors.
template <class T>
void fill_buffer(const void* const* row, int64_t rows, Columns columns, double* buffer) {
    for (int64_t i = 0; i < rows; ++i) {
        const typename T::Element* p = static_cast<const typename T::Element*>(row[i]) + columns.first;
        double* to = buffer + i * kBufferStride;
        int64_t k = 0;
        for (; k + kLanes <= columns.count; k += kLanes) store_raw(to + k, T::load(p + k));
        if (k < columns.count) store_raw(to + k, load_tail<T>(p + k, columns.count - k));
    }
}

// sums (R × C vectors) += the products, lane by lane, of R buffered rows with C rows where they lie.
template <class T, int R, int C>
void tile(const double* buffer, const void* const* row, Columns columns, double* sums) {
    const typename T::Element* p[C];
    for (int j = 0; j < C; ++j) p[j] = static_cast<const typename T::Element*>(row[j]) + columns.first;
    Doubles acc[R][C];
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) acc[i][j] = load_raw<Doubles>(sums + (i * C + j) * kLanes);
    int64_t k = 0;
    for (; k + kLanes <= columns.count; k += kLanes) {
        Doubles y[C];
        for (int j = 0; j < C; ++j) y[j] = T::load(p[j] + k);
        for (int i = 0; i < R; ++i) {
            const Doubles x = load_raw<Doubles>(buffer + i * kBufferStride + k);
            for (int j = 0; j < C; ++j) acc[i][j] += x * y[j];
        }
    }
    if (k < columns.count) {
        for (int j = 0; j < C; ++j) {
            const Doubles y = load_tail<T>(p[j] + k, columns.count - k);
            for (int i = 0; i < R; ++i) acc[i][j] += load_raw<Doubles>(buffer + i * kBufferStride + k) * y;
        }
    }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C; ++j) store_raw(sums + (i * C + j) * kLanes, acc[i][j]);
}

typedef void (*Tile)(const double*, const void* const*, Columns, double*);

template <class T, int R>
Tile tile_of(int64_t cols) {
    switch (cols) {
        case 1: return tile<T, R, 1>;
        case 2: return tile<T, R, 2>;
        case 3: return tile<T, R, 3>;
        default: return tile<T, R, kTileCols>;
    }
}

template <class T>
Tile tile_of(int64_t rows, int64_t cols) {
    switch (rows) {
        case 1: return tile_of<T, 1>(cols);
        case 2: return tile_of<T, 2>(cols);
        case 3: return tile_of<T, 3>(cols);
        case 4: return tile_of<T, 4>(cols);
        case 5: return tile_of<T, at_most(5, kTileRows)>(cols);
        default: return tile_of<T, kTileRows>(cols);
    }
}

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

template <class T>
void gramian_many(const void* const* row, int64_t m, Columns columns, double* partial, double* scratch) {
    constexpr int64_t element = sizeof(typename T::Element);
    const int64_t width = panel_columns(m, element), last = columns.first + columns.count;
    double* buffer = scratch;
    double* sums = scratch + kTileRows * kBufferStride;
    __builtin_memset(sums, 0, sums_size(m) * sizeof *sums);
    for (int64_t first = columns.first; first < last; first += width) {
        const Columns panel = {first, at_most(last - first, width)};
        const int64_t after = first + panel.count;
        Prefetcher prefetcher(row, m, {after, at_most(last - after, width)}, element);
        const int64_t lines_a_tile = prefetcher.total() * kTileRows * kTileCols * 2 / (m * m) + 1;
        for_each_tile(
            m, sums, [&](int64_t i, int64_t rows) { fill_buffer<T>(row + i, rows, panel, buffer); },
            [&](int64_t, int64_t rows, int64_t j, int64_t cols, double* at) {
                prefetcher.advance(lines_a_tile);
                tile_of<T>(rows, cols)(buffer, row + j, panel, at);
            });
    }
    for_each_tile(
        m, sums, [](int64_t, int64_t) {},
        [&](int64_t i, int64_t rows, int64_t j, int64_t cols, const double* at) {
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t c = 0; c < cols && j + c <= i + r; ++c)
                    partial[packed_size(i + r) + j + c] = sum(load_raw<Doubles>(at + (r * cols + c) * kLanes));
        });
}

template <class T>
void gramian(const void* const* row, int64_t m, Columns columns, double* partial, double* scratch) {
    switch (m) {
        case 1: return gramian_few<T, 1>(row, columns, partial);
        case 2: return gramian_few<T, 2>(row, columns, partial);
        case 3: return gramian_few<T, 3>(row, columns, partial);
        case 4: return gramian_few<T, 4>(row, columns, partial);
        default: return gramian_many<T>(row, m, columns, partial, scratch);
    }
}

// ---- combine ----

constexpr int64_t kStrip = 512;  // columns whose sums stay in the first-level cache while groups of rows pass
constexpr int kGroup = 8;        // rows read side by side

// Over R rows, sums = (sums +) Σ c_i g_i. The first group starts the sums; the last rounds them to `out` instead.
template <class T, int R, bool First, bool Last>
void add_rows(const void* const* row, const double* c, Columns columns, double* sums, typename T::Element* out) {
    typedef typename T::Element Element;
    const Element* p[R];
    Doubles scale[R];
    for (int i = 0; i < R; ++i) {
        p[i] = static_cast<const Element*>(row[i]) + columns.first;
        scale[i] = Doubles{} + c[i];
    }
    int64_t k = 0;
    for (; k + kLanes <= columns.count; k += kLanes) {
        Doubles total = scale[0] * T::load(p[0] + k);
        for (int i = 1; i < R; ++i) total += scale[i] * T::load(p[i] + k);
        if (!First) total += load_raw<Doubles>(sums + k);
        if (Last)
            T::store(out + k, total);
        else
            store_raw(sums + k, total);
    }
    if (const int64_t left = columns.count - k; left > 0) {
        Doubles total = scale[0] * load_tail<T>(p[0] + k, left);
        for (int i = 1; i < R; ++i) total += scale[i] * load_tail<T>(p[i] + k, left);
        if (!First) total += load_raw<Doubles>(sums + k);
        if (Last) {
            Element padded[kLanes];
            T::store(padded, total);
            __builtin_memcpy(out + k, padded, left * sizeof *out);
        } else {
            store_raw(sums + k, total);
        }
    }
}

template <class T, bool First>
void add_last_rows(const void* const* row, const double* c, int64_t rows, Columns columns, double* sums,
                   typename T::Element* out) {
    switch (rows) {
        case 1: return add_rows<T, 1, First, true>(row, c, columns, sums, out);
        case 2: return add_rows<T, 2, First, true>(row, c, columns, sums, out);
        case 3: return add_rows<T, 3, First, true>(row, c, columns, sums, out);
        case 4: return add_rows<T, 4, First, true>(row, c, columns, sums, out);
        case 5: return add_rows<T, 5, First, true>(row, c, columns, sums, out);
        case 6: return add_rows<T, 6, First, true>(row, c, columns, sums, out);
        case 7: return add_rows<T, 7, First, true>(row, c, columns, sums, out);
        default: return add_rows<T, kGroup, First, true>(row, c, columns, sums, out);
    }
}

template <class T>
void combine_strip(const void* const* row, const double* c, int64_t m, Columns columns, typename T::Element* out) {
    if (m <= kGroup) return add_last_rows<T, true>(row, c, m, columns, nullptr, out);
    alignas(64) double sums[kStrip];
    add_rows<T, kGroup, true, false>(row, c, columns, sums, out);
    int64_t i = kGroup;
    for (; m - i > kGroup; i += kGroup) add_rows<T, kGroup, false, false>(row + i, c + i, columns, sums, out);
    add_last_rows<T, false>(row + i, c + i, m - i, columns, sums, out);
}

// Copies a finished strip past the cache: the output is not read again soon, and a normal store would first fetch every
// line it is about to overwrite.
inline void stream(void* target, const void* source, int64_t bytes) {
    int64_t done = 0;
#if FASTCONFIG_X86
    constexpr int64_t step = sizeof(Doubles);
    for (; done + step <= bytes; done += step) {
        char* to = static_cast<char*>(target) + done;
        const char* from = static_cast<const char*>(source) + done;
#if FASTCONFIG_VECTOR_BYTES == 64
        _mm512_stream_si512((__m512i*)to, _mm512_load_si512((const __m512i*)from));
#else
        _mm256_stream_si256((__m256i*)to, _mm256_load_si256((const __m256i*)from));
#endif
    }
#endif
    __builtin_memcpy(static_cast<char*>(target) + done, static_cast<const char*>(source) + done, bytes - done);
}

template <class T>
void combine(const void* const* row, const double* c, int64_t m, Columns columns, void* out, bool past_cache) {
    typedef typename T::Element Element;
    Element* target = static_cast<Element*>(out);
    const int64_t last = columns.first + columns.count;
    if (m == 0) {
        __builtin_memset(target + columns.first, 0, columns.count * sizeof(Element));
        return;
    }
    const bool streamed =
        FASTCONFIG_X86 && past_cache && reinterpret_cast<uintptr_t>(target + columns.first) % sizeof(Doubles) == 0;
    alignas(64) Element strip[kStrip];
    for (int64_t first = columns.first; first < last; first += kStrip) {
        int64_t count = last - first < kStrip ? last - first : kStrip;
        combine_strip<T>(row, c, m, {first, count}, streamed ? strip : target + first);
        if (streamed) stream(target + first, strip, count * sizeof(Element));
    }
#if FASTCONFIG_X86
    if (streamed) _mm_sfence();  // streamed stores are weakly ordered: they must be seen before the block is done
#endif
}

const Tier kTier = {FASTCONFIG_TIER_NAME,
                    FASTCONFIG_VECTOR_BYTES,
                    scratch_size,
                    {gramian<Float32>, gramian<Float64>, gramian<BFloat16>, gramian<Float16>},
                    {combine<Float32>, combine<Float64>, combine<BFloat16>, combine<Float16>}};
