// SPDX-License-Identifier: MIT
/// \file
/// Experts choose tokens, instead of tokens experts (Zhou et al. 2022, arXiv:2202.09368).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <vector>

#include <weir/core/parallel.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// What the scores of ExpertChoice are normalised over.
enum class ScoresOver {
  kExperts,  ///< The experts of each token: the paper, flaxformer.
  kTokens,   ///< The real tokens of each group, for each expert: Mesh TensorFlow.
};

/// Each expert takes the C tokens of its group with the largest score s_te, and a token is served
/// by as many experts as took it: none, some or all.
///
///     s_te = softmax(z)_te, over the experts or over the tokens of the group
///     S_t  = {e : t among the C largest of column e}
///     g_te = s_te                  or   s_te / |S_t|                     divide
///     C    = round(factor * T / experts), up to a multiple of `multiple`, 1 <= C <= T
///
/// T is the number of real tokens in the group that `scope` names; `factor` is then the mean number
/// of experts per token. Every expert has the same load, so no capacity policy is needed (Dropless)
/// and no balancing. Equal scores: the earlier token. A token's experts are listed by weight, the
/// largest first, equal ones by index. The choice, and |S_t|, are constant to the derivative.
///
/// Whichever the scores, `probabilities` are the softmax over the experts. A logit of -infinity
/// forbids the pair; an expert with fewer than C tokens left takes them all.
///
/// Not causal: whether a token is taken depends on later ones. A decoder trained with it sees the
/// future, and one that generates token by token routes differently.
///
/// (Zhou et al. 2022, arXiv:2202.09368, section 3.2; scores over the tokens and the division:
/// Mesh TensorFlow, moe.py, `_expert_selection_gating`.)
template <std::floating_point T>
struct ExpertChoice {
  using Scalar = T;

  double factor = 2.0;
  ScoresOver over = ScoresOver::kExperts;
  Scope scope = Scope::kBatch;
  Rounding rounding = Rounding::kUp;
  Index multiple = 1;   ///< C is rounded up to a multiple of it.
  bool divide = false;  ///< By the number of experts that serve the token.

  /// \throws ConfigError  unless factor is finite and > 0, and multiple >= 1.
  void check(Index /*experts*/) const {
    if (!(factor > 0.0 && std::isfinite(factor))) {
      fail<ConfigError>("ExpertChoice: factor = ", factor, ", expected a finite number > 0");
    }
    expect_at_least<Index>("ExpertChoice", "multiple", multiple, 1);
  }

