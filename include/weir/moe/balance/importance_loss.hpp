// SPDX-License-Identifier: MIT
/// \file
/// Importance loss (Shazeer et al. 2017, arXiv:1701.06538, eq. 6-7).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/moe/routing.hpp>

namespace weir {

/// Which variance a coefficient of variation is made of.
enum class Variance {
  kPopulation,  ///< Divided by n: tensor2tensor, the paper's own code.
  kSample,      ///< Divided by n - 1: PyTorch's habit, hence most ports. Zero for one value.
};

/// CV(v)^2 = Var(v) / (Mean(v)^2 + 1e-10), and its gradient.
template <class T>
T squared_variation(const RowVector<T>& v, Variance variance, RowVector<T>* gradient = nullptr) {
  constexpr T kEpsilon = T(1e-10);
  const auto n = static_cast<T>(v.size());
  const T divisor = variance == Variance::kPopulation ? n : n - T(1);
  if (gradient != nullptr) gradient->setZero(v.size());
  if (!(divisor > T(0))) return T(0);
  const T mean = v.sum() / n;
  const T var = (v.array() - mean).square().sum() / divisor;
  const T scale = mean * mean + kEpsilon;
  if (gradient != nullptr) {
    // dVar/dv_e = 2 (v_e - mean) / divisor;  dMean/dv_e = 1 / n.
    *gradient =
        (T(2) / (divisor * scale)) * (v.array() - mean) - T(2) * mean * var / (n * scale * scale);
  }
  return var / scale;
}

/// Rewards a router for giving all experts the same total weight:
///
///     importance_e = sum_t g_te,    loss = coefficient * CV(importance)^2
///
/// g_te is the weight of the assignment of token t to expert e, dropped or not, and 0 where there
/// is none. Padding has no assignments. At uniform load, of total weights, the loss is zero. The
/// loss of a batch is not the mean of those of its parts: cut into micro-batches, each is levelled
/// by itself.
template <std::floating_point T>
struct ImportanceLoss {
  static constexpr std::string_view kName = "importance";

  T coefficient = T(0.1);
  Variance variance = Variance::kPopulation;

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("ImportanceLoss", "coefficient", coefficient, T(0)); }

  /// \return         The loss, already scaled by `coefficient`.
  T loss(const Routing<T>& routing) const {
    RowVector<T>& sum = routing.scratch[0];
    importance(routing, sum);
    return coefficient * squared_variation<T>(sum, variance);
  }

  /// Adds d(loss)/d(weights).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    RowVector<T>& sum = routing.scratch[0];
    RowVector<T>& d_sum = routing.scratch[1];
    importance(routing, sum);
    squared_variation<T>(sum, variance, &d_sum);
    for (Index a = 0; a < routing.assignments(); ++a) {
      gradient.weights[a] += coefficient * d_sum[routing.expert[static_cast<std::size_t>(a)]];
    }
  }

  /// Sets sum[e] to the total weight of expert e.
  static void importance(const Routing<T>& routing, RowVector<T>& sum) {
    sum.setZero(routing.experts());
    for (std::size_t a = 0; a < routing.expert.size(); ++a) {
      sum[routing.expert[a]] += routing.weight[a];
    }
  }
};

}  // namespace weir
