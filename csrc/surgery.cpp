// Methods that change each gradient by the others, one after the other: row i of A holds the coefficients of gradient
// i.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "gramian_rule.hpp"
#include "small.hpp"

namespace fastconfig {
namespace {

// One gradient under surgery: its coefficients and its products with all gradients.
struct Patient {
    const Problem& problem;
    std::vector<double> coefficients, products;

    Patient(const Problem& problem, int64_t i)
        : problem(problem),
          coefficients(problem.k, 0.0),
          products(problem.gramian.begin() + i * problem.k, problem.gramian.begin() + (i + 1) * problem.k) {
        coefficients[i] = 1.0;
    }

    void add_row(int64_t j, double factor) {
        coefficients[j] += factor;
        add(factor, &problem.gramian[j * problem.k], products.data(), problem.k);
    }

    // Takes away the component against gradient j, where there is one.
    void project_from(int64_t j) {
        if (products[j] < 0.0) add_row(j, -products[j] / problem.gramian[j * problem.k + j]);
    }

    // c += preference times the changed gradient.
    void sum_into(double* c, double preference) const { add(preference, coefficients.data(), c, problem.k); }
};

// How many of the keys are less, or, where `equal`, no more. A row's place among dozens is found quicker so than by
// sorting, as nothing branches.
int64_t count_before(const double* keys, int64_t count, double key, bool equal) {
    int64_t before = 0;
    if (equal) {
#pragma omp simd reduction(+ : before)
        for (int64_t i = 0; i < count; ++i) before += keys[i] <= key;
    } else {
#pragma omp simd reduction(+ : before)
        for (int64_t i = 0; i < count; ++i) before += keys[i] < key;
    }
    return before;
}

// The order in which row i meets the others: by ascending keys (m, m), as they stand without keys.
class Orders {
 public:
    Orders(const Problem& problem, const double* keys)
        : problem_(problem), keys_(keys), row_(problem.k), order_(problem.k) {
        std::iota(order_.begin(), order_.end(), int64_t{0});
    }

    const std::vector<int64_t>& of(int64_t i) {
        if (!keys_) return order_;
        const int64_t k = problem_.k;
        for (int64_t j = 0; j < k; ++j) row_[j] = keys_[problem_.index[i] * problem_.m + problem_.index[j]];
        for (int64_t j = 0; j < k; ++j)
            order_[count_before(row_.data(), j, row_[j], true) +
                   count_before(row_.data() + j + 1, k - j - 1, row_[j], false)] = j;
        return order_;
    }

 private:
    const Problem& problem_;
    const double* keys_;
    std::vector<double> row_;
    std::vector<int64_t> order_;
};

bool any_conflict(const Patient& patient) {
    return std::any_of(patient.products.begin(), patient.products.end(), [](double product) { return product < 0.0; });
}

}  // namespace

// operand: the keys, or null.
void pcgrad(const Problem& problem, const std::vector<double>&, double* operand, double* c) {
    const std::vector<double> preferences = problem.preferences();
    Orders orders(problem, operand);
    for (int64_t i = 0; i < problem.k; ++i) {
        Patient patient(problem, i);
        if (any_conflict(patient))
            for (const int64_t j : orders.of(i))
                if (j != i) patient.project_from(j);
        patient.sum_into(c, preferences[i]);
    }
}

// parameters: the m rows, highest priority first; empty for 0 to m - 1.
void priority(const Problem& problem, const std::vector<double>& parameters, double*, double* c) {
    const std::vector<double> preferences = problem.preferences();
    std::vector<int64_t> place(problem.m, -1), order;
    for (int64_t i = 0; i < problem.k; ++i) place[problem.index[i]] = i;
    for (int64_t rank = 0; rank < problem.m; ++rank) {
        const int64_t row = parameters.empty() ? rank : static_cast<int64_t>(parameters[rank]);
        if (place[row] >= 0) order.push_back(place[row]);
    }
    for (size_t rank = 0; rank < order.size(); ++rank) {
        Patient patient(problem, order[rank]);
        // The highest priority last: nothing then brings back a conflict with it.
        for (size_t above = rank; above-- > 0;) patient.project_from(order[above]);
        patient.sum_into(c, preferences[order[rank]]);
    }
}

// parameters: beta. operand: (2, m, m), the targets of the cosines, which are updated, and the keys.
void gradvac(const Problem& problem, const std::vector<double>& parameters, double* operand, double* c) {
    const double beta = parameters[0];
    const std::vector<double> preferences = problem.preferences();
    const int64_t size = problem.m * problem.m;
    std::vector<double> targets(operand, operand + size);  // given back at the end, when nothing can fail any more
    Orders orders(problem, operand + size);
    for (int64_t i = 0; i < problem.k; ++i) {
        Patient patient(problem, i);
        double square = patient.products[i], terms = problem.norm[i];  // |g_i'|², and the lengths that it is made of
        for (const int64_t j : orders.of(i)) {
            if (j == i) continue;
            double& target = targets[problem.index[i] * problem.m + problem.index[j]];
            const double along = patient.products[j];
            const double length = square > kNothing * terms * terms ? std::sqrt(square) : 0.0;
            const double cosine =
                length > 0.0 ? std::min(1.0, std::max(-1.0, along / (length * problem.norm[j]))) : 0.0;
            const double open = 1.0 - target * target;
            if (cosine < target && open > kNothing) {
                const double factor = length * (target * std::sqrt(1.0 - cosine * cosine) - cosine * std::sqrt(open)) /
                                      (problem.norm[j] * std::sqrt(open));
                square += factor * (2.0 * along + factor * problem.gramian[j * problem.k + j]);
                terms += factor * problem.norm[j];
                patient.add_row(j, factor);
            }
            target = (1.0 - beta) * target + beta * cosine;
        }
        patient.sum_into(c, preferences[i]);
    }
    std::copy(targets.begin(), targets.end(), operand);
}

}  // namespace fastconfig
