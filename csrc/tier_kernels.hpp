// The streaming kernels, once for every instruction set: included by each tier_*.cpp inside a namespace of its own,
// after it has switched its instruction set on, with
//   FASTCONFIG_VECTOR_BYTES   the width of a vector of doubles
//   FASTCONFIG_TIER_NAME      as FASTCONFIG_ISA spells it
//   FASTCONFIG_X86            1 where <immintrin.h>'s F16C and streaming stores may be used
// Vectors are the compiler's generic ones (GCC, Clang), so the arithmetic is written once and the baseline needs no
// intrinsics. No standard header may be included here: its inline functions would be compiled for this tier, and the
// linker could keep that copy for all.

#define INLINE __attribute__((always_inline))  // on what stands in the hot loops: they are nothing without it

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

// GCC 12 lowers __builtin_convertvector to detours through halves and shuffles, so x86 names its one instruction.
// (The masked AVX-512 forms, all lanes on, because the plain ones read an undefined register in GCC's header.)
INLINE inline Doubles widen(Floats f) {
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    return (Doubles)_mm512_maskz_cvtps_pd(0xff, (__m256)f);
#elif FASTCONFIG_X86
    return (Doubles)_mm256_cvtps_pd((__m128)f);
#else
    return __builtin_convertvector(f, Doubles);
#endif
}

INLINE inline Floats narrow(Doubles d) {
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    return (Floats)_mm512_maskz_cvtpd_ps(0xff, (__m512d)d);
#elif FASTCONFIG_X86
    return (Floats)_mm256_cvtpd_ps((__m256d)d);
#else
    return __builtin_convertvector(d, Floats);
#endif
}

INLINE inline Words select(Words mask, Words yes, Words no) { return (mask & yes) | (~mask & no); }

// ---- element types ----
// A step is kStep neighbouring elements, read and written as kParts vectors of doubles. Which element goes to which
// part is the type's own affair: sums over columns do not care, and store undoes what load did.

struct Float32 {
    typedef float Element;
    static constexpr int kParts = 1;
    INLINE static Doubles load(const float* p, int) { return widen(load_raw<Floats>(p)); }
    INLINE static void store(float* p, const Doubles* part) { store_raw(p, narrow(part[0])); }
};

struct Float64 {
    typedef double Element;
    static constexpr int kParts = 1;
    INLINE static Doubles load(const double* p, int) { return load_raw<Doubles>(p); }
    INLINE static void store(double* p, const Doubles* part) { store_raw(p, part[0]); }
};

// The even elements and the odd ones: a little-endian word of two bfloat16 is the odd one's float as soon as its lower
// half is cleared, and the even one's when shifted up. Nothing is ever shuffled.
struct BFloat16 {
    typedef uint16_t Element;
    static constexpr int kParts = 2;
    INLINE static Doubles load(const uint16_t* p, int part) {
        const Words pair = load_raw<Words>(p);
        return widen(bits<Floats>(part == 0 ? pair << 16 : pair & 0xffff0000u));
    }
    INLINE static void store(uint16_t* p, const Doubles* part) {
        store_raw(p, rounded(part[0]) >> 16 | (rounded(part[1]) & 0xffff0000u));
    }

 private:
    // To nearest even in the float's upper half. A NaN is not rounded, or its mantissa might overflow; narrowing has
    // made it quiet, so it survives losing its lower half.
    INLINE static Words rounded(Doubles v) {
        const Floats f = narrow(v);
        const Words w = bits<Words>(f);
        return w + ((0x7fff + ((w >> 16) & 1)) & bits<Words>(f == f));
    }
};

struct Float16 {
    typedef uint16_t Element;
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    static constexpr int kParts = 1;
    INLINE static Doubles load(const uint16_t* p, int) {
        return widen((Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
    }
    INLINE static void store(uint16_t* p, const Doubles* part) {
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)narrow(part[0]), _MM_FROUND_TO_NEAREST_INT));
    }
#elif FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 32
    static constexpr int kParts = 1;
    INLINE static Doubles load(const uint16_t* p, int) {
        return widen((Floats)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
    }
    INLINE static void store(uint16_t* p, const Doubles* part) {
        _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph((__m128)narrow(part[0]), _MM_FROUND_TO_NEAREST_INT));
    }
