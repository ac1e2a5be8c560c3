// Methods that change each gradient by the others, one after the other: row i of A holds the coefficients of gradient
// i.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "gramian_rule.hpp"

namespace fastconfig {
namespace {

// One gradient under surgery: its coefficients and its products with all gradients.
struct Patient {
    const Problem& problem;
    double* coefficients = nullptr;  // (k,)
    std::vector<double> products;

    explicit Patient(const Problem& problem) : problem(problem), products(problem.k) {}

    // Gradient i, unchanged so far; `coefficients` are zeros.
    void begin(int64_t i, double* coefficients) {
        this->coefficients = coefficients;
        coefficients[i] = 1.0;
        std::copy_n(&problem.gramian[i * problem.k], problem.k, products.begin());
    }

    void add_row(int64_t j, double factor) {
        coefficients[j] += factor;
        problem.machine.add(factor, &problem.gramian[j * problem.k], products.data(), problem.k);
    }

    // Takes away the component against gradient j, where there is one.
    void project_from(int64_t j) {
        if (products[j] < 0.0) add_row(j, -products[j] / problem.gramian[j * problem.k + j]);
    }

    bool any_conflict() const {
        return std::any_of(products.begin(), products.end(), [](double product) { return product < 0.0; });
    }
};

// c = Σ preference_i times what operate(patient, i) makes of gradient i. Every thread has an `operate` of its own,
// which prepare() returns; none sees what became of another gradient.
template <class Prepare>
void operate_on_each(const Problem& problem, double* c, Prepare prepare) {
    const int64_t k = problem.k;
    const std::vector<double> preferences = problem.preferences();
    std::vector<double> changed(k * k);
    problem.machine.share(k, k * k * k, [&](int64_t first, int64_t last) {
        Patient patient(problem);
        auto operate = prepare();
        for (int64_t i = first; i < last; ++i) {
            patient.begin(i, &changed[i * k]);
            operate(patient, i);
        }
    });
    for (int64_t i = 0; i < k; ++i) problem.machine.add(preferences[i], &changed[i * k], c, k);
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
        // A place among dozens is found quicker so than by sorting, as nothing branches.
        for (int64_t j = 0; j < k; ++j) order_[problem_.machine.dense.place(row_.data(), k, j)] = j;
        return order_;
    }

 private:
    const Problem& problem_;
    const double* keys_;
    std::vector<double> row_;
    std::vector<int64_t> order_;
};

}  // namespace

// operand: the keys, or null.
void pcgrad(const Problem& problem, const std::vector<double>&, double* operand, double* c) {
    operate_on_each(problem, c, [&] {
        return [orders = Orders(problem, operand)](Patient& patient, int64_t i) mutable {
            if (!patient.any_conflict()) return;
            for (const int64_t j : orders.of(i))
                if (j != i) patient.project_from(j);
        };
    });
}

// parameters: the m rows, highest priority first; empty for 0 to m - 1.
void priority(const Problem& problem, const std::vector<double>& parameters, double*, double* c) {
    std::vector<int64_t> place(problem.m, -1), order, rank_of(problem.k);
    for (int64_t i = 0; i < problem.k; ++i) place[problem.index[i]] = i;
    for (int64_t rank = 0; rank < problem.m; ++rank) {
        const int64_t row = parameters.empty() ? rank : static_cast<int64_t>(parameters[rank]);
        if (place[row] >= 0) order.push_back(place[row]);
    }
    for (size_t rank = 0; rank < order.size(); ++rank) rank_of[order[rank]] = static_cast<int64_t>(rank);
    operate_on_each(problem, c, [&] {
        return [&](Patient& patient, int64_t i) {
            // The highest priority last: nothing then brings back a conflict with it.
            for (int64_t above = rank_of[i]; above-- > 0;) patient.project_from(order[above]);
        };
    });
}

// parameters: beta. operand: (2, m, m), the targets of the cosines, which are updated, and the keys.
void gradvac(const Problem& problem, const std::vector<double>& parameters, double* operand, double* c) {
    const double beta = parameters[0];
    const int64_t size = problem.m * problem.m;
    std::vector<double> targets(operand, operand + size);  // given back at the end, when nothing can fail any more
    operate_on_each(problem, c, [&] {
        return [&, orders = Orders(problem, operand + size)](Patient& patient, int64_t i) mutable {
            double square = patient.products[i],
                   terms = problem.norm[i];  // |g_i'|², and the lengths that it is made of
            double length = problem.norm[i];
            for (const int64_t j : orders.of(i)) {
                if (j == i) continue;
                double& target = targets[problem.index[i] * problem.m + problem.index[j]];
                const double along = patient.products[j];
                const double cosine =
                    length > 0.0 ? std::min(1.0, std::max(-1.0, along / (length * problem.norm[j]))) : 0.0;
                const double open = 1.0 - target * target;
                if (cosine < target && open > kNothing) {
                    const double factor = length *
                                          (target * std::sqrt(1.0 - cosine * cosine) - cosine * std::sqrt(open)) /
                                          (problem.norm[j] * std::sqrt(open));
                    square += factor * (2.0 * along + factor * problem.gramian[j * problem.k + j]);
                    terms += factor * problem.norm[j];
                    patient.add_row(j, factor);
                    length = square > kNothing * terms * terms ? std::sqrt(square) : 0.0;
                }
                target = (1.0 - beta) * target + beta * cosine;
            }
        };
    });
    std::copy(targets.begin(), targets.end(), operand);
}

}  // namespace fastconfig
