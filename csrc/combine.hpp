// The weighted sum of rows over a run of columns.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.

constexpr int64_t kStrip = 512;  // columns whose sums stay in the first-level cache while groups of rows pass
constexpr int kGroup = 8;        // rows read side by side

// T's elements, summed in float64 or, of 16 bits, in float32.
template <class T, class Float>
struct SummedIn {
    typedef typename T::Element Element;
    typedef Float Sum;
    typedef Float Sums __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES)));
    static constexpr int kParts = T::kParts;
    INLINE static Sums load(const Element* p, int part) {
        if constexpr (sizeof(Float) == sizeof(double))
            return T::load(p, part);
        else
            return T::load_single(p, part);
    }
    INLINE static void store(Element* p, const Sums* part) {
        if constexpr (sizeof(Float) == sizeof(double))
            T::store(p, part);
        else
            T::store_single(p, part);
    }
};

// Over R rows, sums = (sums +) Σ c_i g_i. The first group starts the sums; the last rounds them to `out` instead.
template <class A, int R, bool First, bool Last>
void add_rows(const void* const* row, const double* c, Columns columns, typename A::Sum* sums,
              typename A::Element* out) {
    typedef typename A::Element Element;
    typedef typename A::Sums Sums;
    constexpr int64_t lanes = sizeof(Sums) / sizeof(typename A::Sum), step = A::kParts * lanes;
    const Element* p[R];
    Sums scale[R];
    for (int i = 0; i < R; ++i) {
        p[i] = static_cast<const Element*>(row[i]) + columns.first;
        scale[i] = Sums{} + static_cast<typename A::Sum>(c[i]);
    }
    const auto add = [&](const Element* const* at, int64_t offset, int64_t k, Element* to) INLINE {
        Sums total[A::kParts];
        for (int part = 0; part < A::kParts; ++part) {
            total[part] = scale[0] * A::load(at[0] + offset, part);
            for (int i = 1; i < R; ++i) total[part] += scale[i] * A::load(at[i] + offset, part);
            if (!First) total[part] += load_raw<Sums>(sums + k + part * lanes);
            if (!Last) store_raw(sums + k + part * lanes, total[part]);
        }
        if (Last) A::store(to, total);
    };
    int64_t k = 0;
    for (; k + step <= columns.count; k += step) add(p, k, k, out + k);
    if (const int64_t left = columns.count - k; left > 0) {
        Element tail[R][step] = {}, rounded[step];
        const Element* padded[R];
        for (int i = 0; i < R; ++i) {
            __builtin_memcpy(tail[i], p[i] + k, left * sizeof(Element));
            padded[i] = tail[i];
        }
        add(padded, 0, k, rounded);
        if (Last) __builtin_memcpy(out + k, rounded, left * sizeof(Element));
    }
}

template <class A, bool First>
void add_last_rows(const void* const* row, const double* c, int64_t rows, Columns columns, typename A::Sum* sums,
                   typename A::Element* out) {
    switch (rows) {
        case 1: return add_rows<A, 1, First, true>(row, c, columns, sums, out);
        case 2: return add_rows<A, 2, First, true>(row, c, columns, sums, out);
        case 3: return add_rows<A, 3, First, true>(row, c, columns, sums, out);
        case 4: return add_rows<A, 4, First, true>(row, c, columns, sums, out);
        case 5: return add_rows<A, 5, First, true>(row, c, columns, sums, out);
        case 6: return add_rows<A, 6, First, true>(row, c, columns, sums, out);
        case 7: return add_rows<A, 7, First, true>(row, c, columns, sums, out);
        default: return add_rows<A, kGroup, First, true>(row, c, columns, sums, out);
    }
}

template <class A>
void combine_strip(const void* const* row, const double* c, int64_t m, Columns columns, typename A::Element* out) {
    if (m <= kGroup) return add_last_rows<A, true>(row, c, m, columns, nullptr, out);
    alignas(64) typename A::Sum sums[kStrip];
    add_rows<A, kGroup, true, false>(row, c, columns, sums, out);
    int64_t i = kGroup;
    for (; m - i > kGroup; i += kGroup) add_rows<A, kGroup, false, false>(row + i, c + i, columns, sums, out);
    add_last_rows<A, false>(row + i, c + i, m - i, columns, sums, out);
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

// Calls write(columns, to) for one strip of `columns` after the other; with `past_cache` what it wrote is streamed.
template <class T, class Write>
void by_strips(Columns columns, void* out, bool past_cache, Write write) {
    typedef typename T::Element Element;
    Element* target = static_cast<Element*>(out);
    const int64_t last = columns.first + columns.count;
    const bool streamed =
        FASTCONFIG_X86 && past_cache && reinterpret_cast<uintptr_t>(target + columns.first) % sizeof(Doubles) == 0;
    alignas(64) Element strip[kStrip];
    for (int64_t first = columns.first; first < last; first += kStrip) {
        const int64_t count = last - first < kStrip ? last - first : kStrip;
        write(Columns{first, count}, streamed ? strip : target + first);
        if (streamed) stream(target + first, strip, count * sizeof(Element));
    }
#if FASTCONFIG_X86
    if (streamed) _mm_sfence();  // streamed stores are weakly ordered: they must be seen before the block is done
#endif
}

template <class T>
void combine(const void* const* row, const double* c, int64_t m, Columns columns, void* out, bool past_cache) {
    typedef typename T::Element Element;
    if (m == 0) {
        __builtin_memset(static_cast<Element*>(out) + columns.first, 0, columns.count * sizeof(Element));
        return;
    }
    by_strips<T>(columns, out, past_cache,
                 [&](Columns strip, Element* to) { combine_strip<SummedIn<T, double>>(row, c, m, strip, to); });
}

// Whether all of a run of 16-bit numbers are finite.
template <class T>
inline bool are_finite(const uint16_t* p, int64_t count) {
    typedef uint16_t Halves __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES)));
    constexpr int64_t lanes = sizeof(Halves) / sizeof(uint16_t);
    Halves lost = {};
    int64_t k = 0;
    for (; k + lanes <= count; k += lanes) lost |= (Halves)((load_raw<Halves>(p + k) & T::kExponent) == T::kExponent);
    uint16_t any = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) any |= lost[lane];
    for (; k < count; ++k) any |= (p[k] & T::kExponent) == T::kExponent;
    return any == 0;
}

// The same of a 16-bit type with sums in float32, where weights and gradients allow it (engine.cpp). Where these leave
// float32's range, or what they are made of is not finite, the strip shows it, and is formed again in float64.
template <class T>
void combine_single(const void* const* row, const double* c, int64_t m, Columns columns, void* out, bool past_cache) {
    by_strips<T>(columns, out, past_cache, [&](Columns strip, uint16_t* to) {
        combine_strip<SummedIn<T, float>>(row, c, m, strip, to);
        if (!are_finite<T>(to, strip.count)) combine_strip<SummedIn<T, double>>(row, c, m, strip, to);
    });
}
