// SPDX-License-Identifier: MIT
/// \file
/// Quantile balancing: the selection bias that would have levelled the last step's load.
#pragma once

#include <algorithm>
#include <concepts>
#include <functional>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/selection_bias.hpp>

namespace weir {

/// Settings of QuantileBalance.
struct QuantileBalanceConfig {
  double momentum = 0.0;  ///< Of the moving average over steps; 0 takes the last step's offsets.
  bool recentre = true;   ///< Shift the offsets to mean zero after each move.
};

/// Keeps an offset beta_e for each expert, the negative of the selection bias of a selector that
/// chooses the k largest p_e - beta_e. After each optimizer step,
///
///     alpha_t = the (k+1)-th largest of p_te - beta_e over e
///     local_e = the (T k / experts + 1)-th largest of p_te - alpha_t over t
///     beta   <- momentum * beta + (1 - momentum) * local,   then, if recentred, less its mean
///
/// over the T real tokens of all backward passes since the last update: micro-batches count as one
/// batch. alpha_t is what an expert has to exceed to be among the k of token t, and local_e the
/// offset with which expert e would be so for its even share of tokens, the other offsets being as
/// they are. Where T k is no multiple of experts, the rank is rounded down (Megatron-Core refuses).
/// With k = experts, and where nothing was counted, beta stays. There is no loss.
///
/// The scores are `routing.probabilities`, to which the selector has to add its bias, as
/// BiasedSoftmaxTopK does; others do not compile. k is the mean number of experts of a token,
/// rounded down. Ranks are balanced each by itself. (Megatron-Core, `qb_dual_update`, with recentre
/// = false: the dual update of an optimal-transport problem.)
template <std::floating_point T>
class QuantileBalance {
 public:
  static constexpr std::string_view kName = "quantile";

  /// \throws ConfigError  unless 0 <= momentum < 1.
  explicit QuantileBalance(QuantileBalanceConfig config = {}) : config_(config) { check(); }

  void check() const {
    if (!(config_.momentum >= 0.0 && config_.momentum < 1.0)) {
      fail<ConfigError>("QuantileBalance: momentum = ", config_.momentum,
                        ", expected 0 <= momentum < 1");
    }
  }

  void observe(const Routing<T>& routing) {
    if (routing.experts() != experts_) {
      scores_.clear();
      assignments_ = 0;
      experts_ = routing.experts();
    }
    for (Index t = 0; t < routing.tokens(); ++t) {
      if (routing.is_padding(t)) continue;
      const T* const p = &routing.probabilities(t, 0);
      scores_.insert(scores_.end(), p, p + experts_);
    }
    assignments_ += routing.assignments();
  }

  /// Moves the bias and starts counting anew.
  /// \throws ConfigError  if the selector is of another number of experts than what was counted.
  template <BiasedSelector S>
  requires(S::kBiasesProbabilities) void update(S& selector) {
    const Index tokens = experts_ > 0 ? static_cast<Index>(scores_.size()) / experts_ : 0;
    const Index k = tokens > 0 ? assignments_ / tokens : 0;
    if (tokens > 0 && k < experts_) {
      expect_selection_bias("QuantileBalance::update", selector.selection_bias(), experts_);
      Matrix<T>& bias = selector.selection_bias().value;
      local_offsets(tokens, k, bias);
      const auto keep = static_cast<T>(config_.momentum);
      for (Index e = 0; e < experts_; ++e) {
        bias(0, e) = keep * bias(0, e) - (T(1) - keep) * local_[static_cast<std::size_t>(e)];
      }
      if (config_.recentre) bias.array() -= bias.mean();
    }
    scores_.clear();
    assignments_ = 0;
  }

  const QuantileBalanceConfig& config() const { return config_; }

 private:
  T score(Index t, Index e) const { return scores_[static_cast<std::size_t>(t * experts_ + e)]; }

  /// Element `rank` of `numbers`, the largest being element 0.
  static T ranked(std::vector<T>& numbers, Index rank) {
    const auto nth = numbers.begin() + rank;
    std::nth_element(numbers.begin(), nth, numbers.end(), std::greater<>());
    return *nth;
  }

  void local_offsets(Index tokens, Index k, const Matrix<T>& bias) {
    alpha_.resize(static_cast<std::size_t>(tokens));
    sorted_.resize(static_cast<std::size_t>(experts_));
    for (Index t = 0; t < tokens; ++t) {
      for (Index e = 0; e < experts_; ++e) {
        sorted_[static_cast<std::size_t>(e)] = score(t, e) + bias(0, e);
      }
      alpha_[static_cast<std::size_t>(t)] = ranked(sorted_, k);
    }
    local_.resize(static_cast<std::size_t>(experts_));
    sorted_.resize(static_cast<std::size_t>(tokens));
    const Index share = tokens * k / experts_;  // Below `tokens`, since k < experts.
    for (Index e = 0; e < experts_; ++e) {
      for (Index t = 0; t < tokens; ++t) {
        const auto i = static_cast<std::size_t>(t);
        sorted_[i] = score(t, e) - alpha_[i];
      }
      local_[static_cast<std::size_t>(e)] = ranked(sorted_, share);
    }
  }

  QuantileBalanceConfig config_;
  Index experts_ = 0;
  Index assignments_ = 0;
  std::vector<T> scores_;  // [tokens, experts] of the step so far.
  std::vector<T> alpha_, local_, sorted_;
};

}  // namespace weir
