// GradDrop: of every column only the parts of one sign, drawn by how much of the column's magnitude has it.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.

// max(0, g) and min(0, g), and NaN of NaN, to which the first operand of these instructions gives way.
INLINE inline Doubles positive_part(Doubles g) {
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    return (Doubles)_mm512_maskz_max_pd(0xff, __m512d{}, (__m512d)g);
#else
    return g < 0.0 ? Doubles{} : g;
#endif
}

INLINE inline Doubles negative_part(Doubles g) {
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    return (Doubles)_mm512_maskz_min_pd(0xff, __m512d{}, (__m512d)g);
#else
    return g > 0.0 ? Doubles{} : g;
#endif
}

// Sums over rows by the elements' sign, Σ max(g, 0) and Σ max(-g, 0), and of what leaks through of them. What is not
// finite enters both.
template <bool Leaky>
struct BySign {
    Doubles positive, negative, leaked_positive, leaked_negative;
    static constexpr int kSums = Leaky ? 4 : 2;

    INLINE void add(Doubles g, Doubles leak) {
        const Doubles up = positive_part(g), down = negative_part(g);
        positive += up;
        negative -= down;
        if (Leaky) {
            leaked_positive += leak * up;
            leaked_negative -= leak * down;
        }
    }

    INLINE static BySign load(const double* sums) {
        BySign total = {load_raw<Doubles>(sums), load_raw<Doubles>(sums + kStrip), {}, {}};
        if (Leaky) {
            total.leaked_positive = load_raw<Doubles>(sums + 2 * kStrip);
            total.leaked_negative = load_raw<Doubles>(sums + 3 * kStrip);
        }
        return total;
    }

    INLINE void store(double* sums) const {
        store_raw(sums, positive);
        store_raw(sums + kStrip, negative);
        if (Leaky) {
            store_raw(sums + 2 * kStrip, leaked_positive);
            store_raw(sums + 3 * kStrip, leaked_negative);
        }
    }

    // Positive where P > U. With P = positive / magnitude there is nothing to divide, and only these three operations
    // decide, each rounded once: every backend decides alike.
    INLINE Doubles picked(Doubles u) const {
        const Doubles magnitude = positive + negative;
        const Longs up = (Longs)(positive > u * magnitude);
        const Longs value =
            (bits<Longs>(positive - leaked_negative) & up) | (bits<Longs>(leaked_positive - negative) & ~up);
        return bits<Doubles>(value) + (magnitude - magnitude);  // inf - inf is NaN, and everything finite leaves 0
    }
};

// Over up to kGroup rows, sums by sign (in `sums`, from the second group of rows on). The last group writes `out`.
template <class T, bool First, bool Last, bool Leaky>
void drop_group(const void* const* row, const double* leak, int64_t rows, Columns columns, Draw draw, double* sums,
                typename T::Element* out) {
    typedef typename T::Element Element;
    const Element* p[kGroup];
    Doubles share[kGroup] = {};
    for (int64_t i = 0; i < rows; ++i) {
        p[i] = static_cast<const Element*>(row[i]) + columns.first;
        if (Leaky) share[i] += leak[i];
    }
    uint32_t words[kStrip + 2 * kDrawn];
    const uint32_t* const drawn =
        Last ? draw_words(draw.seed, draw.column + columns.first, columns.count, words) : words;
    const auto add = [&](const Element* const* at, int64_t offset, int64_t k, Element* to) INLINE {
        Doubles picked[T::kParts];
        for (int part = 0; part < T::kParts; ++part) {
            double* kept = sums + k + part * kLanes;
            BySign<Leaky> total = {};
            if (!First) total = BySign<Leaky>::load(kept);
            for (int64_t i = 0; i < rows; ++i) total.add(T::load(at[i] + offset, part), share[i]);
            if (Last)
                picked[part] = total.picked(uniform<T>(drawn + k, part));
            else
                total.store(kept);
        }
        if (Last) T::store(to, picked);
    };
    int64_t k = 0;
    for (; k + kStep<T> <= columns.count; k += kStep<T>) add(p, k, k, out + k);
    if (const int64_t left = columns.count - k; left > 0) {
        Element tail[kGroup][kStep<T>] = {}, rounded[kStep<T>];
        const Element* padded[kGroup];
        for (int64_t i = 0; i < rows; ++i) {
            __builtin_memcpy(tail[i], p[i] + k, left * sizeof(Element));
            padded[i] = tail[i];
        }
        add(padded, 0, k, rounded);
        if (Last) __builtin_memcpy(out + k, rounded, left * sizeof(Element));
    }
}

template <class T, bool Leaky>
void drop_strip(const void* const* row, const double* leak, int64_t m, Columns columns, Draw draw,
                typename T::Element* out) {
    if (m <= kGroup) return drop_group<T, true, true, Leaky>(row, leak, m, columns, draw, nullptr, out);
    alignas(64) double sums[BySign<Leaky>::kSums * kStrip];
    const auto from = [&](int64_t i) { return Leaky ? leak + i : nullptr; };
    drop_group<T, true, false, Leaky>(row, leak, kGroup, columns, draw, sums, out);
    int64_t i = kGroup;
    for (; m - i > kGroup; i += kGroup)
        drop_group<T, false, false, Leaky>(row + i, from(i), kGroup, columns, draw, sums, out);
    drop_group<T, false, true, Leaky>(row + i, from(i), m - i, columns, draw, sums, out);
}

template <class T>
void graddrop(const void* const* row, const double* leak, int64_t m, Columns columns, Draw draw, void* out,
              bool past_cache) {
    by_strips<T>(columns, out, past_cache, [&](Columns strip, typename T::Element* to) {
        if (leak == nullptr)
            drop_strip<T, false>(row, leak, m, strip, draw, to);
        else
            drop_strip<T, true>(row, leak, m, strip, draw, to);
    });
}