#else
    // Even and odd elements, as BFloat16's.
    static constexpr int kParts = 2;
    INLINE static Doubles load(const uint16_t* p, int part) {
        const Words pair = load_raw<Words>(p);
        return widen(floats(part == 0 ? pair & 0xffff : pair >> 16));
    }
    INLINE static void store(uint16_t* p, const Doubles* part) {
        store_raw(p, rounded(part[0]) | rounded(part[1]) << 16);
    }

 private:
    // Exponent and mantissa move to the float's place, and a multiplication by 2^112 rebiases the exponent, subnormals
    // included. Inf and NaN, whose product is 2^16 or more, get the float's largest exponent.
    INLINE static Floats floats(Words h) {
        const Floats magnitude = bits<Floats>((h & 0x7fff) << 13) * 0x1p112f;
        const Words special = bits<Words>(magnitude >= 65536.0f) & 0x7f800000;
        return bits<Floats>(bits<Words>(magnitude) | special | (h & 0x8000) << 16);
    }
    // Normal results: rebias the exponent and round the mantissa to nearest even by integer arithmetic, whose carry
    // runs into the exponent as it should. Subnormal results: adding 0.5, whose last bit is worth 2^-24, rounds by
    // itself.
    INLINE static Words rounded(Doubles v) {
        const Words w = bits<Words>(narrow(v));
        const Words magnitude = w & 0x7fffffff;
        const Words normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        const Words subnormal = bits<Words>(bits<Floats>(magnitude) + 0.5f) - 0x3f000000u;
        Words half = select(bits<Words>(magnitude < 0x38800000u), subnormal, normal);
        half = select(bits<Words>(magnitude >= 0x47800000u), Words{} + 0x7c00u, half);
        half = select(bits<Words>(magnitude > 0x7f800000u), Words{} + 0x7e00u, half);
        return half | (w >> 16 & 0x8000);
    }
#endif
};

template <class T>
constexpr int64_t kStep = T::kParts * kLanes;

INLINE inline double sum(Doubles v) {
    double total = v[0];
    for (int lane = 1; lane < kLanes; ++lane) total += v[lane];
    return total;
}

// ---- gramian ----
// Tiles of at most kTileRows × kTileCols pairs, whose sums stay in registers while a panel of columns passes. Elements
// become doubles as they are loaded, in every tile anew: the execution ports that convert are not those that multiply,
// and a panel converted once into the cache measured slower (bench/README.md).

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

template <class T>
void gramian(const void* const* row, int64_t m, Columns columns, double* partial, double* sums) {
    constexpr int64_t element = sizeof(typename T::Element);
    const int64_t width = panel_columns(m, element), last = columns.first + columns.count;
    __builtin_memset(sums, 0, scratch_size(m) * sizeof *sums);
    for (int64_t first = columns.first; first < last; first += width) {
        const Columns panel = {first, at_most(last - first, width)};
        const int64_t after = first + panel.count;
        Prefetcher prefetcher(row, m, {after, m < kPrefetchedRows ? 0 : at_most(last - after, width)}, element);
        const int64_t lines_a_tile = prefetcher.total() * kTileRows * kTileCols * 2 / (m * m) + 1;
        for_each_tile(
            m, sums,
            [&](int64_t i, int64_t rows, int64_t j, int64_t cols, double* at) {
                const void* tile_row[kTileRows + kTileCols];
                for (int64_t r = 0; r < rows; ++r) tile_row[r] = row[i + r];
                for (int64_t c = 0; c < cols; ++c) tile_row[rows + c] = row[j + c];
                prefetcher.advance(lines_a_tile);
                tile_of<T>(rows, cols)(tile_row, panel, at);
            },
            [&](int64_t i, int64_t rows, double* at) { triangle_of<T>(rows)(row + i, panel, at); });
    }
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
    const auto add = [&](const Element* const* at, int64_t offset, int64_t k, Element* to) INLINE {
        Doubles total[T::kParts];
        for (int part = 0; part < T::kParts; ++part) {
            total[part] = scale[0] * T::load(at[0] + offset, part);
            for (int i = 1; i < R; ++i) total[part] += scale[i] * T::load(at[i] + offset, part);
            if (!First) total[part] += load_raw<Doubles>(sums + k + part * kLanes);
            if (!Last) store_raw(sums + k + part * kLanes, total[part]);
        }
        if (Last) T::store(to, total);
    };
    int64_t k = 0;
    for (; k + kStep<T> <= columns.count; k += kStep<T>) add(p, k, k, out + k);
    if (const int64_t left = columns.count - k; left > 0) {
        Element tail[R][kStep<T>] = {}, rounded[kStep<T>];
        const Element* padded[R];
        for (int i = 0; i < R; ++i) {
            __builtin_memcpy(tail[i], p[i] + k, left * sizeof(Element));
            padded[i] = tail[i];
        }
        add(padded, 0, k, rounded);
        if (Last) __builtin_memcpy(out + k, rounded, left * sizeof(Element));
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

#undef INLINE

const Tier kTier = {FASTCONFIG_TIER_NAME,
                    scratch_size,
                    {gramian<Float32>, gramian<Float64>, gramian<BFloat16>, gramian<Float16>},
                    {combine<Float32>, combine<Float64>, combine<BFloat16>, combine<Float16>}};
