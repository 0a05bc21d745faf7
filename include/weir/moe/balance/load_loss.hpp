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
#include <weir/moe/routing.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/normal.hpp>

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
/// Padding, and tokens without experts, are not
/// counted. Meant for selectors that choose the largest logits, such as TopKSoftmax. As for
/// ImportanceLoss, the loss of a batch is not the mean of those of its parts.
template <std::floating_point T>
struct LoadLoss {
  static constexpr std::string_view kName = "load";

  T coefficient = T(0.1);
  Variance variance = Variance::kPopulation;

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("LoadLoss", "coefficient", coefficient, T(0)); }

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
        const Rivals rivals = rivals_of(routing, t);
        if (rivals.none) continue;
        Lanes<double> d_in{}, d_out{};
        for (Index e = 0; e < experts; e += kLanes<double>) {
          const Index count = std::min(kLanes<double>, experts - e);
          const Chance chance = chance_of(routing, t, e, count, rivals.in, rivals.out);
          const Lanes<double> d = load_as_double(d_sum.data() + e, count) * chance.slope;
          add(d, &gradient.clean_logits(t, e), count);
          add(-(d * chance.z), &gradient.noise_std(t, e), count);
          d_in -= chance.inside ? d : Lanes<double>{};
          d_out -= chance.inside ? Lanes<double>{} : d;
        }
        if (rivals.in_expert >= 0) {
          gradient.logits(t, rivals.in_expert) += static_cast<T>(sum_of<double>(d_in));
        }
        gradient.logits(t, rivals.out_expert) += static_cast<T>(sum_of<double>(d_out));
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
        const Rivals rivals = rivals_of(routing, t);
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
        sum += chance_of(routing, t, e, count, in, thresholds[2 * t + 1]).probability;
      }
      store_rounded<T>(sum, load.data() + e, count);
    });
  }

 private:
  /// What the experts of a token have to exceed.
  struct Rivals {
    T in, out;                    ///< Threshold of its experts, and of the others.
    Index in_expert, out_expert;  ///< Whose logits those are; in_expert -1 if there is none.
    bool none;                    ///< The token has no experts.
  };

  static Rivals rivals_of(const Routing<T>& routing, Index t) {
    constexpr T kLowest = -std::numeric_limits<T>::infinity();
    Rivals rivals = {kLowest, kLowest, -1, -1, routing.first(t) == routing.last(t)};
    if (rivals.none) return rivals;
    const auto* begin = routing.expert.data() + routing.first(t);
    const auto* end = routing.expert.data() + routing.last(t);
    for (const auto* chosen = begin; chosen != end; ++chosen) {
      const T z = routing.logits(t, *chosen);
      if (rivals.out_expert < 0 || z <= rivals.out) rivals.out = z, rivals.out_expert = *chosen;
    }
    for (Index e = 0; e < routing.experts(); ++e) {
      const T z = routing.logits(t, e);
      if (!(z > rivals.in) || std::find(begin, end, e) != end) continue;
      rivals.in = z;
      rivals.in_expert = e;
    }
    return rivals;
  }

  struct Chance {
    Lanes<double> probability;
    Lanes<double> slope;      ///< d probability / d C
    Lanes<double> z;          ///< Argument of Phi; zero where the slope is.
    LaneBits<double> inside;  ///< The token chose the expert.
  };

  static Chance chance_of(const Routing<T>& routing, Index t, Index e, Index count, T in, T out) {
    constexpr double kLowest = -std::numeric_limits<double>::infinity();
    const Lanes<double> zero{};
    const Lanes<double> one = zero + 1.0;
    const Lanes<double> noisy = load_as_double(&routing.logits(t, e), count);
    const Lanes<double> clean = load_as_double(&routing.clean_logits(t, e), count);
    const Lanes<double> std = load_as_double(&routing.noise_std(t, e), count);
    // Logits that tie at the border have both thresholds, which then are equal.
    const LaneBits<double> inside = noisy > static_cast<double>(in);
    const Lanes<double> threshold =
        inside ? zero + static_cast<double>(in) : zero + static_cast<double>(out);
    const LaneBits<double> certain = (std <= 0.0) | (threshold == kLowest) | (noisy == kLowest);
    const Lanes<double> safe = certain ? one : std;
    const Lanes<double> z = certain ? zero : (clean - threshold) / safe;
    const NormalLanes normal = normal_lanes<T>(z);
    const Lanes<double> decided = inside ? one : zero;
    return {certain ? decided : normal.cdf, certain ? zero : normal.density / safe, z, inside};
  }

  static void add(const Lanes<double>& more, T* to, Index count) {
    store_rounded<T>(load_as_double(to, count) + more, to, count);
  }
};

}  // namespace weir
