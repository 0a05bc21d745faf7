// SPDX-License-Identifier: MIT
/// \file
/// Load loss of two-level mixtures (Shazeer et al. 2017, arXiv:1701.06538, appendix B, eq. 14).
#pragma once

#include <algorithm>
#include <concepts>
#include <span>
#include <string_view>

#include <Eigen/Core>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/noisy_choice.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/group_count.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/logsumexp.hpp>

namespace weir {

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
/// and, for N, of the same group. A token is in X_i if it has an expert in the group i, dropped or
/// not. At uniform load, of the load_ij, the loss is zero.
///
/// The paper is silent on the following. |X_i| and X_i are constant to the derivative, as all
/// choices are. A group without tokens has no N: its M_i is divided evenly among its experts, each
/// times the mean number of experts of a token in a group, so that the loss still has a gradient
/// that brings it back. Noise is drawn again for one logit of one level; that of the other stays,
/// and with it the rank of a group, where HierarchicalTopK has a k for the first and another for
/// the rest. Where all groups, or all experts of one, are chosen, or a level has no noise, it
/// counts. Where experts are forbidden, the logit of a group is that of its others together.
///
/// Without any noise, as outside of training, load_ij is how many tokens chose the expert, and
/// there is no gradient. Padding, and tokens without experts, are not counted. Meant for
/// HierarchicalTopK. As for ImportanceLoss, the loss of a batch is not the mean of those of its
/// parts.
template <std::floating_point T>
struct HierarchicalLoadLoss {
  static constexpr std::string_view kName = "hierarchical_load";

  T coefficient = T(0.1);
  Variance variance = Variance::kPopulation;

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("HierarchicalLoadLoss", "coefficient", coefficient, T(0)); }

  /// \throws ConfigError  unless the router has two levels, at least one of them with noise.
  template <class R>
  void check_router(const R& /*router*/) const {
    if constexpr (!GroupedRouter<R>) {
      fail<ConfigError>("HierarchicalLoadLoss: the router has one level, expected two, as ",
                        "HierarchicalRouter has; LoadLoss is for one");
    } else if constexpr (!AnnotatingRouter<R>) {
      fail<ConfigError>("HierarchicalLoadLoss: the router tells of no noise, expected a ",
                        "NoisyRouter as one of its levels, or as both");
    }
  }

  /// \return         The loss, already scaled by `coefficient`.
  T loss(const Routing<T>& routing) const {
    RowVector<T>& sum = routing.scratch[0];
    load(routing, sum);
    return coefficient * squared_variation<T>(sum, variance);
  }

