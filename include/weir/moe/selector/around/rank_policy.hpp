// SPDX-License-Identifier: MIT
/// \file
/// Whether a token's second and further experts are worth their place: GShard, Mesh TensorFlow,
/// ST-MoE, FastMoE, NLLB.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/around/selector_wrapper.hpp>

namespace weir {

/// Which assignments of rank 2 and beyond RankPolicy keeps.
enum class RankRule {
  kAll,        ///< All.
  kNone,       ///< None: the token goes to its first expert only.
  kThreshold,  ///< Those with a share above the threshold.
  kRandom,     ///< Those with a share above u * threshold, u ~ U[0, 1) drawn for each: the chance
               ///< is share / threshold, at most 1. Needs `pass.rng`.
};

/// Settings of RankPolicy. The thresholds are those of rank 2, 3, ...; the last one holds for all
/// ranks beyond, too.
struct RankPolicyConfig {
  RankRule train = RankRule::kRandom;
  RankRule evaluate = RankRule::kThreshold;
  List<double> train_threshold = {0.2};
  List<double> evaluate_threshold = {0.2};
  bool of_weight = false;  ///< Whether the share is the weight itself, not its part of the sum of
                           ///< the token's weights.
};

/// Any selector, some of whose second and further choices are rejected before a capacity sees them.
/// Rank 1 always stays. The share of the assignment of rank r is
///
///     s_r = g_r / sum_j g_j       j over all ranks of the token
///     s_r = g_r                   with of_weight, as NLLB, which decides on raw probabilities
///
/// and with the threshold tau_r it stays if
///
///     s_r > tau_r         kThreshold
///     s_r > u * tau_r     kRandom
///
/// A rejected assignment is one that is not kept: it takes no place in an expert. Balancers count
/// it, and so does a CapacityFactor that computes C from assignments; PassDropped passes its token
/// on. Its weight is not given to the token's other experts: the weights of a token with
/// renormalised weights then sum to less than 1 (Mesh TensorFlow, ST-MoE). To renormalise after the
/// drop, as NLLB may, see RenormaliseKept.
///
/// What a token keeps depends on no other token: causal. Which is rejected is constant to the
/// derivative; the weights have the gradient that the inner selector gives them.
///
/// The rules with tau = 0.2 in training and evaluation: Mesh TensorFlow, which draws in evaluation
/// too unless told otherwise, and ST-MoE (Zoph et al. 2022, arXiv:2202.08906), in st-moe-pytorch
/// with a threshold for each rank. GShard (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1) and
/// FastMoE keep the second expert if 2 g_2 > u: kRandom with a threshold of 1/2; so does NLLB's
/// second_expert_policy "random" (NLLB Team 2022, arXiv:2207.04672), in Hugging Face's code with
/// of_weight on raw probabilities. For its "sampling", see SampledChoice.
template <class Inner>
class RankPolicy : public SelectorWrapper<Inner> {
 public:
  using T = typename Inner::Scalar;
  using typename SelectorWrapper<Inner>::Cache;

  /// \throws ConfigError  unless there are thresholds, all of them finite and >= 0.
  explicit RankPolicy(Inner inner, RankPolicyConfig config = {})
      : SelectorWrapper<Inner>(std::move(inner)), config_(std::move(config)) {
    check_thresholds("train_threshold", config_.train_threshold);
    check_thresholds("evaluate_threshold", config_.evaluate_threshold);
  }

  /// \param logits   [tokens, experts]
  /// \throws ConfigError     as the inner selector; if a random rule has no pass.rng.
  /// \throws NonFiniteError  as the inner selector.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const {
    inner_.forward(logits, pass, routing, cache.inner);
    if (rule(pass) != RankRule::kRandom) {
      return reject(pass, routing, [](Index) { return 0.0; });
    }
    const Rng draws = pass.generator("RankPolicy").split();
    reject(pass, routing,
           [&](Index a) { return unit_interval(draws.at(static_cast<std::uint64_t>(a))); });
  }

  /// Clears `kept` of what the rule for the pass rejects in a routing of the inner selector.
  /// \param draw     `draw(a)` is u of the assignment a, for a random rule.
  template <class Draw>
  void reject(const Pass& pass, Routing<T>& routing, Draw&& draw) const {
    const RankRule active = rule(pass);
    if (active == RankRule::kAll) return;
    const List<double>& thresholds =
        pass.training ? config_.train_threshold : config_.evaluate_threshold;
    for (Index t = 0; t < routing.tokens(); ++t) {
      const Index first = routing.first(t);
      const Index last = routing.last(t);
      double total = 1.0;
      if (!config_.of_weight) {
        total = 0.0;
        for (Index a = first; a < last; ++a) total += weight_of(routing, a);
      }
      for (Index a = first + 1; a < last; ++a) {
        const double threshold = thresholds[std::min(a - first, thresholds.count()) - 1];
        const double least = active == RankRule::kThreshold ? threshold : draw(a) * threshold;
        const bool keep = active != RankRule::kNone && weight_of(routing, a) > least * total;
        if (!keep) routing.kept[a] = 0;
      }
    }
  }

  const RankPolicyConfig& config() const { return config_; }

 private:
  RankRule rule(const Pass& pass) const { return pass.training ? config_.train : config_.evaluate; }

  static double weight_of(const Routing<T>& routing, Index assignment) {
    return static_cast<double>(routing.weight[assignment]);
  }

  static void check_thresholds(const std::string& name, const List<double>& thresholds) {
    if (thresholds.empty()) {
      throw_error<ConfigError>("RankPolicy: ", name, " is empty, expected at least one threshold");
    }
    for (Index i = 0; i < thresholds.count(); ++i) {
      expect_at_least("RankPolicy", name + "[" + std::to_string(i) + "]", thresholds[i], 0.0);
    }
  }

  using SelectorWrapper<Inner>::inner_;
  RankPolicyConfig config_;
};

}  // namespace weir
