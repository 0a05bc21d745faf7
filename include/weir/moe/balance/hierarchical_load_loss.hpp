// SPDX-License-Identifier: MIT
/// \file
/// Load loss of two-level mixtures (Shazeer et al. 2017, arXiv:1701.06538, appendix B, eq. 14).
#pragma once

#include <algorithm>
#include <concepts>
#include <span>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/balance/chance_table.hpp>
#include <weir/moe/balance/noisy_choice.hpp>
#include <weir/moe/balance/squared_variation.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/group_logits.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of HierarchicalLoadLoss.
struct HierarchicalLoadLossConfig {
  double coefficient = 0.1;
  Variance variance = Variance::kPopulation;
  double epsilon = 0.0;  ///< Added to the squared mean; 1e-10 in tensor2tensor, whose losses then
                         ///< depend on the scale of small numbers.
};

/// Rewards a HierarchicalRouter with noise for sending all experts the same number of tokens, by a
/// smooth estimate of that number, which is LoadLoss's of the groups times that of the experts in a
/// group on the tokens X_i that were sent to it:
///
///     load_ij = M_i N_ij / |X_i|,    loss = coefficient * CV(load)^2 over all experts j of all
///     groups i,    M_i = sum_t Phi((A~_ti - threshold) / std),
///     N_ij = sum_{t in X_i} Phi((b~_tij - threshold) / std)
///
/// M are the paper's Load_primary, N_i its Load_i(X^(i)). A~ are the logits of the groups without
/// noise, b~ those of the experts in a group; thresholds are among noisy logits of the same level
/// and, for N, of the same group. The noisy logit of a group is the logarithm of the sum of the
/// exponentials of its experts' logits. A token is in X_i if it has an expert in the group i,
/// dropped or not. Where all load_ij are equal the loss is zero.
///
/// The paper is silent on the following. |X_i| and X_i are constant to the derivative, as all
/// choices are. A group without tokens has no N: its M_i is divided evenly among its experts, each
/// times the mean number of experts of a token in a group, so that the loss still has a gradient
/// that brings it back. Noise is drawn again for one logit of one level; that of the other stays,
/// and with it the rank of a group, where HierarchicalTopK has a k for the first and another for
/// the rest. Choices are counted instead of estimated where all groups, or all experts of one, are
/// chosen, and in a level without noise. Where experts are forbidden, the logit of a group is that
/// of its others together; experts that the pass switches off for all tokens count nowhere.
///
/// Without any noise, as outside of training, load_ij is how many tokens chose the expert, and
/// there is no gradient; a router that tells no noise of two levels never has any. Padding, and
/// tokens without experts, are not counted. Meant for HierarchicalTopK. As with ImportanceLoss, the
/// loss of a batch is not the mean of those of its parts.
template <std::floating_point T>
class HierarchicalLoadLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "hierarchical_load";
  struct Cache {
    GroupLogits<T> a;           ///< The noisy logits of groups.
    Matrix<T> d_a;              ///< [tokens, groups], their gradient.
    List<Index> group;          ///< The group of each assignment.
    ChanceTable<T> primary;     ///< The chances of the groups; M is their load.
    ChanceTable<T> secondary;   ///< The chances of the experts in each group; N is their load.
    RowVector<T> load, d_load;  ///< [experts], the (expected) number of tokens of each expert.
    RowVector<T> d_primary;     ///< [groups], the gradient of M.
    RowVector<T> d_secondary;   ///< [experts], the gradient of N.
  };

  explicit HierarchicalLoadLoss(HierarchicalLoadLossConfig config = {}) : config_(config) {
    check();
  }

  /// \throws ConfigError  if the coefficient or epsilon is negative.
  void check() const {
    expect_at_least("HierarchicalLoadLoss", "coefficient", config_.coefficient, 0.0);
    expect_at_least("HierarchicalLoadLoss", "epsilon", config_.epsilon, 0.0);
  }

  /// \throws ConfigError  unless the router has two levels.
  template <class R>
  void check_router(const R& router) const {
    if (router.groups() == 0) {
      throw_error<ConfigError>("HierarchicalLoadLoss: the router has one level, expected two, as ",
                               "HierarchicalRouter has; LoadLoss is for one");
    }
  }

  /// \return         The loss, already scaled by `coefficient`.
  double forward(const Routing<T>& routing, Cache& cache) const {
    set_load(routing, cache);
    return config_.coefficient * static_cast<double>(squared_variation<T>(
                                     cache.load, routing.open, config_.variance, config_.epsilon));
  }

  /// Adds `scale` times d(loss)/d(noise) of both levels and, for the thresholds and the noisy
  /// logits of groups, d(loss)/d(logits).
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const;

  const HierarchicalLoadLossConfig& config() const { return config_; }

 private:
  static constexpr Index kCost = 64;  // Of one chance.

  static bool has_noise(const Routing<T>& routing) { return routing.noise.size() == 2; }
  static Index groups_of(const Routing<T>& routing) { return routing.noise.front().clean.cols(); }
  static Index size_of(const Routing<T>& routing) { return routing.experts() / groups_of(routing); }

  static void set_load(const Routing<T>& routing, Cache& cache);

  static void set_chances(const Routing<T>& routing, Index t, Cache& cache) {
    for (Index g = 0; g < groups_of(routing); ++g) {
      cache.secondary.set(t, choice_in_group(routing, t, g), routing.experts_of(t));
    }
    cache.primary.set(t, choice_of_groups(routing, cache, t), chosen_groups(routing, cache, t));
  }

  static NoisyChoice<T> choice_of_groups(const Routing<T>& routing, const Cache& cache, Index t) {
    return {cache.a.values(), routing.noise.front(), t, 0, groups_of(routing)};
  }

  static std::span<const Index> chosen_groups(const Routing<T>& routing, const Cache& cache,
                                              Index t) {
    return {cache.group.data() + routing.first(t), cache.group.data() + routing.last(t)};
  }

  static NoisyChoice<T> choice_in_group(const Routing<T>& routing, Index t, Index g) {
    const Index size = size_of(routing);
    return {routing.logits, routing.noise.back(), t, g * size, (g + 1) * size};
  }

  /// |X_g|
  static T visits_of(const Routing<T>& routing, const Cache& cache, Index g) {
    return cache.secondary.choices[g * size_of(routing)];
  }

  /// N_ij / |X_i|, or the even share of a group without tokens.
  static T share_of(const Routing<T>& routing, const Cache& cache, Index e);

  HierarchicalLoadLossConfig config_;
};

