// SPDX-License-Identifier: MIT
/// \file
/// A balancing loss at each of two levels: Mesh TensorFlow's hierarchical mixture of experts
/// (mesh_tensorflow/transformer/moe.py, `transformer_moe_layer_v2`).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/moe/router/group_count.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// GShard's loss of the groups of experts, plus that of the experts within each group, on the
/// tokens whose first choice is in the group:
///
///     loss = coefficient * (outer + inner)
///     outer = groups / T^2 * sum_g n_g sum_t P_tg,                 P_tg = sum_{e in g} p_te
///     inner = experts / T^2 * sum_g sum_{e in g} c_e sum_{t: g} q_te,    q_te = p_te / P_tg
///
/// n_g counts the tokens whose first choice is in group g, c_e those whose first choice is expert
/// e, dropped or not; the inner sum over t is over the tokens of n_g, and T counts the real tokens.
/// Inner is the mean over the groups of what GShardLoss would be for T / groups tokens to each: at
/// uniform load both are 1, the loss is twice the coefficient, and a group with twice as many
/// tokens has four times the weight. The groups are neighbours, all of the same size. Over the
/// sequences, if that is the scope, the mean is taken.
///
/// n_g and c_e are constant to the derivative. Padding, and choices of tokens without any expert,
/// are not counted. Mesh TensorFlow divides the inner sums by the length of the groups' buffers,
/// capacity factor * T / groups, and counts what is in a buffer; its inner loss is this one divided
/// by the square of that factor.
template <std::floating_point T>
struct HierarchicalLoss {
  static constexpr std::string_view kName = "hierarchical";

  Index groups = 2;
  T coefficient = T(0.01);
  Scope scope = Scope::kBatch;

  /// \throws ConfigError  if groups is below 1 or the coefficient negative.
  void check() const {
    expect_at_least<Index>("HierarchicalLoss", "groups", groups, 1);
    expect_at_least("HierarchicalLoss", "coefficient", coefficient, T(0));
  }

  /// \throws ConfigError  if the router has groups, and another number of them.
  template <class R>
  void check_router(const R& router) const {
    expect_groups_of(router, "HierarchicalLoss", groups);
  }

  /// \return         The loss, already scaled by `coefficient`.
  /// \throws ConfigError  unless `groups` divides the experts.
  T loss(const Routing<T>& routing) const {
    expect_groups_fit(routing);
    T sum = T(0);
    Index parts = 0;
    routing.for_each_group(scope, [&](Index begin, Index end) {
      const auto tokens = static_cast<T>(routing.real_tokens(begin, end));
      if (tokens == T(0)) return;
      ++parts;
      count(routing, begin, end);
      T part = T(0);
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        for (Index g = 0; g < groups; ++g) part += outer(routing, g) * mass(routing, t, g);
        if (routing.first(t) == routing.last(t)) continue;
        const Index g = first_choice(routing, t) / size(routing);
        part += inner(routing, t, g, mass(routing, t, g));
      }
      sum += part / (tokens * tokens);
    });
    return parts > 0 ? coefficient * sum / static_cast<T>(parts) : T(0);
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    expect_groups_fit(routing);
    Index parts = 0;
    routing.for_each_group(scope, [&](Index begin, Index end) {
      parts += routing.real_tokens(begin, end) > 0 ? 1 : 0;
    });
    routing.for_each_group(scope, [&](Index begin, Index end) {
      const auto tokens = static_cast<T>(routing.real_tokens(begin, end));
      if (tokens == T(0)) return;
      count(routing, begin, end);
      const T factor = coefficient / (static_cast<T>(parts) * tokens * tokens);
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        T* const dp = &gradient.probabilities(t, 0);
        for (Index e = 0; e < routing.experts(); ++e) {
          dp[e] += factor * outer(routing, e / size(routing));
        }
        if (routing.first(t) == routing.last(t)) continue;
        const Index g = first_choice(routing, t) / size(routing);
        const T of_group = mass(routing, t, g);
        if (!(of_group > T(0))) continue;
        const T mean = inner(routing, t, g, of_group);
        for (Index e = g * size(routing); e < (g + 1) * size(routing); ++e) {
          dp[e] += factor * (price(routing, e) - mean) / of_group;
        }
      }
    });
  }

 private:
  /// The experts of a group.
  Index size(const Routing<T>& routing) const { return routing.experts() / groups; }

  static Index first_choice(const Routing<T>& routing, Index t) {
    return routing.expert[static_cast<std::size_t>(routing.first(t))];
  }

  /// c of the tokens `begin` to `end` to scratch[0], n to scratch[1].
  void count(const Routing<T>& routing, Index begin, Index end) const {
    routing.scratch[0].setZero(routing.experts());
    routing.scratch[1].setZero(routing.experts());  // As long as for others: no new memory.
    for (Index t = begin; t < end; ++t) {
      if (routing.first(t) == routing.last(t)) continue;
      const Index e = first_choice(routing, t);
      routing.scratch[0][e] += T(1);
      routing.scratch[1][e / size(routing)] += T(1);
    }
  }

  T outer(const Routing<T>& routing, Index g) const {
    return static_cast<T>(groups) * routing.scratch[1][g];
  }
  static T price(const Routing<T>& routing, Index e) {
    return static_cast<T>(routing.experts()) * routing.scratch[0][e];
  }

  /// P_tg
  T mass(const Routing<T>& routing, Index t, Index g) const {
    T sum = T(0);
    for (Index e = g * size(routing); e < (g + 1) * size(routing); ++e) {
      sum += routing.probabilities(t, e);
    }
    return sum;
  }

  /// The sum of the prices times q_te in a group; zero where its probability is.
  T inner(const Routing<T>& routing, Index t, Index g, T of_group) const {
    if (!(of_group > T(0))) return T(0);
    T sum = T(0);
    for (Index e = g * size(routing); e < (g + 1) * size(routing); ++e) {
      sum += price(routing, e) * routing.probabilities(t, e);
    }
    return sum / of_group;
  }

  void expect_groups_fit(const Routing<T>& routing) const {
    if (routing.experts() % groups != 0) {
      fail<ConfigError>("HierarchicalLoss: groups = ", groups,
                        ", expected a divisor of experts = ", routing.experts());
    }
  }
};

}  // namespace weir
