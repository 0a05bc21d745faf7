// SPDX-License-Identifier: MIT
/// \file
/// Every expert gets the same number of tokens, by a linear assignment: BASE layers (Lewis et al.
/// 2021, arXiv:2103.16716).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/level_loads.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// Settings of BalancedAssignment.
struct BalancedAssignmentConfig {
  double epsilon = 1e-3;   ///< How far from the best assignment the auction may end.
  Index most_bids = 1000;  ///< How many bids the auction may take for each token, on average.
};

/// One expert a_t for each token, with the weight sigmoid(z_ta). In training
///
///     maximise sum_t z_ta   subject to   each expert having T / experts tokens
///
/// (rounded down or up where that is no integer), T being the number of real tokens of the batch;
/// in evaluation a_t is the expert of the largest logit, the lowest index among equal ones.
///
/// The assignment is found by an auction: a token bids for the place it likes best at the prices of
/// the moment, and puts out the token that had it. Its total is within
///
///     (T + experts) * epsilon * (largest logit - smallest logit)
///
/// of the best one; a smaller epsilon takes more bids. It is held several times, first with a large
/// epsilon, each time with a quarter of the one before and from the prices that were left. An
/// auction of `most_bids` * T bids is broken off: the tokens that have no place then go, in their
/// order, to the best expert that has one left. Every expert still has its T / experts tokens; what
/// is lost is the bound on the total. The choice is constant to the derivative, which reaches the
/// logits through the weight and through the probabilities (softmax(z)).
///
/// Experts that the pass switches off for all tokens are left out, also of the number of experts.
/// Where it forbids others to some tokens, as experts of one modality, experts have as many tokens
/// as `LevelLoads` says, which is T / experts only if the pass allows that; if the auction is
/// broken off then, its assignment is taken. Not causal in training: a later token can put out an
/// earlier one. Causal in evaluation.
///
/// (Lewis et al. 2021, arXiv:2103.16716, eq. 1-4; Bertsekas 1992, "Auction algorithms for network
/// flow problems".)
template <std::floating_point T>
class BalancedAssignment : public SelectorBase<T> {
 public:
  /// Workspace of the auction, one entry for each place.
  struct Cache {
    List<T> price;
    List<Index> owner;
    List<Index> load;   ///< [experts], how many tokens an expert has.
    List<Index> first;  ///< [open experts + 1], where the places begin that each has to fill.
    LevelLoads level;   ///< Where some tokens are forbidden some of the open experts.
  };

  explicit BalancedAssignment(BalancedAssignmentConfig config = {}) : config_(config) {}

  /// \throws ConfigError  unless 1e-6 <= epsilon <= 1 and most_bids >= 1.
  void check(Index /*experts*/) const {
    expect_in("BalancedAssignment", "epsilon", config_.epsilon, 1e-6, 1.0);
    expect_at_least<Index>("BalancedAssignment", "most_bids", config_.most_bids, 1);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  /// \throws ConfigError     as `check`.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const;

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& /*cache*/) const;

  const BalancedAssignmentConfig& config() const { return config_; }

 private:
  static constexpr Index kFree = -1;
  static constexpr double kFirstEpsilon = 0.25;

  /// The places of an expert: those it has to fill, or the one more it may have. They form a heap,
  /// the cheapest first.
  struct Places {
    T* price;
    Index* owner;
    Index count;

    /// The second lowest price; infinite if there is only one place.
    T second() const {
      T result = std::numeric_limits<T>::infinity();
      for (Index i = 1; i < std::min(count, Index(3)); ++i) result = std::min(result, price[i]);
      return result;
    }

    /// Gives the cheapest place to `token` for `bid`.
    /// \return         The token that had it.
    Index sell(Index token, T bid) const {
      const Index before = owner[0];
      Index i = 0;
      for (Index child = 1; child < count; child = 2 * i + 1) {
        if (child + 1 < count && price[child + 1] < price[child]) ++child;
        if (!(price[child] < bid)) break;
        price[i] = price[child];
        owner[i] = owner[child];
        i = child;
      }
      price[i] = bid;
      owner[i] = token;
      return before;
    }
  };

