// SPDX-License-Identifier: MIT
/// \file
/// What all selectors have in common that give each token its k best experts.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/routing_trace.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// A selector of the k best on which a choice can be imposed: `forward_imposed` is its `forward`
/// with the experts of `imposed` instead of its own choice. See Replay.
template <class S>
concept ImposableSelector = requires(const S& selector, MatrixIn<typename S::Scalar> logits,
                                     const Pass& pass, const RoutingTrace& imposed,
                                     Routing<typename S::Scalar>& routing,
                                     typename S::Cache& cache) {
  selector.forward_imposed(logits, pass, imposed, routing, cache);
};

/// \throws ConfigError  unless 1 <= k <= experts.
inline void expect_k(std::string_view who, Index k, Index experts) {
  if (k < 1 || k > experts) {
    throw_error<ConfigError>(who, ": k = ", k, ", expected 1 <= k <= experts = ", experts);
  }
}

/// \throws ConfigError  if a token got an expert that is forbidden to it, since its groups had no
///                      other.
template <class T>
void expect_allowed_chosen(std::string_view who, const Routing<T>& routing) {
  if (!routing.restricted) return;
  for (Index t = 0; t < routing.tokens(); ++t) {
    Index forbidden = 0;
    for (const Index e : routing.experts_of(t)) forbidden += routing.is_forbidden(t, e) ? 1 : 0;
    if (forbidden == 0) continue;
    const Index k = routing.last(t) - routing.first(t);
    throw_error<ConfigError>(who, ": token ", t, " is allowed ", k - forbidden,
                             " experts in its groups, expected at least k = ", k);
  }
}

/// For choices that are not the selector's own: one that divides by a sum of weights may have made
/// 0 / 0 of them.
/// \throws NonFiniteError  if a weight is not finite.
template <class T>
void expect_finite_weights(std::string_view who, const Routing<T>& routing) {
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (std::isfinite(routing.weight[a])) continue;
      throw_error<NonFiniteError>(who, ": the weight of token ", t, " for expert ",
                                  routing.expert[a], " is ", routing.weight[a],
                                  ", expected a finite number");
    }
  }
}

/// Makes those of the numbers [experts] of a token `value` whose expert is forbidden to it.
template <class T>
void set_forbidden(const Routing<T>& routing, Index token, T value, T* numbers) {
  if (!routing.restricted) return;
  for (Index e = 0; e < routing.experts(); ++e) {
    if (routing.is_forbidden(token, e)) numbers[e] = value;
  }
}

namespace detail {

/// \throws ShapeError   if the trace has another number of tokens or experts.
/// \throws ConfigError  if another number of experts than k, or a forbidden one, is imposed on a
///                      token.
template <class T>
void expect_imposed_fits(const Routing<T>& routing, const RoutingTrace& imposed, Index k) {
  if (imposed.tokens() != routing.tokens()) {
    throw_error<ShapeError>("Replay: the trace has ", imposed.tokens(), " tokens, expected ",
                            routing.tokens());
  }
  if (imposed.experts() != routing.experts()) {
    throw_error<ShapeError>("Replay: the trace has ", imposed.experts(), " experts, expected ",
                            routing.experts());
  }
  for (Index t = 0; t < routing.tokens(); ++t) {
    const Index count = imposed.last(t) - imposed.first(t);
    const bool is_padding = routing.rows.is_padding(t);
    if (is_padding && count > 0) {
      throw_error<ConfigError>("Replay: token ", t, " has ", count,
                               " experts in the trace, expected none for padding");
    }
    if (!is_padding && count != k) {
      throw_error<ConfigError>("Replay: token ", t, " has ", count,
                               " experts in the trace, expected k = ", k);
    }
    for (Index a = imposed.first(t); a < imposed.last(t); ++a) {
      if (!routing.is_forbidden(t, imposed.expert(a))) continue;
      throw_error<ConfigError>("Replay: token ", t, " has expert ", imposed.expert(a),
                               " in the trace, expected one that pass.allowed allows");
    }
  }
}

}  // namespace detail

/// How a selector finds the k best.
struct KBest {
  std::string_view who;  ///< The selector's name, for messages.
  Index k = 1;           ///< How many experts each token has.
  GroupLimit groups = {};
  const RoutingTrace* imposed = nullptr;  ///< The choice that takes the place of the selector's
                                          ///< own, see Replay; null: none.
  Index cost = 16;  ///< Roughly how many elementary operations a token takes for each expert.
};

/// The first half of `route_k_best`: begins the routing and makes room for the assignments.
template <class T>
void begin_k_best(const KBest& best, MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) {
  routing.begin(best.who, logits, pass, best.k);
  if (best.imposed != nullptr) detail::expect_imposed_fits(routing, *best.imposed, best.k);
  routing.assign_each(best.k);
}

/// The second half of `route_k_best`.
template <class T, class Score, class Weigh>
void choose_k_best(const KBest& best, Routing<T>& routing, Score&& score, Weigh&& weigh) {
  const Index k = best.k;
  const Index experts = routing.experts();
  routing.rows.for_each_real(best.cost * experts, [&](Index t) {
    T* const p = routing.probabilities.row(t).data();
    Index* const chosen = routing.expert.data() + routing.first(t);
    const T* const scores = score(t, p);
    if (scores == p) set_forbidden(routing, t, -std::numeric_limits<T>::infinity(), p);
    if (best.imposed == nullptr) {
      top_k<T>(span_of(best.groups.candidates(scores, experts), experts), span_of(chosen, k));
    } else {
      for (Index i = 0; i < k; ++i) chosen[i] = best.imposed->expert(best.imposed->first(t) + i);
      std::sort(chosen, chosen + k, [scores](Index a, Index b) {
        return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
      });
    }
    if (scores == p) set_forbidden(routing, t, T(0), p);
    weigh(t, chosen, routing.weight.data() + routing.first(t), p);
  });
  expect_allowed_chosen(best.who, routing);
}

/// Routes each real token to the k experts of its largest scores, as `top_k` does, in reach of its
/// group limit; or to those that are imposed, in the order in which `top_k` would list them.
/// Forbidden experts are not chosen, whatever their scores.
///
/// \param score    `score(t, p)` returns the scores [experts] of token t: its logits, or `p`, the
///                 token's row of probabilities, after writing scores to it.
/// \param weigh    `weigh(t, chosen, weight, p)` sets the weights [k] of the experts `chosen` [k],
///                 and the probabilities p [experts] unless `score` has left them there.
/// \throws              As `Routing::begin`; ConfigError if too few experts are allowed within the
///                      groups, or if the imposed experts do not fit; ShapeError if the trace does
///                      not have the shape of the logits.
template <class T, class Score, class Weigh>
void route_k_best(const KBest& best, MatrixIn<T> logits, const Pass& pass, Routing<T>& routing,
                  Score&& score, Weigh&& weigh) {
  begin_k_best<T>(best, logits, pass, routing);
  choose_k_best(best, routing, score, weigh);
}

}  // namespace weir