  /// Adds d(loss)/d(clean_logits), d(noise_std), d(group_noise), d(group_noise_std) and, for the
  /// thresholds and the logits of groups, d(logits).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    if (routing.groups == 0) return;
    RowVector<T>& sum = routing.scratch[0];
    RowVector<T>& d_load = routing.scratch[1];
    load(routing, sum);
    squared_variation<T>(sum, variance, &d_load);
    d_load *= coefficient;
    Table sums = table_of(routing);
    T* const d_groups = &sums(routing.tokens() + 2, 0);
    T* const d_experts = d_groups + routing.groups;
    std::fill_n(d_groups, sums.cols(), T(0));
    for (Index e = 0; e < routing.experts(); ++e) {
      const Index g = e / size_of(routing);
      const T visits = visits_of(routing, sums, g);
      d_groups[g] += d_load[e] * share_of(routing, sums, e);
      if (visits > T(0)) d_experts[e] = d_load[e] * sums(routing.tokens(), g) / visits;
    }
    parallel_rows(routing.tokens(), 64 * sums.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        T* const dz = &gradient.logits(t, 0);
        for (Index g = 0; g < routing.groups; ++g) {
          const NoisyChoice<T> choice = choice_in_group(routing, t, g);
          const auto rivals = choice.rivals(routing.experts_of(t));
          if (rivals.none) continue;
          choice.add_gradient(rivals, d_experts, dz, &gradient.clean_logits(t, 0),
                              &gradient.noise_std(t, 0));
        }
        const GroupChoice level(routing, t);
        const auto rivals = level.choice.rivals(level.chosen);
        if (rivals.none) continue;
        level.choice.add_gradient(rivals, d_groups, level.d_noisy, level.d_clean,
                                  &gradient.group_noise_std(t, 0));
        level.add_gradient(routing, t, &gradient.group_noise(t, 0), dz);
      }
    });
  }

  /// Sets load[e] to the (expected) number of tokens of expert e.
  static void load(const Routing<T>& routing, RowVector<T>& load) {
    const Index experts = routing.experts();
    load.setZero(experts);
    if (routing.groups == 0) return routing.add_load(0, routing.tokens(), load);
    add_up(routing);
    const Table sums = table_of(routing);
    for (Index e = 0; e < experts; ++e) {
      load[e] = sums(routing.tokens(), e / size_of(routing)) * share_of(routing, sums, e);
    }
  }

 private:
  /// [tokens + 3, groups + experts]: the chances of the groups and of the experts, -1 where the
  /// token had no such choice; their sums M and N; over how many tokens; the gradient of the sums.
  using Table = Eigen::Map<Matrix<T>>;

  /// The choice of groups of a token, whose noisy logits are those of a group's experts together.
  struct GroupChoice {
    GroupChoice(const Routing<T>& routing, Index t) {
      const Index groups = routing.groups;
      const Index size = size_of(routing);
      auto& space = ThreadSpace<T, HierarchicalLoadLoss>::of_this_thread();
      space.reserve(4 * groups);
      T* const noisy = space.take(groups);
      T* const clean = space.take(groups);
      d_noisy = space.take_zeros(groups);
      d_clean = space.take_zeros(groups);
      for (Index g = 0; g < groups; ++g) {
        noisy[g] = logsumexp(&routing.logits(t, g * size), size);
        clean[g] = noisy[g] - routing.group_noise(t, g);
      }
      auto& indices = ThreadSpace<Index, HierarchicalLoadLoss>::of_this_thread();
      const auto experts = routing.experts_of(t);
      const auto count = static_cast<Index>(experts.size());
      indices.reserve(count);
      Index* const of_experts = indices.take(count);
      std::transform(experts.begin(), experts.end(), of_experts,
                     [size](Index e) { return e / size; });
      chosen = {of_experts, experts.size()};
      choice = {.noisy = noisy,
                .clean = clean,
                .std = &routing.group_noise_std(t, 0),
                .begin = 0,
                .end = groups};
    }

    /// From d_noisy and d_clean to the noise, and to the logits of the experts that make up the
    /// noisy ones: d noisy_g / dz_e = exp(z_e - noisy_g).
    void add_gradient(const Routing<T>& routing, Index t, T* d_noise, T* dz) const {
      const Index size = size_of(routing);
      for (Index g = 0; g < routing.groups; ++g) {
        d_noise[g] -= d_clean[g];
        const T d = d_noisy[g] + d_clean[g];
        if (d == T(0)) continue;  // Also where all experts of the group are forbidden.
        loops::add_exp_shifted<T>(size, d, &routing.logits(t, g * size), choice.noisy[g],
                                  dz + g * size);
      }
    }

    NoisyChoice<T> choice;
    std::span<const Index> chosen;
    T *d_noisy, *d_clean;
  };

  static Index size_of(const Routing<T>& routing) { return routing.experts() / routing.groups; }

  static NoisyChoice<T> choice_in_group(const Routing<T>& routing, Index t, Index g) {
    return {.noisy = &routing.logits(t, 0),
            .clean = &routing.clean_logits(t, 0),
            .std = &routing.noise_std(t, 0),
            .begin = g * size_of(routing),
            .end = (g + 1) * size_of(routing)};
  }

  static Table table_of(const Routing<T>& routing) {
    const Index cols = routing.groups + routing.experts();
    routing.per_token.resize((routing.tokens() + 3) * cols);
    return Table(routing.per_token.data(), routing.tokens() + 3, cols);
  }

  /// |X_g|
  static T visits_of(const Routing<T>& routing, const Table& sums, Index g) {
    return sums(routing.tokens() + 1, routing.groups + g * size_of(routing));
  }

  /// N_ij / |X_i|, or the even share of a group without tokens.
  static T share_of(const Routing<T>& routing, const Table& sums, Index e) {
    const T visits = visits_of(routing, sums, e / size_of(routing));
    if (visits > T(0)) return sums(routing.tokens(), routing.groups + e) / visits;
    T all = T(0);
    for (Index g = 0; g < routing.groups; ++g) all += visits_of(routing, sums, g);
    const auto size = static_cast<T>(size_of(routing));
    return all > T(0) ? static_cast<T>(routing.assignments()) / (all * size) : T(0);
  }

  /// Fills the table.
  static void add_up(const Routing<T>& routing) {
    Table table = table_of(routing);
    const Index groups = routing.groups;
    parallel_rows(routing.tokens(), 64 * table.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const GroupChoice level(routing, t);
        set_chances(level.choice, level.chosen, &table(t, 0));
        for (Index g = 0; g < groups; ++g) {
          set_chances(choice_in_group(routing, t, g), routing.experts_of(t), &table(t, groups));
        }
      }
    });
    parallel_for((table.cols() + kLanes<double> - 1) / kLanes<double>, [&](Index block) {
      const Index col = block * kLanes<double>;
      const Index count = std::min(kLanes<double>, table.cols() - col);
      const Lanes<double> zero{};
      Lanes<double> sum{}, tokens{};
      for (Index t = 0; t < routing.tokens(); ++t) {
        const Lanes<double> chance = load_as_double(&table(t, col), count);
        sum += chance < 0.0 ? zero : chance;
        tokens += chance < 0.0 ? zero : zero + 1.0;
      }
      store_rounded<T>(sum, &table(routing.tokens(), col), count);
      store_rounded<T>(tokens, &table(routing.tokens() + 1, col), count);
    });
  }

  /// \param chances  To the first of all options.
  static void set_chances(const NoisyChoice<T>& choice, std::span<const Index> chosen, T* chances) {
    const auto rivals = choice.rivals(chosen);
    for (Index e = choice.begin; e < choice.end; e += kLanes<double>) {
      const Index count = std::min(kLanes<double>, choice.end - e);
      const Lanes<double> none = Lanes<double>{} - 1.0;
      store_rounded<T>(
          rivals.none ? none : choice.chance(e, count, rivals.in, rivals.out).probability,
          chances + e, count);
    }
  }
};

}  // namespace weir