template <std::floating_point T>
void HierarchicalLoadLoss<T>::backward(const Routing<T>& routing, double scale,
                                       RoutingGradient<T>& gradient, Cache& cache) const {
  if (!has_noise(routing)) return;
  squared_variation<T>(cache.load, routing.open, config_.variance, config_.epsilon, &cache.d_load);
  cache.d_load *= static_cast<T>(scale * config_.coefficient);
  const Index groups = groups_of(routing);
  const Index size = size_of(routing);
  set_zero(cache.d_primary, groups);
  set_zero(cache.d_secondary, routing.experts());
  for (Index e = 0; e < routing.experts(); ++e) {
    const Index g = e / size;
    const T visits = visits_of(routing, cache, g);
    cache.d_primary[g] += cache.d_load[e] * share_of(routing, cache, e);
    if (visits > T(0)) cache.d_secondary[e] = cache.d_load[e] * cache.primary.load[g] / visits;
  }
  set_zero(cache.d_a, routing.tokens(), groups);
  routing.rows.for_each_real(kCost * (groups + routing.experts()), [&](Index t) {
    for (Index g = 0; g < groups; ++g) {
      choice_in_group(routing, t, g)
          .add_gradient(routing.experts_of(t), cache.d_secondary.data(), &gradient.logits(t, 0),
                        gradient.noise.back(), t);
    }
    choice_of_groups(routing, cache, t)
        .add_gradient(chosen_groups(routing, cache, t), cache.d_primary.data(), &cache.d_a(t, 0),
                      gradient.noise.front(), t);
  });
  cache.a.add_gradient(T(1), cache.d_a, gradient.logits);
}

template <std::floating_point T>
void HierarchicalLoadLoss<T>::set_load(const Routing<T>& routing, Cache& cache) {
  set_zero(cache.load, routing.experts());
  if (!has_noise(routing)) return routing.add_load(0, routing.tokens(), cache.load);
  const Index groups = groups_of(routing);
  const Index size = size_of(routing);
  cache.a.set("HierarchicalLoadLoss", routing.logits, groups, {});
  cache.group.resize(routing.assignments());
  for (Index a = 0; a < routing.assignments(); ++a) cache.group[a] = routing.expert[a] / size;
  set_shape(cache.primary.chance, routing.tokens(), groups);
  set_shape(cache.secondary.chance, routing.tokens(), routing.experts());
  parallel_rows(routing.tokens(), kCost * (groups + routing.experts()),
                [&](Index begin, Index end) {
                  for (Index t = begin; t < end; ++t) set_chances(routing, t, cache);
                });
  cache.primary.add_up();
  cache.secondary.add_up();
  for (Index e = 0; e < routing.experts(); ++e) {
    cache.load[e] = cache.primary.load[e / size] * share_of(routing, cache, e);
  }
}

template <std::floating_point T>
T HierarchicalLoadLoss<T>::share_of(const Routing<T>& routing, const Cache& cache, Index e) {
  const T visits = visits_of(routing, cache, e / size_of(routing));
  if (visits > T(0)) return cache.secondary.load[e] / visits;
  T all = T(0);
  for (Index g = 0; g < groups_of(routing); ++g) all += visits_of(routing, cache, g);
  const Index group = e / size_of(routing);
  const auto size =
      static_cast<T>(std::count_if(routing.open.begin(), routing.open.end(),
                                   [&](Index o) { return o / size_of(routing) == group; }));
  if (size == T(0)) return T(0);
  return all > T(0) ? static_cast<T>(routing.assignments()) / (all * size) : T(0);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::HierarchicalLoadLoss<float>;
extern template class weir::HierarchicalLoadLoss<double>;
#endif
