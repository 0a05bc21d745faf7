// SPDX-License-Identifier: MIT
/// \file
/// Load loss (Shazeer et al. 2017, arXiv:1701.06538, appendix A, eq. 8-11).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/balance/chance_table.hpp>
#include <weir/moe/balance/noisy_choice.hpp>
#include <weir/moe/balance/squared_variation.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of LoadLoss.
struct LoadLossConfig {
  double coefficient = 0.1;
  Variance variance = Variance::kPopulation;
  double epsilon = 0.0;  ///< Added to the squared mean; 1e-10 in tensor2tensor, whose losses then
                         ///< depend on the scale of small numbers.
};

/// Rewards a noisy router for sending all experts the same number of tokens, by a smooth estimate
/// of that number:
///
///     load_e = sum_t P_te,    loss = coefficient * CV(load)^2
///     P_te = Phi((C_te - threshold_te) / std_te)
///
/// P_te is the probability that token t would choose expert e if the noise of that one logit were
/// drawn again. C are the logits without noise, std its standard deviation, Phi the distribution of
/// the standard normal. threshold_te is what the noisy logit has to exceed: the (k+1)-th largest
/// noisy logit of the token if e is among its k experts, else the k-th largest.
///
/// Derivatives go through C, std and the thresholds, which are noisy logits of other experts. Where
/// the router drew no noise, as outside of training, load_e is how many tokens chose e, dropped or
/// not, and there is no gradient. The same holds for a token that chose all experts (k = experts,
/// or none else allowed) and for an element of zero std. CV is over the experts that the pass
/// allows to some token. Where all load_e are equal the loss is zero. Padding, and tokens without
/// experts, are not counted.
///
/// Meant for selectors that choose the largest logits, such as TopKSoftmax; a HierarchicalRouter
/// has HierarchicalLoadLoss instead. As with ImportanceLoss, the loss of a batch is not the mean of
/// those of its parts.
template <std::floating_point T>
class LoadLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "load";
  struct Cache {
    ChanceTable<T> chances;
    RowVector<T> load;    ///< [experts], the (expected) number of tokens of each expert.
    RowVector<T> d_load;  ///< Its gradient.
  };

  explicit LoadLoss(LoadLossConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the coefficient or epsilon is negative.
  void check() const {
    expect_at_least("LoadLoss", "coefficient", config_.coefficient, 0.0);
    expect_at_least("LoadLoss", "epsilon", config_.epsilon, 0.0);
  }

  /// \throws ConfigError  if the router has two levels, of whose loads this is no estimate.
  template <class R>
  void check_router(const R& router) const {
    if (router.groups() > 0) {
      throw_error<ConfigError>(
          "LoadLoss: the router has groups, each level with its own choice and noise",
          ", expected one level; HierarchicalLoadLoss is for two");
    }
  }

  /// \return         The loss, already scaled by `coefficient`.
  double forward(const Routing<T>& routing, Cache& cache) const {
    set_load(routing, cache);
    return config_.coefficient * static_cast<double>(squared_variation<T>(
                                     cache.load, routing.open, config_.variance, config_.epsilon));
  }

  /// Adds `scale` times d(loss)/d(noise) and, for the thresholds, d(loss)/d(logits).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const;

  const LoadLossConfig& config() const { return config_; }

 private:
  static constexpr Index kCost = 64;  // Of one chance.

  static void set_load(const Routing<T>& routing, Cache& cache);

  static NoisyChoice<T> choice_of(const Routing<T>& routing, Index t) {
    return {routing.logits, routing.noise.back(), t, 0, routing.experts()};
  }

  LoadLossConfig config_;
};

template <std::floating_point T>
void LoadLoss<T>::backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                           Cache& cache) const {
  if (routing.noise.empty()) return;
  squared_variation<T>(cache.load, routing.open, config_.variance, config_.epsilon, &cache.d_load);
  cache.d_load *= static_cast<T>(scale * config_.coefficient);
  parallel_rows(routing.tokens(), kCost * routing.experts(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      choice_of(routing, t)
          .add_gradient(routing.experts_of(t), cache.d_load.data(), &gradient.logits(t, 0),
                        gradient.noise.back(), t);
    }
  });
}

template <std::floating_point T>
void LoadLoss<T>::set_load(const Routing<T>& routing, Cache& cache) {
  if (routing.noise.empty()) {
    set_zero(cache.load, routing.experts());
    routing.add_load(0, routing.tokens(), cache.load);
    return;
  }
  set_shape(cache.chances.chance, routing.tokens(), routing.experts());
  parallel_rows(routing.tokens(), kCost * routing.experts(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      cache.chances.set(t, choice_of(routing, t), routing.experts_of(t));
    }
  });
  cache.chances.add_up();
  assign(cache.load, cache.chances.load);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::LoadLoss<float>;
extern template class weir::LoadLoss<double>;
#endif