  /// Where T does not divide evenly, each expert has one place more than it has to fill. Tokens
  /// contend for these with nobodies, one for each place that has to stay empty.
  void auction(Routing<T>& routing, Cache& cache) const;

  /// Gives the experts of the places' owners to the tokens, and to each token without a place the
  /// best expert with fewer than `full`, or else with fewer than `full + more` tokens. Then moves
  /// tokens from experts with more than `full` to those with fewer.
  static void settle(Routing<T>& routing, Index full, Index more, Cache& cache);

  BalancedAssignmentConfig config_;
};

template <std::floating_point T>
void BalancedAssignment<T>::forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing,
                                    Cache& cache) const {
  check(logits.cols());
  routing.begin("BalancedAssignment", logits, pass, 1);
  routing.assign_each(1);
  if (pass.training) auction(routing, cache);
  const Index experts = routing.experts();
  routing.rows.for_each_real(16 * experts, [&](Index t) {
    const T* const z = routing.logits.row(t).data();
    const Index a = routing.first(t);
    if (!pass.training) top_k<T>(span_of(z, experts), {&routing.expert[a], 1});
    softmax_row<T>(span_of(z, experts), row_span(routing.probabilities, t));
    routing.weight[a] = T(1) / (T(1) + std::exp(-z[routing.expert[a]]));
  });
}

template <std::floating_point T>
void BalancedAssignment<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                                     Cache& /*cache*/) const {
  const Index experts = routing.experts();
  routing.rows.for_each_real(8 * experts, [&](Index t) {
    const Index a = routing.first(t);
    const T w = routing.weight[a];
    T* const dz = gradient.logits.row(t).data();
    dz[routing.expert[a]] += w * (T(1) - w) * gradient.weights[a];
    add_softmax_backward_row<T>(row_span(routing.probabilities, t),
                                row_span(gradient.probabilities, t), span_of(dz, experts));
  });
}

