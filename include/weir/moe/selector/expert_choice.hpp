// SPDX-License-Identifier: MIT
/// \file
/// Experts choose tokens, instead of tokens experts (Zhou et al. 2022, arXiv:2202.09368).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// What the scores of ExpertChoice are normalised over.
enum class ScoresOver {
  kExperts,  ///< The experts of each token: the paper, flaxformer.
  kTokens,   ///< The real tokens of each group, for each expert: Mesh TensorFlow.
};

/// Settings of ExpertChoice.
struct ExpertChoiceConfig {
  double factor = 2.0;
  ScoresOver over = ScoresOver::kExperts;
  Scope scope = Scope::kBatch;
  Rounding rounding = Rounding::kUp;
  Index multiple = 1;   ///< C is rounded up to a multiple of it.
  bool divide = false;  ///< Divides weights by the number of experts that serve the token.
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
/// Whichever the scores, `probabilities` are the softmax over the experts. An expert to which the
/// pass allows fewer than C tokens takes them all. `experts` in C are those that the pass allows to
/// some token.
///
/// Not causal: whether a token is taken depends on later ones. A decoder trained with it sees the
/// future, and one that generates token by token routes differently.
///
/// (Zhou et al. 2022, arXiv:2202.09368, section 3.2; scores over the tokens and the division:
/// Mesh TensorFlow, moe.py, `_expert_selection_gating`.)
template <std::floating_point T>
class ExpertChoice : public SelectorBase<T> {
 public:
  struct Cache {
    List<Index> taken;        ///< [tokens * experts], group by group and expert by expert a place
                              ///< for each token of the group: the tokens that the expert takes,
                              ///< then kEnd if there is room.
    Matrix<T> normaliser;     ///< [groups, experts], log sum_t exp(z_te) over the real tokens of
                              ///< the group; only for scores over the tokens.
    RowVector<T> per_expert;  ///< Workspace.
  };

  explicit ExpertChoice(ExpertChoiceConfig config = {}) : config_(config) {}

  /// \throws ConfigError  unless factor is finite and > 0, and multiple >= 1.
  void check(Index /*experts*/) const {
    expect_positive("ExpertChoice", "factor", config_.factor);
    expect_at_least<Index>("ExpertChoice", "multiple", config_.multiple, 1);
  }

  /// C for a group of `tokens` real tokens; 0 if there are none.
  Index capacity(Index tokens, Index experts) const;

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const;

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& cache) const;

  const ExpertChoiceConfig& config() const { return config_; }

 private:
  static constexpr Index kEnd = -1;

  /// What the scores of token t are multiplied by.
  T share_of(const Routing<T>& routing, Index t) const {
    const Index serving = routing.last(t) - routing.first(t);
    return config_.divide && serving > 0 ? T(1) / static_cast<T>(serving) : T(1);
  }

  /// Writes the tokens that expert e takes. The softmax over tokens has the order of the logits.
  void take(const Routing<T>& routing, Index begin, Index end, Index e, Index count,
            Index* taken) const;

  /// Calls `body(token, expert)` for each pair taken, the experts of a token in ascending order.
  template <class Body>
  void for_each_taken(const Routing<T>& routing, const Cache& cache, Body&& body) const {
    const Index experts = routing.experts();
    routing.rows.for_each_group(config_.scope, [&](Index begin, Index end) {
      const Index* taken = cache.taken.data() + begin * experts;
      for (Index e = 0; e < experts; ++e, taken += end - begin) {
        for (Index i = 0; i < end - begin && taken[i] != kEnd; ++i) body(taken[i], e);
      }
    });
  }

  /// Turns the tokens of each expert into the experts of each token.
  void list(Routing<T>& routing, const Cache& cache) const;

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

  void weigh_over_tokens(Routing<T>& routing, Cache& cache) const;

  /// log sum_t exp(z_te) over the real tokens; -infinity where all are forbidden.
  template <class Row>
  static void logsumexp_over_tokens(const Routing<T>& routing, Index begin, Index end,
                                    RowVector<T>& sum, Row& result) {
    result.setConstant(-std::numeric_limits<T>::infinity());
    for (Index t = begin; t < end; ++t) {
      if (!routing.rows.is_padding(t)) result = result.cwiseMax(routing.logits.row(t));
    }
    set_zero(sum, routing.experts());
    for (Index t = begin; t < end; ++t) {
      if (routing.rows.is_padding(t)) continue;
      for (Index e = 0; e < routing.experts(); ++e) {
        if (!routing.is_forbidden(t, e)) sum[e] += std::exp(routing.logits(t, e) - result[e]);
      }
    }
    for (Index e = 0; e < routing.experts(); ++e) {
      if (sum[e] > T(0)) result[e] += std::log(sum[e]);
    }
  }

  /// d z_te += s_te * (d s_te - sum_u s_ue * d s_ue), d s being zero for pairs not taken.
  void add_backward_over_tokens(const Routing<T>& routing, RoutingGradient<T>& gradient,
                                Cache& cache) const;

  ExpertChoiceConfig config_;
};

template <std::floating_point T>
Index ExpertChoice<T>::capacity(Index tokens, Index experts) const {
  const double exact = config_.factor * static_cast<double>(tokens) / static_cast<double>(experts);
  const double rounded = config_.rounding == Rounding::kDown ? std::floor(exact)
                         : config_.rounding == Rounding::kUp ? std::ceil(exact)
                                                             : std::nearbyint(exact);
  const auto limit = static_cast<double>(tokens);
  if (rounded >= limit) return tokens;
  const Index count = std::max(static_cast<Index>(rounded), Index(1));
  const Index beyond = count % config_.multiple;
  if (beyond == 0) return count;
  const Index missing = config_.multiple - beyond;
  return missing >= tokens - count ? tokens : count + missing;
}

