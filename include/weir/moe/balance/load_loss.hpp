// SPDX-License-Identifier: MIT
/// \file
/// Load loss (Shazeer et al. 2017, arXiv:1701.06538, appendix A, eq. 8-11).
#pragma once

#include <algorithm>
#include <concepts>
#include <limits>
#include <string_view>

#include <weir/core/parallel.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/noisy_choice.hpp>
#include <weir/moe/router/group_count.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/lanes.hpp>

namespace weir {

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
/// not, and there is no gradient; likewise for a token that chose all experts (k = experts, or none
/// else allowed) and for an element of zero std. At uniform load, of the load_e, the loss is zero.
/// Padding, and tokens without experts, are not counted. Meant for selectors that choose the
/// largest logits, such as TopKSoftmax; a HierarchicalRouter has HierarchicalLoadLoss instead. As
/// for ImportanceLoss, the loss of a batch is not the mean of those of its parts.
template <std::floating_point T>
struct LoadLoss {
  static constexpr std::string_view kName = "load";

  T coefficient = T(0.1);
  Variance variance = Variance::kPopulation;

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("LoadLoss", "coefficient", coefficient, T(0)); }

  /// \throws ConfigError  if the router has two levels, of whose loads this is no estimate.
  template <class R>
  void check_router(const R& /*router*/) const {
    if constexpr (GroupedRouter<R>) {
      fail<ConfigError>("LoadLoss: the router has groups, each level with its own choice and noise",
                        ", expected one level; HierarchicalLoadLoss is for two");
    }
  }

  /// \return         The loss, already scaled by `coefficient`.
  T loss(const Routing<T>& routing) const {
    RowVector<T>& sum = routing.scratch[0];
    load(routing, sum);
    return coefficient * squared_variation<T>(sum, variance);
  }

  /// Adds d(loss)/d(clean_logits), d(loss)/d(noise_std) and, for the thresholds, d(loss)/d(logits).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    if (!routing.noisy) return;
    RowVector<T>& sum = routing.scratch[0];
    RowVector<T>& d_sum = routing.scratch[1];
    load(routing, sum);
    squared_variation<T>(sum, variance, &d_sum);
    d_sum *= coefficient;
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 64 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const NoisyChoice<T> choice = choice_of(routing, t);
        const auto rivals = choice.rivals(routing.experts_of(t));
        if (rivals.none) continue;
        choice.add_gradient(rivals, d_sum.data(), &gradient.logits(t, 0),
                            &gradient.clean_logits(t, 0), &gradient.noise_std(t, 0));
      }
    });
  }

  /// Sets load[e] to the (expected) number of tokens of expert e.
  static void load(const Routing<T>& routing, RowVector<T>& load) {
    const Index experts = routing.experts();
    load.setZero(experts);
    if (!routing.noisy) return routing.add_load(0, routing.tokens(), load);
    // Two thresholds a token; NaN where nothing is counted.
    RowVector<T>& thresholds = routing.per_token;
    thresholds.resize(2 * routing.tokens());
    parallel_rows(routing.tokens(), 4 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const auto rivals = choice_of(routing, t).rivals(routing.experts_of(t));
        thresholds[2 * t] = rivals.none ? std::numeric_limits<T>::quiet_NaN() : rivals.in;
        thresholds[2 * t + 1] = rivals.out;
      }
    });
    parallel_for((experts + kLanes<double> - 1) / kLanes<double>, [&](Index block) {
      const Index e = block * kLanes<double>;
      const Index count = std::min(kLanes<double>, experts - e);
      Lanes<double> sum{};
      for (Index t = 0; t < routing.tokens(); ++t) {
        const T in = thresholds[2 * t];
        if (in != in) continue;
        const T out = thresholds[2 * t + 1];
        sum += choice_of(routing, t).chance(e, count, in, out).probability;
      }
      store_rounded<T>(sum, load.data() + e, count);
    });
  }

 private:
  static NoisyChoice<T> choice_of(const Routing<T>& routing, Index t) {
    return {.noisy = &routing.logits(t, 0),
            .clean = &routing.clean_logits(t, 0),
            .std = &routing.noise_std(t, 0),
            .begin = 0,
            .end = routing.experts()};
  }
};

}  // namespace weir
