// SPDX-License-Identifier: MIT
/// \file
/// What all selectors have in common that give each token its k best experts.
#pragma once

#include <algorithm>
#include <concepts>
#include <limits>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
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

namespace detail {

/// \throws ConfigError  if another number of experts than k, or a forbidden one, is imposed on a
///                      token.
template <class T>
void expect_imposed_fits(const Routing<T>& routing, const RoutingTrace& imposed, Index k) {
  for (Index t = 0; t < routing.tokens(); ++t) {
    const Index count = imposed.last(t) - imposed.first(t);
    const bool is_padding = routing.rows.is_padding(t);
    if (is_padding && count > 0) {
      fail<ConfigError>("Replay: token ", t, " has ", count,
                        " experts in the trace, expected none for padding");
    }
    if (!is_padding && count != k) {
      fail<ConfigError>("Replay: token ", t, " has ", count,
                        " experts in the trace, expected k = ", k);
    }
    for (Index a = imposed.first(t); a < imposed.last(t); ++a) {
      if (!routing.is_forbidden(t, imposed.expert(a))) continue;
      fail<ConfigError>("Replay: token ", t, " has expert ", imposed.expert(a),
                        " in the trace, expected one that pass.allowed allows");
    }
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
    fail<ConfigError>(who, ": token ", t, " is allowed ", k - forbidden,
                      " experts in its groups, expected at least k = ", k);
  }
}

}  // namespace detail

/// Routes each real token to the k experts of its largest scores, as `top_k` does, in reach of its
/// group limit; or to those that are imposed, in the order in which `top_k` would list them.
/// Forbidden experts are not chosen, whatever their scores.
///
/// \param who      The selector's name, for messages.
/// \param imposed  Null: none.
/// \param score    `score(t, p)` returns the scores [experts] of token t: its logits, or `p`, the
///                 token's row of probabilities, after writing scores to it.
/// \param weigh    `weigh(t, chosen, weight, p)` sets the weights [k] of the experts `chosen` [k],
///                 and the probabilities p [experts] unless `score` has left them there.
/// \throws              As `Routing::begin`; ConfigError if too few experts are allowed within the
///                      groups, or if the imposed experts do not fit.
template <class T, class Score, class Weigh>
void route_k_best(std::string_view who, MatrixIn<T> logits, const Pass& pass, Index k,
                  const GroupLimit& groups, const RoutingTrace* imposed, Routing<T>& routing,
                  Score&& score, Weigh&& weigh) {
  routing.begin(who, logits, pass, k);
  if (imposed != nullptr) detail::expect_imposed_fits(routing, *imposed, k);
  routing.assign_each(k);
  const Index experts = routing.experts();
  parallel_rows(routing.tokens(), 16 * experts, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      T* const p = routing.probabilities.row(t).data();
      if (routing.rows.is_padding(t)) {
        std::fill_n(p, experts, T(0));
        continue;
      }
      Index* const chosen = routing.expert.data() + routing.first(t);
      const T* const scores = score(t, p);
      const bool marks = routing.restricted && scores == p;
      if (marks) {
        for (Index e = 0; e < experts; ++e) {
          if (routing.is_forbidden(t, e)) p[e] = -std::numeric_limits<T>::infinity();
        }
      }
      if (imposed == nullptr) {
        top_k(groups.candidates(scores, experts), experts, k, chosen);
      } else {
        for (Index i = 0; i < k; ++i) chosen[i] = imposed->expert(imposed->first(t) + i);
        std::sort(chosen, chosen + k, [scores](Index a, Index b) {
          return scores[a] > scores[b] || (scores[a] == scores[b] && a < b);
        });
      }
      if (marks) {
        for (Index e = 0; e < experts; ++e) {
          if (routing.is_forbidden(t, e)) p[e] = T(0);
        }
      }
      weigh(t, chosen, routing.weight.data() + routing.first(t), p);
    }
  });
  detail::expect_allowed_chosen(who, routing);
}

/// \throws ConfigError  unless 1 <= k <= experts.
inline void expect_k(std::string_view who, Index k, Index experts) {
  if (k < 1 || k > experts) {
    fail<ConfigError>(who, ": k = ", k, ", expected 1 <= k <= experts = ", experts);
  }
}

}  // namespace weir
