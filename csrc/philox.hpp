// Random numbers that need no memory: what a column gets depends on the seed and the column's number alone.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.

typedef uint64_t Longs __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES)));

constexpr uint64_t kWord = 0xffffffff;

// Counters that Philox runs side by side. Only with a product of words a lane are vectors quicker than single numbers.
#if FASTCONFIG_X86
typedef Longs Counters;
#else
typedef uint64_t Counters;
#endif
constexpr int kCounters = sizeof(Counters) / sizeof(uint64_t);

// The products of 32-bit words, each in the lower half of its lane, whatever stands in the upper one.
INLINE inline Counters times(Counters a, uint32_t b) {
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    return (Longs)_mm512_maskz_mul_epu32(0xff, (__m512i)a, _mm512_set1_epi64(b));
#elif FASTCONFIG_X86
    return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & kWord) * b;
#endif
}

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the counters (low word of
// `counter`, high word, 0, 0) and the key `seed`: four words, each in the lower half of its lane.
INLINE inline void philox(Counters counter, uint64_t seed, Counters* word) {
    Counters c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
        const Counters a = times(c0, 0xD2511F53), b = times(c2, 0xCD9E8D57);
        c0 = (b >> 32) ^ c1 ^ k0;
        c1 = b;
        c2 = (a >> 32) ^ c3 ^ k1;
        c3 = a;
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    word[0] = c0, word[1] = c1, word[2] = c2, word[3] = c3;
}

constexpr int kWordsACounter = 4;
constexpr int kDrawn = kWordsACounter * kCounters;  // words of a vector of counters

// Words for `count` columns from number `column` on, of which the counter's quarter is the counter: four neighbours
// share one. Returns where in `words`, which holds kStrip + 2 kDrawn, the first one's stands.
inline const uint32_t* draw_words(uint64_t seed, int64_t column, int64_t count, uint32_t* words) {
    const int64_t skipped = column % kWordsACounter;
    uint64_t first[kCounters], pairs[2 * kCounters];
    for (int i = 0; i < kCounters; ++i) first[i] = column / kWordsACounter + i;
    Counters counter = load_raw<Counters>(first);
    for (int64_t k = 0; k < skipped + count; k += kDrawn, counter += kCounters) {
        Counters word[kWordsACounter];
        philox(counter, seed, word);
        uint64_t even[kCounters], odd[kCounters];
        store_raw(even, (word[0] & kWord) | word[1] << 32);
        store_raw(odd, (word[2] & kWord) | word[3] << 32);
        for (int i = 0; i < kCounters; ++i) {
            pairs[2 * i] = even[i];
            pairs[2 * i + 1] = odd[i];
        }
        __builtin_memcpy(words + k, pairs, sizeof pairs);
    }
    return words + skipped;
}

// A word as a number in [0, 1), as Triton makes it: of the word and its complement the smaller, in float32, by a scale
// under 2^-31 that rounds none to 1.
constexpr float kWordScale = 0x1.fffffep-32f;

// That of the words of a vector's elements, in the parts of the type.
template <class T>
INLINE inline Doubles uniform(const uint32_t* words, int part) {
    if constexpr (T::kParts == 1) {
        const Words word = load_raw<Words>(words);
        typedef int32_t Ints __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES / 2)));
        const Ints magnitude = (Ints)(word ^ (-(word >> 31)));
        return widen(__builtin_convertvector(magnitude, Floats) * kWordScale);
    } else {
        const Longs pair = load_raw<Longs>(words), word = part == 0 ? pair & kWord : pair >> 32;
        const Longs magnitude = (word ^ (-(word >> 31))) & kWord;
        const Doubles exact = bits<Doubles>(magnitude | 0x4330000000000000) - 0x1p52;  // the mantissa of 2^52 and more
        return widen(narrow(exact) * kWordScale);
    }
}