  /// C for a group of `tokens` real tokens; 0 if there are none.
  Index capacity(Index tokens, Index experts) const {
    const double exact = factor * static_cast<double>(tokens) / static_cast<double>(experts);
    const double rounded = rounding == Rounding::kDown ? std::floor(exact)
                           : rounding == Rounding::kUp ? std::ceil(exact)
                                                       : std::nearbyint(exact);
    const auto limit = static_cast<double>(tokens);
    if (rounded >= limit) return tokens;
    const Index count = std::max(static_cast<Index>(rounded), Index(1));
    const Index beyond = count % multiple;
    if (beyond == 0) return count;
    const Index missing = multiple - beyond;
    return missing >= tokens - count ? tokens : count + missing;
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void select(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing) const {
    check(logits.cols());
    routing.begin("ExpertChoice", logits, pass);
    const Index experts = routing.experts();
    parallel_rows(routing.tokens(), 16 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) {
          routing.probabilities.row(t).setZero();
        } else {
          softmax_row(routing.logits.row(t).data(), experts, routing.probabilities.row(t).data());
        }
      }
    });
    // Group by group and expert by expert, a place for each token of the group; the tokens taken
    // come first, then kEnd where there is room.
    routing.workspace.resize(static_cast<std::size_t>(routing.tokens() * experts));
    routing.for_each_group(scope, [&](Index begin, Index end) {
      const Index count = capacity(routing.real_tokens(begin, end), experts);
      parallel_rows(experts, 16 * (end - begin), [&](Index first, Index last) {
        for (Index e = first; e < last; ++e) {
          take(routing, begin, end, e, count,
               routing.workspace.data() + begin * experts + e * (end - begin));
        }
      });
    });
    list(routing);
    weigh(routing);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient) const {
    const Index experts = routing.experts();
    if (over == ScoresOver::kTokens) {
      routing.for_each_group(scope, [&](Index begin, Index end) {
        add_backward_over_tokens(routing, begin, end, gradient);
      });
    }
    parallel_rows(routing.tokens(), 8 * experts, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (routing.is_padding(t)) continue;
        T* dp = gradient.probabilities.row(t).data();
        if (over == ScoresOver::kExperts) {
          const T share = share_of(routing, t);
          for (Index a = routing.first(t); a < routing.last(t); ++a) {
            dp[routing.expert[static_cast<std::size_t>(a)]] += share * gradient.weights[a];
          }
        }
        add_softmax_backward_row(routing.probabilities.row(t).data(), dp, experts,
                                 gradient.logits.row(t).data());
      }
    });
  }

 private:
  static constexpr Index kEnd = -1;

  /// What the scores of token t are multiplied by.
  T share_of(const Routing<T>& routing, Index t) const {
    const Index serving = routing.last(t) - routing.first(t);
    return divide && serving > 0 ? T(1) / static_cast<T>(serving) : T(1);
  }

  /// Writes the tokens expert e takes, in token order. The softmax over tokens has the order of the
  /// logits.
  void take(const Routing<T>& routing, Index begin, Index end, Index e, Index count,
            Index* taken) const {
    const Matrix<T>& score = over == ScoresOver::kTokens ? routing.logits : routing.probabilities;
    Index candidates = 0;
    for (Index t = begin; t < end; ++t) {
      if (!routing.is_padding(t) && !forbidden(routing.logits(t, e))) taken[candidates++] = t;
    }
    if (candidates > count) {
      std::nth_element(taken, taken + count, taken + candidates, [&](Index a, Index b) {
        return score(a, e) != score(b, e) ? score(a, e) > score(b, e) : a < b;
      });
      candidates = count;
    }
    if (candidates < end - begin) taken[candidates] = kEnd;
  }

  /// Calls `body(token, expert)` for each pair taken, the experts of a token in ascending order.
  template <class Body>
  void for_each_taken(const Routing<T>& routing, Body&& body) const {
    const Index experts = routing.experts();
    routing.for_each_group(scope, [&](Index begin, Index end) {
      const Index* taken = routing.workspace.data() + begin * experts;
      for (Index e = 0; e < experts; ++e, taken += end - begin) {
        for (Index i = 0; i < end - begin && taken[i] != kEnd; ++i) body(taken[i], e);
      }
    });
  }

  /// Turns the tokens of each expert into the experts of each token.
  void list(Routing<T>& routing) const {
    std::vector<Index>& offsets = routing.offsets;
    for_each_taken(routing, [&](Index t, Index) { ++offsets[static_cast<std::size_t>(t) + 1]; });
    for (std::size_t t = 1; t < offsets.size(); ++t) offsets[t] += offsets[t - 1];
    const auto count = static_cast<std::size_t>(offsets.back());
    routing.expert.resize(count);
    routing.weight.resize(count);
    routing.kept.assign(count, 1);
    // Filling moves the offset of each token to its end, which is where the next one begins.
    for_each_taken(routing, [&](Index t, Index e) {
      routing.expert[static_cast<std::size_t>(offsets[static_cast<std::size_t>(t)]++)] = e;
    });
    std::copy_backward(offsets.begin(), offsets.end() - 1, offsets.end());
    offsets[0] = 0;
  }

  void weigh(Routing<T>& routing) const {
    if (over == ScoresOver::kExperts) {
      weigh(routing, 0, routing.tokens(),
            [&](Index t, Index e) { return routing.probabilities(t, e); });
      return;
    }
    routing.for_each_group(scope, [&](Index begin, Index end) {
      RowVector<T>& normaliser = routing.scratch[0];
      logsumexp_over_tokens(routing, begin, end, normaliser);
      weigh(routing, begin, end,
            [&](Index t, Index e) { return std::exp(routing.logits(t, e) - normaliser[e]); });
    });
  }

  /// Weights the assignments of the tokens `from` to `to`, and sorts those of each token.
  template <class Score>
  void weigh(Routing<T>& routing, Index from, Index to, const Score& score) const {
    parallel_rows(to - from, 16 * routing.experts(), [&](Index begin, Index end) {
      for (Index t = from + begin; t < from + end; ++t) {
        const T share = share_of(routing, t);
        Index* const expert = routing.expert.data() + routing.first(t);
        T* const weight = routing.weight.data() + routing.first(t);
        for (Index i = 0; i < routing.last(t) - routing.first(t); ++i) {
          const Index e = expert[i];
          const T w = share * score(t, e);
          Index place = i;
          for (; place > 0 && weight[place - 1] < w; --place) {
            weight[place] = weight[place - 1];
            expert[place] = expert[place - 1];
          }
          weight[place] = w;
          expert[place] = e;
        }
      }
    });
  }

  static bool forbidden(T logit) { return logit == -std::numeric_limits<T>::infinity(); }

  /// log sum_t exp(z_te) over the real tokens; -infinity where all are forbidden.
  static void logsumexp_over_tokens(const Routing<T>& routing, Index begin, Index end,
                                    RowVector<T>& result) {
    RowVector<T>& largest = result;
    largest.setConstant(routing.experts(), -std::numeric_limits<T>::infinity());
    for (Index t = begin; t < end; ++t) {
      if (!routing.is_padding(t)) largest = largest.cwiseMax(routing.logits.row(t));
    }
    RowVector<T>& sum = routing.scratch[1];
    sum.setZero(routing.experts());
    for (Index t = begin; t < end; ++t) {
      if (routing.is_padding(t)) continue;
      for (Index e = 0; e < routing.experts(); ++e) {
        if (!forbidden(routing.logits(t, e))) {
          sum[e] += std::exp(routing.logits(t, e) - largest[e]);
        }
      }
    }
    for (Index e = 0; e < routing.experts(); ++e) {
      if (sum[e] > T(0)) result[e] = largest[e] + std::log(sum[e]);
    }
  }

  /// d z_te += s_te * (d s_te - sum_u s_ue * d s_ue), d s being zero for pairs not taken.
  void add_backward_over_tokens(const Routing<T>& routing, Index begin, Index end,
                                RoutingGradient<T>& gradient) const {
    RowVector<T>& normaliser = routing.scratch[0];
    logsumexp_over_tokens(routing, begin, end, normaliser);
    RowVector<T>& inner = routing.scratch[1];
    inner.setZero(routing.experts());
    for (Index t = begin; t < end; ++t) {
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        const auto i = static_cast<std::size_t>(a);
        inner[routing.expert[i]] += routing.weight[i] * gradient.weights[a];
      }
    }
    parallel_rows(end - begin, 16 * routing.experts(), [&](Index first, Index last) {
      for (Index t = begin + first; t < begin + last; ++t) {
        if (routing.is_padding(t)) continue;
        T* const d_logits = gradient.logits.row(t).data();
        for (Index e = 0; e < routing.experts(); ++e) {
          if (forbidden(routing.logits(t, e))) continue;
          d_logits[e] -= std::exp(routing.logits(t, e) - normaliser[e]) * inner[e];
        }
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          const auto i = static_cast<std::size_t>(a);
          d_logits[routing.expert[i]] += routing.weight[i] * gradient.weights[a];
        }
      }
    });
  }
};

}  // namespace weir
