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

inline Words select(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }

// ---- element types: how kLanes of them become doubles, and how doubles become them ----

struct Float32 {
    typedef float Element;
    static Doubles load(const float* p) { return __builtin_convertvector(load_raw<Floats>(p), Doubles); }
    static void store(float* p, Doubles v) { store_raw(p, __builtin_convertvector(v, Floats)); }
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
        return __builtin_convertvector(bits<Floats>(wide), Doubles);
    }
    // Round to nearest even on the float's upper half; a NaN keeps its sign and stays quiet.
    static void store(uint16_t* p, Doubles v) {
        Floats f = __builtin_convertvector(v, Floats);
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
        return __builtin_convertvector((Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), Doubles);
    }
    static void store(uint16_t* p, Doubles v) {
        __m256 f = (__m256)__builtin_convertvector(v, Floats);
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
    }
#elif FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 32
    static Doubles load(const uint16_t* p) {
        return __builtin_convertvector((Floats)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)), Doubles);
    }
    static void store(uint16_t* p, Doubles v) {
        __m128 f = (__m128)__builtin_convertvector(v, Floats);
        _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT));
    }
#else
    // Exponent and mantissa move to the float's place, and a multiplication by 2^112 rebiases the exponent, subnormals
    // included. Inf and NaN, whose product is 2^16 or more, get the float's largest exponent.
    static Doubles load(const uint16_t* p) {
        Words h = __builtin_convertvector(load_raw<Halves>(p), Words);
        Words sign = (h & 0x8000) << 16;
        Floats magnitude = bits<Floats>((h & 0x7fff) << 13) * 0x1p112f;
        Words special = bits<Words>(magnitude >= 65536.0f) & 0x7f800000;
        return __builtin_convertvector(bits<Floats>(bits<Words>(magnitude) | special | sign), Doubles);
    }
    // Normal results: rebias the exponent and round the mantissa to nearest even by integer arithmetic, whose carry runs
    // into the exponent as it should. Subnormal results: adding 0.5, whose last bit is worth 2^-24, rounds by itself.
    static void store(uint16_t* p, Doubles v) {
        Words w = bits<Words>(__builtin_convertvector(v, Floats));
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

// More rows: a panel of columns is converted once to doubles in the cache, and every tile of kTileRows × kTileCols
// pairs passes over it with its sums in registers.
#if FASTCONFIG_VECTOR_BYTES == 64
constexpr int kTileRows = 6, kTileCols = 4;  // 24 sums + 4 + 1 of 32 registers
#else
constexpr int kTileRows = 4, kTileCols = 3;  // 12 sums + 3 + 1 of 16 registers
#endif

constexpr int64_t kPanelDoubles = 1 << 15;  // 256 KiB, half of a common second-level cache
constexpr int64_t kPanelMostColumns = 512;
constexpr int64_t kPanelLeastColumns = 64;

inline int64_t panel_columns(int64_t m) {
    int64_t columns = kPanelDoubles / m / kPanelLeastColumns * kPanelLeastColumns;
    return columns > kPanelMostColumns    ? kPanelMostColumns
           : columns < kPanelLeastColumns ? kPanelLeastColumns
                                          : columns;
}

// One cache line between rows, or rows 4 KiB apart would all fall into the same sets of the first-level cache.
inline int64_t panel_stride(int64_t m) { return panel_columns(m) + 8; }

inline int64_t panel_size(int64_t m) { return m <= 4 ? 0 : m * panel_stride(m); }

// Converts `count` columns, padded with zeros to whole vectors; returns the padded count.
template <class T>
int64_t fill_panel(const void* const* row, int64_t m, Columns columns, double* panel) {
    int64_t stride = panel_stride(m), padded = (columns.count + kLanes - 1) / kLanes * kLanes;
    for (int64_t i = 0; i < m; ++i) {
        const typename T::Element* p = static_cast<const typename T::Element*>(row[i]) + columns.first;
        double* to = panel + i * stride;
        int64_t k = 0;
        for (; k + kLanes <= columns.count; k += kLanes) store_raw(to + k, T::load(p + k));
        if (k < columns.count) store_raw(to + k, load_tail<T>(p + k, columns.count - k));
    }
    return padded;
}

// partial(i0.., j0..) += the products of R rows of the panel with C others, over `count` columns.
template <int R, int C>
void tile(const double* panel, int64_t stride, int64_t count, int64_t i0, int64_t j0, double* partial) {
    const double* a = panel + i0 * stride;
    const double* b = panel + j0 * stride;
    Doubles acc[R][C] = {};
    for (int64_t k = 0; k < count; k += kLanes) {
        Doubles y[C];
        for (int j = 0; j < C; ++j) y[j] = load_raw<Doubles>(b + j * stride + k);
        for (int i = 0; i < R; ++i) {
            Doubles x = load_raw<Doubles>(a + i * stride + k);
            for (int j = 0; j < C; ++j) acc[i][j] += x * y[j];
        }
    }
    for (int i = 0; i < R; ++i)
        for (int j = 0; j < C && j0 + j <= i0 + i; ++j)
            partial[packed_size(i0 + i) + j0 + j] += sum(acc[i][j]);
}

typedef void (*Tile)(const double*, int64_t, int64_t, int64_t, int64_t, double*);

constexpr int at_most(int value, int bound) { return value < bound ? value : bound; }

template <int R>
Tile tile_of(int64_t columns) {
    switch (columns) {
        case 1: return tile<R, 1>;
        case 2: return tile<R, 2>;
        case 3: return tile<R, 3>;
        default: return tile<R, kTileCols>;
    }
}

inline Tile tile_of(int64_t rows, int64_t columns) {
    switch (rows) {
        case 1: return tile_of<1>(columns);
        case 2: return tile_of<2>(columns);
        case 3: return tile_of<3>(columns);
        case 4: return tile_of<4>(columns);
        case 5: return tile_of<at_most(5, kTileRows)>(columns);
        default: return tile_of<kTileRows>(columns);
    }
}

// Fetches the next panel's lines into the second-level cache a few at a time while the tiles of this one are computed:
// without it, memory would idle during arithmetic and arithmetic during loads.
template <class T>
class Prefetcher {
    static constexpr int64_t kLine = 64;
    const void* const* row_;
    int64_t m_, first_byte_, lines_, row_at_ = 0, line_at_ = 0;

   public:
    Prefetcher(const void* const* row, int64_t m, Columns next)
        : row_(row),
          m_(m),
          first_byte_(next.first * static_cast<int64_t>(sizeof(typename T::Element))),
          lines_((next.count * static_cast<int64_t>(sizeof(typename T::Element)) + kLine - 1) / kLine) {}

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
void gramian_many(const void* const* row, int64_t m, Columns columns, double* partial, double* panel) {
    const int64_t width = panel_columns(m), stride = panel_stride(m), last = columns.first + columns.count;
    const int64_t tile_count = (m / kTileRows + 1) * (m / kTileCols + 2) / 2 + 1;
    for (int64_t e = 0; e < packed_size(m); ++e) partial[e] = 0.0;
    for (int64_t first = columns.first; first < last; first += width) {
        int64_t count = last - first < width ? last - first : width;
        int64_t after = first + count, next = last - after < width ? last - after : width;
        int64_t padded = fill_panel<T>(row, m, {first, count}, panel);
        Prefetcher<T> prefetcher(row, m, {after, next});
        const int64_t lines_a_tile = prefetcher.total() / tile_count + 1;
        for (int64_t i = 0; i < m; i += kTileRows) {
            int64_t r = m - i < kTileRows ? m - i : kTileRows;
            for (int64_t j = 0; j < i + r; j += kTileCols) {
                int64_t c = i + r - j < kTileCols ? i + r - j : kTileCols;
                prefetcher.advance(lines_a_tile);
                tile_of(r, c)(panel, stride, padded, i, j, partial);
            }
        }
    }
}

template <class T>
void gramian(const void* const* row, int64_t m, Columns columns, double* partial, double* panel) {
    switch (m) {
        case 1: return gramian_few<T, 1>(row, columns, partial);
        case 2: return gramian_few<T, 2>(row, columns, partial);
        case 3: return gramian_few<T, 3>(row, columns, partial);
        case 4: return gramian_few<T, 4>(row, columns, partial);
        default: return gramian_many<T>(row, m, columns, partial, panel);
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
    const bool streamed = FASTCONFIG_X86 && past_cache &&
                          reinterpret_cast<uintptr_t>(target + columns.first) % sizeof(Doubles) == 0;
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
                    panel_size,
                    {gramian<Float32>, gramian<Float64>, gramian<BFloat16>, gramian<Float16>},
                    {combine<Float32>, combine<Float64>, combine<BFloat16>, combine<Float16>}};
