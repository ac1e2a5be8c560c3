// Elements of one type as elements of another, a run at a time.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.

// To the wider S: exact.
template <class S, class P>
struct Convert {
    static void widen(const typename P::Element* from, int64_t count, typename S::Element* to) {
        int64_t k = 0;
        for (; k + kStep<P> <= count; k += kStep<P>) widen_step(from + k, to + k);
        if (const int64_t left = count - k; left > 0) {
            typename P::Element tail[kStep<P>] = {};
            typename S::Element wide[kStep<P>];
            __builtin_memcpy(tail, from + k, left * sizeof *from);
            widen_step(tail, wide);
            __builtin_memcpy(to + k, wide, left * sizeof *to);
        }
    }

    // Rounded to nearest even, 16-bit types by way of float32.
    static void narrow(const typename S::Element* from, int64_t count, typename P::Element* to) {
        int64_t k = 0;
        for (; k + kStep<P> <= count; k += kStep<P>) narrow_step(from + k, to + k);
        if (const int64_t left = count - k; left > 0) {
            typename S::Element tail[kStep<P>] = {};
            typename P::Element rounded[kStep<P>];
            __builtin_memcpy(tail, from + k, left * sizeof *from);
            narrow_step(tail, rounded);
            __builtin_memcpy(to + k, rounded, left * sizeof *to);
        }
    }

 private:
    INLINE static void widen_step(const typename P::Element* from, typename S::Element* to) {
        if constexpr (P::kParts == 1) {
            const Doubles whole = P::load(from, 0);
            S::store(to, &whole);
        } else {
            for (int part = 0; part < P::kParts; ++part) {
                const Doubles some = P::load(from, part);
                for (int lane = 0; lane < kLanes; ++lane)
                    to[lane * P::kParts + part] = static_cast<typename S::Element>(some[lane]);
            }
        }
    }

    INLINE static void narrow_step(const typename S::Element* from, typename P::Element* to) {
        Doubles part[P::kParts];
        if constexpr (P::kParts == 1) {
            part[0] = S::load(from, 0);
        } else {
            for (int p = 0; p < P::kParts; ++p)
                for (int lane = 0; lane < kLanes; ++lane) part[p][lane] = from[lane * P::kParts + p];
        }
        P::store(to, part);
    }
};

// In the order of memory, which the loads of even and odd elements are not: plain loops that compilers make vectors of.
template <class S>
struct Convert<S, BFloat16> {
    static void widen(const uint16_t* from, int64_t count, typename S::Element* to) {
        for (int64_t k = 0; k < count; ++k) to[k] = bits<float>(static_cast<uint32_t>(from[k]) << 16);
    }

    static void narrow(const typename S::Element* from, int64_t count, uint16_t* to) {
        for (int64_t k = 0; k < count; ++k) {
            const float value = static_cast<float>(from[k]);
            const uint32_t word = bits<uint32_t>(value);
            to[k] = (word + (value == value ? 0x7fff + ((word >> 16) & 1) : 0)) >> 16;  // a NaN must not overflow
        }
    }
};

template <class S>
struct Convert<S, S> {
    static void widen(const typename S::Element* from, int64_t count, typename S::Element* to) {
        __builtin_memcpy(to, from, count * sizeof *to);
    }
    static void narrow(const typename S::Element* from, int64_t count, typename S::Element* to) {
        __builtin_memcpy(to, from, count * sizeof *to);
    }
};
