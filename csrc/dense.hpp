// Vectors and triangular factors of a few dozen float64 numbers: what the rules are made of.
// Part of tier_kernels.hpp, compiled once a tier inside its namespace: no include guard, no standard headers.

// The first `count` < kLanes numbers, zeros behind them, of which nothing is read.
INLINE inline Doubles load_first(const double* p, int64_t count) {
#if FASTCONFIG_X86 && FASTCONFIG_VECTOR_BYTES == 64
    return (Doubles)_mm512_maskz_loadu_pd((__mmask8)((1 << count) - 1), p);
#elif FASTCONFIG_X86
    static const int64_t taken[2 * kLanes] = {-1, -1, -1, -1, 0, 0, 0, 0};
    return (Doubles)_mm256_maskload_pd(p, load_raw<__m256i>(taken + kLanes - count));
#else
    Doubles v = {};
    for (int64_t k = 0; k < count; ++k) v[k] = p[k];
    return v;
#endif
}

// The sum of all lanes by halves: in few steps, where elements.hpp's takes them one by one.
template <int Lanes, class V>
INLINE inline double sum_of_halves(V v) {
    if constexpr (Lanes == 1) {
        return bits<double>(v);
    } else {
        typedef double Half __attribute__((vector_size(Lanes * 4)));
        Half half[2];
        __builtin_memcpy(half, &v, sizeof v);
        return sum_of_halves<Lanes / 2>(half[0] + half[1]);
    }
}

// Lane by lane to the end: products of different lanes are rounded by themselves, so that equal ones of different sign
// cancel.
inline double dense_dot(const double* a, const double* b, int64_t count) {
    Doubles sums = {};
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) sums += load_raw<Doubles>(a + k) * load_raw<Doubles>(b + k);
    if (k < count) sums += load_first(a + k, count - k) * load_first(b + k, count - k);
    return sum_of_halves<kLanes>(sums);
}

inline double dense_dot_and_size(const double* a, const double* b, int64_t count, double* size) {
    Doubles sums = {}, sizes = {};
    const auto add = [&](Doubles products) INLINE {
        sums += products;
        sizes += products < 0.0 ? -products : products;
    };
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes) add(load_raw<Doubles>(a + k) * load_raw<Doubles>(b + k));
    if (k < count) add(load_first(a + k, count - k) * load_first(b + k, count - k));
    *size = sum_of_halves<kLanes>(sizes);
    return sum_of_halves<kLanes>(sums);
}

inline void dense_add(double factor, const double* x, double* y, int64_t count) {
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes)
        store_raw(y + k, load_raw<Doubles>(y + k) + factor * load_raw<Doubles>(x + k));
    for (; k < count; ++k) y[k] += factor * x[k];
}

inline void dense_multiply(const double* a, const double* x, double* y, int64_t size) {
    for (int64_t i = 0; i < size; ++i) y[i] = dense_dot(a + i * size, x, size);
}

inline int64_t dense_place(const double* keys, int64_t count, int64_t j) {
    typedef int64_t Counts __attribute__((vector_size(FASTCONFIG_VECTOR_BYTES)));
    const double key = keys[j];
    Counts less = {}, equal = {};  // minus how many
    int64_t k = 0, before = 0, same = 0;
    for (; k + kLanes <= count; k += kLanes) {
        const Doubles others = load_raw<Doubles>(keys + k);
        less += (Counts)(others < key);
        equal += (Counts)(others == key);
    }
    for (int lane = 0; lane < kLanes; ++lane) before -= less[lane], same -= equal[lane];
    for (; k < count; ++k) before += keys[k] < key, same += keys[k] == key;
    if (same > 1)
        for (int64_t i = 0; i < j; ++i) before += keys[i] == key;
    return before;
}

inline bool dense_factor(double* a, int64_t size, int64_t stride, double least) {
    for (int64_t p = 0; p < size; ++p) {
        double* row = a + p * stride;
        if (!(row[p] > least)) return false;
        const double scale = 1.0 / __builtin_sqrt(row[p]);
        // By whole vectors: what lies left of the diagonal is nobody's, and the rows have room behind their end.
        for (int64_t j = p / kLanes * kLanes; j < size; j += kLanes)
            store_raw(row + j, load_raw<Doubles>(row + j) * scale);
        row[p] = scale;
        for (int64_t i = p + 1; i < size; ++i) {
            double* other = a + i * stride;
            const double factor = row[i];
            for (int64_t j = i / kLanes * kLanes; j < size; j += kLanes)
                store_raw(other + j, load_raw<Doubles>(other + j) - factor * load_raw<Doubles>(row + j));
        }
    }
    return true;
}

inline void dense_solve(const double* u, double* x, int64_t size, int64_t stride) {
    for (int64_t i = 0; i < size; ++i) {
        x[i] *= u[i * stride + i];
        dense_add(-x[i], u + i * stride + i + 1, x + i + 1, size - i - 1);
    }
    for (int64_t i = size - 1; i >= 0; --i)
        x[i] = (x[i] - dense_dot(u + i * stride + i + 1, x + i + 1, size - i - 1)) * u[i * stride + i];
}

inline void dense_tridiagonalise(double* a, int64_t m, double least, double* reflectors, double* scales, double* off,
                                 double* p) {
    for (int64_t k = 0; k + 2 < m; ++k) {
        // The reflector that maps row k behind the diagonal onto its first entry.
        const int64_t first = k + 1, count = m - first;
        double* row = a + k * m + first;
        const double tail = dense_dot(row + 1, row + 1, count - 1);
        scales[k] = 0.0;
        if (tail < least) continue;  // what lies there counts as zero, and is read no more
        const double length = __builtin_sqrt(row[0] * row[0] + tail), image = row[0] > 0 ? -length : length;
        double* v = reflectors + k * m + first;
        for (int64_t i = 0; i < count; ++i) v[i] = row[i];
        v[0] -= image;
        const double scale = scales[k] = 2.0 / (v[0] * v[0] + tail);
        row[0] = image;

        // A ← HAH on the trailing block, as a symmetric rank-two update.
        double along = 0.0;
        for (int64_t i = 0; i < count; ++i) {
            p[i] = scale * dense_dot(a + (first + i) * m + first, v, count);
            along += p[i] * v[i];
        }
        dense_add(-0.5 * scale * along, v, p, count);
        for (int64_t i = 0; i < count; ++i) {
            double* other = a + (first + i) * m + first;
            const double by_p = -v[i], by_v = -p[i];
            int64_t j = 0;
            for (; j + kLanes <= count; j += kLanes)
                store_raw(other + j, load_raw<Doubles>(other + j) + by_p * load_raw<Doubles>(p + j) +
                                         by_v * load_raw<Doubles>(v + j));
            for (; j < count; ++j) other[j] += by_p * p[j] + by_v * v[j];
        }
    }
    for (int64_t i = 0; i + 1 < m; ++i) off[i] = a[i * m + i + 1];
    off[m - 1] = 0.0;
}
