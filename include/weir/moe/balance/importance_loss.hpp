// SPDX-License-Identifier: MIT
/// \file
/// Importance loss (Shazeer et al. 2017, arXiv:1701.06538, eq. 6-7).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/moe/balance/squared_variation.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of ImportanceLoss.
struct ImportanceLossConfig {
  double coefficient = 0.1;
  Variance variance = Variance::kPopulation;
  double epsilon = 0.0;  ///< Added to the squared mean; 1e-10 in tensor2tensor, whose losses then
                         ///< depend on the scale of small numbers.
};

/// Rewards a router for giving all experts the same total weight:
///
///     importance_e = sum_t g_te,    loss = coefficient * CV(importance)^2
///
/// g_te is the weight of the assignment of token t to expert e, dropped or not, and 0 where there
/// is none. Padding has no assignments. CV is over the experts that the pass allows to some token.
/// Where all total weights are equal the loss is zero. The loss of a batch is not the mean of those
/// of its parts: each micro-batch is levelled by itself.
template <std::floating_point T>
class ImportanceLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "importance";
  struct Cache {
    RowVector<T> importance, d_importance;  ///< [experts]
  };

  explicit ImportanceLoss(ImportanceLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the coefficient or epsilon is negative.
  void check() const {
    expect_at_least("ImportanceLoss", "coefficient", config_.coefficient, 0.0);
    expect_at_least("ImportanceLoss", "epsilon", config_.epsilon, 0.0);
  }

  /// \return         The loss, already scaled by `coefficient`.
  double forward(const Routing<T>& routing, Cache& cache) const;

  /// Adds `scale` times d(loss)/d(weights).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    squared_variation<T>(cache.importance, routing.open, config_.variance, config_.epsilon,
                         &cache.d_importance);
    cache.d_importance *= static_cast<T>(scale * config_.coefficient);
    for (Index a = 0; a < routing.assignments(); ++a) {
      gradient.weights[a] += cache.d_importance[routing.expert[a]];
    }
  }

  const ImportanceLossConfig& config() const { return config_; }

 private:
  ImportanceLossConfig config_;
};

template <std::floating_point T>
double ImportanceLoss<T>::forward(const Routing<T>& routing, Cache& cache) const {
  set_zero(cache.importance, routing.experts());
  for (Index a = 0; a < routing.assignments(); ++a) {
    cache.importance[routing.expert[a]] += routing.weight[a];
  }
  return config_.coefficient *
         static_cast<double>(squared_variation<T>(cache.importance, routing.open, config_.variance,
                                                  config_.epsilon));
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::ImportanceLoss<float>;
extern template class weir::ImportanceLoss<double>;
#endif
