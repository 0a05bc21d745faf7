// SPDX-License-Identifier: MIT
/// \file
/// Load-balancing loss of the Switch Transformer (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6) and
/// its forms for k > 1.
#pragma once

#include <algorithm>
#include <concepts>
#include <string_view>

#include <weir/moe/routing.hpp>

namespace weir {

/// What the fractions f_e of SwitchLoss are taken of.
enum class LoadFraction {
  kOfAssignments,  ///< f sums to 1, the loss at uniform load is the coefficient (Megatron-Core,
                   ///< MegaBlocks, DeepSpeed).
  kOfTokens,       ///< f sums to k, the loss at uniform load is k times the coefficient (Hugging
                   ///< Face's Mixtral and DBRX, flaxformer).
};

/// Rewards a router for spreading tokens evenly over the experts:
///
///     loss = coefficient * experts * sum_e f_e * P_e
///
/// f_e is the fraction of the assignments (or: of the tokens) that went to expert e, before any are
/// dropped; P_e the mean probability the router gave it. Over the sequences, if that is the scope,
/// the mean is taken: then a batch cut between sequences has the same loss as its parts together.
/// Padding is not counted; without real tokens the loss is zero. At uniform load the loss has the
/// value that LoadFraction says; that is not its minimum, f and P being free of each other.
///
/// f_e counts decisions and is constant to the derivative; the gradient reaches the router through
/// P_e alone.
template <std::floating_point T>
struct SwitchLoss {
  static constexpr std::string_view kName = "switch";

  T coefficient = T(0.01);
  LoadFraction fraction = LoadFraction::kOfAssignments;
  Scope scope = Scope::kBatch;

  /// \throws ConfigError  if the coefficient is negative.
  void check() const { expect_at_least("SwitchLoss", "coefficient", coefficient, T(0)); }

  /// \return         The loss, already scaled by `coefficient`.
  T loss(const Routing<T>& routing) const {
    T sum = T(0);
    Index groups = 0;
    RowVector<T>& f = routing.scratch[0];
    RowVector<T>& p = routing.scratch[1];
    routing.for_each_group(scope, [&](Index begin, Index end) {
      const Index tokens = routing.real_tokens(begin, end);
      if (tokens == 0) return;
      ++groups;
      fractions(routing, begin, end, tokens, f);
      p.setZero(routing.experts());
      for (Index t = begin; t < end; ++t) p += routing.probabilities.row(t);
      sum += p.dot(f) / static_cast<T>(tokens);
    });
    if (groups == 0) return T(0);
    return coefficient * static_cast<T>(routing.experts()) * sum / static_cast<T>(groups);
  }

  /// Adds d(loss)/d(probabilities).
  void add_gradient(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    Index groups = 0;
    routing.for_each_group(scope, [&](Index begin, Index end) {
      if (routing.real_tokens(begin, end) > 0) ++groups;
    });
    RowVector<T>& f = routing.scratch[0];
    routing.for_each_group(scope, [&](Index begin, Index end) {
      const Index tokens = routing.real_tokens(begin, end);
      if (tokens == 0) return;
      fractions(routing, begin, end, tokens, f);
      f *= coefficient * static_cast<T>(routing.experts()) / static_cast<T>(groups * tokens);
      for (Index t = begin; t < end; ++t) {
        if (!routing.is_padding(t)) gradient.probabilities.row(t) += f;
      }
    });
  }

 private:
  void fractions(const Routing<T>& routing, Index begin, Index end, Index tokens,
                 RowVector<T>& f) const {
    f.setZero(routing.experts());
    routing.add_load(begin, end, f);
    const T assignments = f.sum();
    f /= fraction == LoadFraction::kOfTokens ? static_cast<T>(tokens) : std::max(assignments, T(1));
  }
};

}  // namespace weir