template <std::floating_point T>
void BalancedAssignment<T>::auction(Routing<T>& routing, Cache& cache) const {
  const Index experts = routing.open_experts();
  const Index tokens = routing.tokens();
  const Index real = routing.rows.real();
  if (real == 0) return;
  T smallest = std::numeric_limits<T>::infinity();
  T largest = -smallest;
  bool some_forbidden = false;
  for (Index t = 0; t < tokens; ++t) {
    if (routing.rows.is_padding(t)) continue;
    for (const Index e : routing.open) {
      if (routing.is_forbidden(t, e)) {
        some_forbidden = true;
        continue;
      }
      smallest = std::min(smallest, routing.logits(t, e));
      largest = std::max(largest, routing.logits(t, e));
    }
  }
  const Index full = real / experts;
  const Index more = some_forbidden || real % experts == 0 ? 0 : 1;
  if (some_forbidden) cache.level.level(routing);
  cache.first.assign(1, 0);
  for (const Index e : routing.open) {
    cache.first.push_back(cache.first.back() + (some_forbidden ? cache.level.load()[e] : full));
  }
  const Index to_fill = cache.first.back();
  const Index places = to_fill + experts * more;
  cache.price.assign(places, T(0));
  cache.owner.assign(places, kFree);
  // Of open expert number i.
  const auto places_of = [&](Index i, bool extra) {
    const Index first = extra ? to_fill + i : cache.first[i];
    return Places{cache.price.data() + first, cache.owner.data() + first,
                  extra ? more : cache.first[i + 1] - cache.first[i]};
  };
  const T range = largest > smallest ? largest - smallest : T(1);
  T least_raise = T(0);

  const double most = static_cast<double>(config_.most_bids) * static_cast<double>(real);
  double bids = 0.0;
  const auto bid = [&](Index token) {
    const bool nobody = token >= tokens;
    T best = -std::numeric_limits<T>::infinity();
    T next = best;
    Places wanted{};
    for (Index i = 0; i < experts; ++i) {
      const T value = nobody ? T(0) : routing.logits(token, routing.open[i]);
      for (const bool extra : {false, true}) {
        const Places offer = places_of(i, extra);
        if (offer.count == 0 || (nobody && !extra)) continue;
        const T gain = value - offer.price[0];
        if (gain > best) {
          next = std::max(best, value - offer.second());
          best = gain;
          wanted = offer;
        } else {
          next = std::max(next, gain);
        }
      }
    }
    // Who has no other choice may pay any price.
    const T raise = (std::isfinite(next) ? best - next
                     : some_forbidden    ? range
                                         : T(0)) +
                    least_raise;
    const T up = std::nextafter(wanted.price[0], std::numeric_limits<T>::infinity());
    return wanted.sell(token, std::max(wanted.price[0] + raise, up));
  };
  const auto seat = [&](Index token) {
    for (; token != kFree && bids < most; ++bids) token = bid(token);
  };
  for (double epsilon = std::max(config_.epsilon, kFirstEpsilon);; epsilon *= 0.25) {
    const double last = std::max(epsilon, config_.epsilon);
    least_raise = static_cast<T>(last) * range;
    std::fill(cache.owner.begin(), cache.owner.end(), kFree);
    for (Index t = 0; t < tokens; ++t) {
      if (!routing.rows.is_padding(t)) seat(t);
    }
    for (Index i = 0; i < places - real; ++i) seat(tokens + i);
    if (epsilon <= config_.epsilon || bids >= most) break;
  }
  if (!some_forbidden) {
    settle(routing, full, more, cache);
    return;
  }
  for (Index t = 0; t < tokens; ++t) {
    if (!routing.rows.is_padding(t)) routing.expert[routing.first(t)] = cache.level.expert_of(t);
  }
  if (bids >= most) return;  // Some token may have no place.
  for (Index i = 0; i < experts; ++i) {
    for (Index place = cache.first[i]; place < cache.first[i + 1]; ++place) {
      routing.expert[routing.first(cache.owner[place])] = routing.open[i];
    }
  }
}

template <std::floating_point T>
void BalancedAssignment<T>::settle(Routing<T>& routing, Index full, Index more, Cache& cache) {
  const Index experts = routing.open_experts();
  const Index tokens = routing.tokens();
  std::fill(routing.expert.begin(), routing.expert.end(), kFree);
  List<Index>& load = cache.load;
  load.assign(routing.experts(), 0);
  for (Index place = 0; place < cache.owner.count(); ++place) {
    const Index owner = cache.owner[place];
    if (owner == kFree || owner >= tokens) continue;
    const Index i = place < experts * full ? place / full : place - experts * full;
    routing.expert[routing.first(owner)] = routing.open[i];
    ++load[routing.open[i]];
  }
  // The best expert for the token with fewer than `bound` tokens; kFree if there is none.
  const auto best_below = [&](Index token, Index bound) {
    Index best = kFree;
    for (const Index e : routing.open) {
      if (load[e] >= bound) continue;
      if (best == kFree || routing.logits(token, e) > routing.logits(token, best)) best = e;
    }
    return best;
  };
  for (Index t = 0; t < tokens; ++t) {
    if (routing.rows.is_padding(t) || routing.expert[routing.first(t)] != kFree) continue;
    Index e = best_below(t, full);
    if (e == kFree) e = best_below(t, full + more);
    routing.expert[routing.first(t)] = e;
    ++load[e];
  }
  for (Index t = 0; t < tokens; ++t) {
    if (routing.rows.is_padding(t) || load[routing.expert[routing.first(t)]] <= full) continue;
    const Index e = best_below(t, full);
    if (e == kFree) break;
    --load[routing.expert[routing.first(t)]];
    routing.expert[routing.first(t)] = e;
    ++load[e];
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::BalancedAssignment<float>;
extern template class weir::BalancedAssignment<double>;
#endif