template <std::floating_point T>
void ExpertChoice<T>::forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing,
                              Cache& cache) const {
  check(logits.cols());
  routing.begin("ExpertChoice", logits, pass);
  const Index experts = routing.experts();
  routing.rows.for_each_real(16 * experts, [&](Index t) {
    softmax_row<T>(row_span(routing.logits, t), row_span(routing.probabilities, t));
  });
  cache.taken.resize(routing.tokens() * experts);
  routing.rows.for_each_group(config_.scope, [&](Index begin, Index end) {
    const Index count = capacity(routing.rows.real(begin, end), routing.open_experts());
    parallel_rows(experts, 16 * (end - begin), [&](Index first, Index last) {
      for (Index e = first; e < last; ++e) {
        take(routing, begin, end, e, count,
             cache.taken.data() + begin * experts + e * (end - begin));
      }
    });
  });
  list(routing, cache);
  if (config_.over == ScoresOver::kTokens) {
    weigh_over_tokens(routing, cache);
  } else {
    weigh(routing, 0, routing.tokens(),
          [&](Index t, Index e) { return routing.probabilities(t, e); });
  }
}

template <std::floating_point T>
void ExpertChoice<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                               Cache& cache) const {
  const Index experts = routing.experts();
  if (config_.over == ScoresOver::kTokens) add_backward_over_tokens(routing, gradient, cache);
  routing.rows.for_each_real(8 * experts, [&](Index t) {
    T* dp = gradient.probabilities.row(t).data();
    if (config_.over == ScoresOver::kExperts) {
      const T share = share_of(routing, t);
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        dp[routing.expert[a]] += share * gradient.weights[a];
      }
    }
    add_softmax_backward_row<T>(row_span(routing.probabilities, t), span_of(dp, experts),
                                row_span(gradient.logits, t));
  });
}

template <std::floating_point T>
void ExpertChoice<T>::take(const Routing<T>& routing, Index begin, Index end, Index e, Index count,
                           Index* taken) const {
  const Matrix<T>& score =
      config_.over == ScoresOver::kTokens ? routing.logits : routing.probabilities;
  Index candidates = 0;
  for (Index t = begin; t < end; ++t) {
    if (!routing.rows.is_padding(t) && !routing.is_forbidden(t, e)) taken[candidates++] = t;
  }
  if (candidates > count) {
    std::nth_element(taken, taken + count, taken + candidates, [&](Index a, Index b) {
      return score(a, e) != score(b, e) ? score(a, e) > score(b, e) : a < b;
    });
    candidates = count;
  }
  if (candidates < end - begin) taken[candidates] = kEnd;
}

template <std::floating_point T>
void ExpertChoice<T>::list(Routing<T>& routing, const Cache& cache) const {
  List<Index>& offsets = routing.offsets;
  for_each_taken(routing, cache, [&](Index t, Index) { ++offsets[t + 1]; });
  for (Index t = 1; t < offsets.count(); ++t) offsets[t] += offsets[t - 1];
  routing.expert.resize(offsets.back());
  routing.weight.resize(offsets.back());
  routing.kept.assign(offsets.back(), 1);
  // Filling moves the offset of each token to its end, which is where the next one begins.
  for_each_taken(routing, cache, [&](Index t, Index e) { routing.expert[offsets[t]++] = e; });
  std::copy_backward(offsets.begin(), offsets.end() - 1, offsets.end());
  offsets[0] = 0;
}

template <std::floating_point T>
void ExpertChoice<T>::weigh_over_tokens(Routing<T>& routing, Cache& cache) const {
  const Index groups =
      config_.scope == Scope::kSequence ? routing.rows.sequences().count() : Index(1);
  set_shape(cache.normaliser, groups, routing.experts());
  Index group = 0;
  routing.rows.for_each_group(config_.scope, [&](Index begin, Index end) {
    auto normaliser = cache.normaliser.row(group++);
    logsumexp_over_tokens(routing, begin, end, cache.per_expert, normaliser);
    weigh(routing, begin, end,
          [&](Index t, Index e) { return std::exp(routing.logits(t, e) - normaliser[e]); });
  });
}

template <std::floating_point T>
void ExpertChoice<T>::add_backward_over_tokens(const Routing<T>& routing,
                                               RoutingGradient<T>& gradient, Cache& cache) const {
  Index group = 0;
  routing.rows.for_each_group(config_.scope, [&](Index begin, Index end) {
    const auto normaliser = cache.normaliser.row(group++);
    RowVector<T>& inner = cache.per_expert;
    set_zero(inner, routing.experts());
    for (Index a = routing.first(begin); a < routing.offsets[end]; ++a) {
      inner[routing.expert[a]] += routing.weight[a] * gradient.weights[a];
    }
    parallel_rows(end - begin, 16 * routing.experts(), [&](Index first, Index last) {
      for (Index t = begin + first; t < begin + last; ++t) {
        if (routing.rows.is_padding(t)) continue;
        T* const d_logits = gradient.logits.row(t).data();
        for (Index e = 0; e < routing.experts(); ++e) {
          if (routing.is_forbidden(t, e)) continue;
          d_logits[e] -= std::exp(routing.logits(t, e) - normaliser[e]) * inner[e];
        }
        for (Index a = routing.first(t); a < routing.last(t); ++a) {
          d_logits[routing.expert[a]] += routing.weight[a] * gradient.weights[a];
        }
      }
    });
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::ExpertChoice<float>;
extern template class weir::ExpertChoice<double>;
#endif
