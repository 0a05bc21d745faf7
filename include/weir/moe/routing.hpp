// SPDX-License-Identifier: MIT
/// \file
/// Which tokens go to which experts. A selector decides that, a capacity policy thins it out,
/// dispatch sorts it, and balancers look at it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/token_rows.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/forbidden_experts.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// A flat list of assignments of tokens to experts, grouped by token, best choice first. Token t
/// has the assignments `first(t)` to `last(t)`, as many as its selector gave it: k in top-k
/// routing, none where it is padding.
struct Assignments {
  Index expert_count = 0;
  List<Index> offsets = {0};  ///< [tokens + 1], into the lists below.
  List<Index> expert;         ///< One per assignment.
  List<std::uint8_t> kept;    ///< One per assignment, 0 where it was dropped: no expert is run.

  Index tokens() const { return offsets.count() - 1; }
  Index experts() const { return expert_count; }
  Index assignments() const { return expert.count(); }
  Index first(Index token) const { return offsets[token]; }
  Index last(Index token) const { return offsets[token + 1]; }

  /// The experts that the token was assigned to, dropped or not, best first.
  std::span<const Index> experts_of(Index token) const {
    return {expert.data() + first(token), expert.data() + last(token)};
  }

  /// Adds to `load[e]` how many assignments the tokens `begin` to `end` made to expert e, kept or
  /// not.
  template <class T>
  void add_load(Index begin, Index end, RowVector<T>& load) const {
    for (Index a = first(begin); a < offsets[end]; ++a) load[expert[a]] += T(1);
  }
};

/// The noise that a router added to logits. The sums are normal around `clean`, with the standard
/// deviation `deviation`; both are [tokens, n]. A router of two levels has two, one for its groups
/// and one for the experts within.
template <class T>
struct NoiseLevel {
  Matrix<T> clean;      ///< The logits as they would be without this noise.
  Matrix<T> deviation;  ///< Zero where there was no noise.
};

/// The routing of one pass: what all stages of a mixture share.
template <class T>
struct Routing : Assignments {
  TokenRows rows;           ///< Padding and sequences of the pass.
  bool restricted = false;  ///< Whether the pass forbids experts, so that logits may be -infinity.
  /// The experts that the pass leaves open, in ascending order: all that it allows to some real
  /// token. Whatever has the number of experts in its formula counts these: a layer with experts
  /// that are switched off for all tokens is the layer that never had them.
  List<Index> open;

  /// [tokens, experts], from the router; -infinity where the pass forbids the expert to the token.
  Matrix<T> logits;
  /// [tokens, experts], the router's belief as balancers see it. Each row sums to 1; rows of
  /// padding are zero.
  Matrix<T> probabilities;

  List<T> weight;  ///< One per assignment: the selector's weight of the expert's output.
  /// One per assignment: the factor of the output where that is not `weight`. Else empty. See
  /// RenormaliseKept.
  List<T> applied;

  /// The noise of the router, that of experts' logits last. Empty if it drew none. It lives in the
  /// router's cache.
  std::span<const NoiseLevel<T>> noise;

  /// The factor of the expert's output.
  T applied_weight(Index assignment) const {
    return applied.empty() ? weight[assignment] : applied[assignment];
  }

  Index open_experts() const { return open.count(); }

  bool is_forbidden(Index token, Index e) const {
    return restricted && logits(token, e) == -std::numeric_limits<T>::infinity();
  }

  /// Starts a new routing from the router's `logits`: no assignments yet.
  ///
  /// Where pass.allowed forbids an expert, the logit becomes -infinity, whatever the router made of
  /// it. Every selector then gives the expert no assignment, the probability 0 and no gradient, so
  /// that the token is routed as if the router had no such expert. What is forbidden to some tokens
  /// only is still one of the `open` experts, and counts as one for all tokens. The best experts of
  /// each token that pass.without_best takes away are forbidden to it in the same way.
  ///
  /// The probabilities of padding become zero; the others are for the selector to set.
  ///
  /// \param who      The selector's name, for messages.
  /// \param k        How many experts each token is to have; 0 if that is not fixed.
  /// \throws ConfigError     if a real token is allowed or left fewer than k experts, or none, or
  ///                         pass.without_best is out of range.
  /// \throws NonFiniteError  if a logit of a real token is NaN or infinite, where it is allowed.
  /// \throws ShapeError      if the pass does not fit the tokens or the experts.
  void begin(std::string_view who, MatrixIn<T> router_logits, const Pass& pass, Index k = 0);

  /// Makes room for `k` kept assignments per real token, to be filled in at `first(t)` to
  /// `last(t)`.
  void assign_each(Index k);
};

template <class T>
void Routing<T>::begin(std::string_view who, MatrixIn<T> router_logits, const Pass& pass, Index k) {
  pass.check(who, router_logits.rows());
  expect_allowed_fits(who, router_logits.rows(), router_logits.cols(), pass, k);
  expect_finite_logits<T>(who, router_logits, pass);
  rows.set(who, pass, router_logits.rows());
  copy_rows<T>(router_logits, logits);
  restricted = !pass.allowed.empty() || pass.without_best != 0.0;
  if (!pass.allowed.empty()) forbid_experts<T>(pass, logits);
  if (pass.without_best != 0.0) forbid_best_experts<T>(who, pass, k, logits);
  find_open_experts(pass, logits.rows(), logits.cols(), open);
  set_shape(probabilities, logits.rows(), logits.cols());
  for (Index t = 0; rows.has_padding() && t < logits.rows(); ++t) {
    if (rows.is_padding(t)) probabilities.row(t).setZero();
  }
  expert_count = logits.cols();
  offsets.assign(logits.rows() + 1, 0);
  expert.clear();
  weight.clear();
  applied.clear();
  kept.clear();
  noise = {};
}

template <class T>
void Routing<T>::assign_each(Index k) {
  for (Index t = 0; t < tokens(); ++t) {
    offsets[t + 1] = first(t) + (rows.is_padding(t) ? 0 : k);
  }
  expert.assign(offsets.back(), 0);
  weight.assign(offsets.back(), T(0));
  kept.assign(offsets.back(), 1);
}

/// The gradient of a loss with respect to the parts of a routing that have one. Balancers add to
/// any of them; the selector's `backward` then carries `weights` and `probabilities` over to
/// `logits`.
template <class T>
struct RoutingGradient {
  Matrix<T> logits;         ///< [tokens, experts]
  Matrix<T> probabilities;  ///< [tokens, experts]
  /// [assignments]. At first the gradient of the applied weights; the capacity policy's `backward`
  /// turns it into that of the selector's weights.
  RowVector<T> weights;
  std::vector<NoiseLevel<T>> noise;  ///< One for each level of `routing.noise`, of its shapes.

  /// Zeros of the shapes of `routing`.
  void reset(const Routing<T>& routing);
};

template <class T>
void RoutingGradient<T>::reset(const Routing<T>& routing) {
  set_zero(logits, routing.tokens(), routing.experts());
  set_zero(probabilities, routing.tokens(), routing.experts());
  set_zero(weights, routing.assignments());
  noise.resize(routing.noise.size());
  for (std::size_t i = 0; i < noise.size(); ++i) {
    const NoiseLevel<T>& level = routing.noise[i];
    set_zero(noise[i].clean, level.clean.rows(), level.clean.cols());
    set_zero(noise[i].deviation, level.deviation.rows(), level.deviation.cols());
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::Routing<float>;
extern template struct weir::Routing<double>;
extern template struct weir::RoutingGradient<float>;
extern template struct weir::RoutingGradient<double>;
#endif
