// Vectors of doubles, and how each element type becomes them and is made of them.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.

#define INLINE __attribute__((always_inline))  // on what stands in the hot loops: they are nothing without it

constexpr int kLanes = FASTCONFIG_VECTOR_BYTES / 8;

typedef double Doubles __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES)));
typedef float Floats __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES / 2)));
typedef float Singles __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES)));  // a whole vector of them

// The words of as many floats.
template <class F>
struct WordsOf {
    typedef uint32_t Type __attribute__((vector_size(sizeof(F))));
};

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

// Square roots of any vector, lane by lane: the compilers make the widest instructions of it.
template <class V>
INLINE inline V root(V v) {
    constexpr int lanes = sizeof(V) / sizeof(v[0]);
    for (int lane = 0; lane < lanes; ++lane)
        v[lane] = sizeof(v[0]) == 4 ? __builtin_sqrtf(v[lane]) : __builtin_sqrt(v[lane]);
    return v;
}

template <class W>
INLINE inline W select(W mask, W yes, W no) {
    return (mask & yes) | (~mask & no);
}

// A step is kStep neighbouring elements, read and written as kParts vectors of doubles. Which element goes to which
// part is the type's own affair: sums over columns do not care, and store undoes what load did. 16-bit types can also
// be read and written as vectors of float32: as many parts of twice as many elements.

struct Float32 {
    typedef float Element;
    typedef Floats Vector;  // as many elements as Doubles holds
    static constexpr int kParts = 1;
    INLINE static Vector pack(Doubles d) { return narrow(d); }
    INLINE static Doubles unpack(Vector v) { return widen(v); }
    INLINE static Doubles load(const float* p, int) { return widen(load_raw<Floats>(p)); }
    INLINE static void store(float* p, const Doubles* part) { store_raw(p, narrow(part[0])); }
};

struct Float64 {
    typedef double Element;
    typedef Doubles Vector;
    static constexpr int kParts = 1;
    INLINE static Vector pack(Doubles d) { return d; }
    INLINE static Doubles unpack(Vector v) { return v; }
    INLINE static Doubles load(const double* p, int) { return load_raw<Doubles>(p); }
    INLINE static void store(double* p, const Doubles* part) { store_raw(p, part[0]); }
};

// The even elements and the odd ones: a little-endian word of two bfloat16 is the odd one's float as soon as its lower
// half is cleared, and the even one's when shifted up. Nothing is ever shuffled.
struct BFloat16 {
    typedef uint16_t Element;
    static constexpr int kParts = 2;
    static constexpr uint16_t kExponent = 0x7f80;
    INLINE static Doubles load(const uint16_t* p, int part) { return widen(floats<Floats>(p, part)); }
    INLINE static void store(uint16_t* p, const Doubles* part) { put(p, narrow(part[0]), narrow(part[1])); }
    INLINE static Singles load_single(const uint16_t* p, int part) { return floats<Singles>(p, part); }
    INLINE static void store_single(uint16_t* p, const Singles* part) { put(p, part[0], part[1]); }

 private:
    template <class F>
    INLINE static F floats(const uint16_t* p, int part) {
        const auto pair = load_raw<typename WordsOf<F>::Type>(p);
        return bits<F>(part == 0 ? pair << 16 : pair & 0xffff0000u);
    }
    template <class F>
    INLINE static void put(uint16_t* p, F even, F odd) {
        store_raw(p, rounded(even) >> 16 | (rounded(odd) & 0xffff0000u));
    }
    // To nearest even in the float's upper half. A NaN is not rounded, or its mantissa might overflow; arithmetic has
    // made it quiet, so it survives losing its lower half.
    template <class F>
    INLINE static typename WordsOf<F>::Type rounded(F f) {
        const auto w = bits<typename WordsOf<F>::Type>(f);
        return w + ((0x7fff + ((w >> 16) & 1)) & bits<typename WordsOf<F>::Type>(f == f));
    }
};

struct Float16 {
    typedef uint16_t Element;
    static constexpr uint16_t kExponent = 0x7c00;
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    static constexpr int kParts = 1;
    INLINE static Doubles load(const uint16_t* p, int) {
        return widen((Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
    }
    INLINE static void store(uint16_t* p, const Doubles* part) {
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)narrow(part[0]), _MM_FROUND_TO_NEAREST_INT));
    }
    INLINE static Singles load_single(const uint16_t* p, int) {
        return (Singles)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
    }
    INLINE static void store_single(uint16_t* p, const Singles* part) {
        _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtps_ph(0xffff, (__m512)part[0], _MM_FROUND_TO_NEAREST_INT));
    }
#elif FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 32
    static constexpr int kParts = 1;
    INLINE static Doubles load(const uint16_t* p, int) {
        return widen((Floats)_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
    }
    INLINE static void store(uint16_t* p, const Doubles* part) {
        _mm_storel_epi64((__m128i*)p, _mm_cvtps_ph((__m128)narrow(part[0]), _MM_FROUND_TO_NEAREST_INT));
    }
    INLINE static Singles load_single(const uint16_t* p, int) {
        return (Singles)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    }
    INLINE static void store_single(uint16_t* p, const Singles* part) {
        _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)part[0], _MM_FROUND_TO_NEAREST_INT));
    }
#else
    // Even and odd elements, as BFloat16's.
    static constexpr int kParts = 2;
    INLINE static Doubles load(const uint16_t* p, int part) { return widen(floats<Floats>(p, part)); }
    INLINE static void store(uint16_t* p, const Doubles* part) { put(p, narrow(part[0]), narrow(part[1])); }
    INLINE static Singles load_single(const uint16_t* p, int part) { return floats<Singles>(p, part); }
    INLINE static void store_single(uint16_t* p, const Singles* part) { put(p, part[0], part[1]); }

 private:
    template <class F>
    INLINE static void put(uint16_t* p, F even, F odd) {
        store_raw(p, rounded(even) | rounded(odd) << 16);
    }
    // Exponent and mantissa move to the float's place, and a multiplication by 2^112 rebiases the exponent, subnormals
    // included. Inf and NaN, whose product is 2^16 or more, get the float's largest exponent.
    template <class F>
    INLINE static F floats(const uint16_t* p, int part) {
        typedef typename WordsOf<F>::Type W;
        const W pair = load_raw<W>(p), h = part == 0 ? pair & 0xffff : pair >> 16;
        const F magnitude = bits<F>((h & 0x7fff) << 13) * 0x1p112f;
        const W special = bits<W>(magnitude >= 65536.0f) & 0x7f800000;
        return bits<F>(bits<W>(magnitude) | special | (h & 0x8000) << 16);
    }
    // Normal results: rebias the exponent and round the mantissa to nearest even by integer arithmetic, whose carry
    // runs into the exponent as it should. Subnormal results: adding 0.5, whose last bit is worth 2^-24, rounds by
    // itself.
    template <class F>
    INLINE static typename WordsOf<F>::Type rounded(F f) {
        typedef typename WordsOf<F>::Type W;
        const W w = bits<W>(f);
        const W magnitude = w & 0x7fffffff;
        const W normal = (magnitude - 0x38000000u + 0xfff + ((magnitude >> 13) & 1)) >> 13;
        const W subnormal = bits<W>(bits<F>(magnitude) + 0.5f) - 0x3f000000u;
        W half = select(bits<W>(magnitude < 0x38800000u), subnormal, normal);
        half = select(bits<W>(magnitude >= 0x47800000u), W{} + 0x7c00u, half);
        half = select(bits<W>(magnitude > 0x7f800000u), W{} + 0x7e00u, half);
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
