// SPDX-License-Identifier: MIT
/// \file
/// Quantile balancing: the selection bias that would have levelled the last step's load.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/moe/balance/mark_allowed.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/selection_bias.hpp>

namespace weir {

/// Settings of QuantileBalance.
struct QuantileBalanceConfig {
  double momentum = 0.0;  ///< The share of the old offsets in the new ones; 0 takes those of the
                          ///< last step alone.
  bool recentre = true;   ///< Shift the offsets to mean zero after each move.
  Index most_tokens = 65536;  ///< How many tokens are kept between two updates; later ones do not
                              ///< count, so that memory is bounded, also without updates.
};

/// Keeps an offset beta_e for each expert, the negative of the selection bias of a selector that
/// chooses the k largest z_e - beta_e, z being the logits. After each optimizer step,
///
///     alpha_t = the (k+1)-th largest of z_te - beta_e over e
///     local_e = the (T k / experts + 1)-th largest of z_te - alpha_t over t
///     beta   <- momentum * beta + (1 - momentum) * local,   then, if recentred, less its mean
///
/// over the first `most_tokens` of the T real tokens of all backward passes since the last update:
/// micro-batches count as one batch (Megatron-Core takes the mean of their local_e). alpha_t is
/// what an expert has to exceed to be among the k of token t, and local_e the offset with which
/// expert e would be so for its even share of tokens, the other offsets being as they are. Where T
/// k is no multiple of experts, the rank is rounded down (Megatron-Core refuses). With k = experts,
/// and where nothing was counted, beta stays. There is no loss.
///
/// A token that is allowed no more than k experts needs them whatever alpha_t is: z_te - alpha_t is
/// infinite for those, and minus infinity for experts that are forbidden to it. An expert whose
/// local_e is infinite keeps its beta.
///
/// An expert that none of the tokens was allowed (Pass::allowed) keeps its beta, and is left out of
/// all of this, also of the number of experts and of the mean.
///
/// The scores are the logits, to which the selector has to add its bias (kBiasesLogits), as
/// BiasedSoftmaxTopK does; others do not compile. k is the mean number of experts of a token,
/// rounded down. Ranks are balanced each by itself, unless `add_scores` brings together what they
/// counted, as DataParallel does. (Megatron-Core, `qb_dual_update`, with recentre
/// = false: the dual update of an optimal-transport problem.)
template <std::floating_point T>
class QuantileBalance : public BalancerBase {
 public:
  static constexpr std::string_view kName = "quantile";

  /// \throws ConfigError  unless 0 <= momentum < 1 and most_tokens >= 1.
  explicit QuantileBalance(QuantileBalanceConfig config = {}) : config_(config) { check(); }

  void check() const {
    expect_fraction("QuantileBalance", "momentum", config_.momentum);
    expect_at_least<Index>("QuantileBalance", "most_tokens", config_.most_tokens, 1);
  }

  void observe(const Routing<T>& routing);

  /// Moves the bias and starts counting anew.
  /// \throws ConfigError  if the selector is of another number of experts than what was counted.
  template <BiasedSelector S>
  requires(S::kBiasesLogits) void update(S& selector) {
    const Index tokens = experts_ > 0 ? scores_.count() / experts_ : 0;
    const Index k = tokens > 0 ? assignments_ / tokens : 0;
    open_.clear();
    for (Index e = 0; e < experts_; ++e) {
      if (allowed_[e] != 0) open_.push_back(e);
    }
    if (tokens > 0 && k < open_.count()) {
      expect_selection_bias("QuantileBalance::update", selector.selection_bias(), experts_);
      Matrix<T>& bias = selector.selection_bias().value;
      local_offsets(tokens, k, bias);
      const auto keep = static_cast<T>(config_.momentum);
      T sum = T(0);
      for (Index i = 0; i < open_.count(); ++i) {
        T& of_expert = bias(0, open_[i]);
        if (std::isfinite(local_[i])) of_expert = keep * of_expert - (T(1) - keep) * local_[i];
        sum += of_expert;
      }
      if (config_.recentre) {
        const T mean = sum / static_cast<T>(open_.count());
        for (const Index e : open_) bias(0, e) -= mean;
      }
    }
    start();
  }

  /// What has been counted since the last update: the scores of tokens, [tokens, experts], and how
  /// many experts these have together.
  std::span<const T> scores() const { return scores_; }
  Index assignments() const { return assignments_; }

  /// 1 for the experts that any token was allowed since the last update, else 0; empty before the
  /// first pass.
  std::span<const std::uint8_t> allowed() const { return allowed_; }

  /// Counts tokens that another rank has counted, as many as there is room for.
  /// \param scores       [tokens, experts], `assignments` and `allowed` as above.
  /// \throws ShapeError   if passes before it were of another number of experts, or scores are no
  ///                      whole tokens.
  void add_scores(std::span<const T> scores, Index assignments,
                  std::span<const std::uint8_t> allowed);

  /// Forgets the tokens since the last update; for `weir::discard`.
  void discard_self() { start(); }

  const QuantileBalanceConfig& config() const { return config_; }

 private:
  void start() {
    scores_.clear();
    assignments_ = 0;
    allowed_.assign(experts_, 0);
  }

  T score(Index t, Index e) const { return scores_[t * experts_ + e]; }

  /// By how much a score is above alpha, either of which may be minus infinity.
  static T beyond(T score, T alpha) {
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    if (score == -kInfinity) return score;
    return alpha == -kInfinity ? kInfinity : score - alpha;
  }

  /// Element `rank` of `numbers`, the largest being element 0.
  static T ranked(List<T>& numbers, Index rank) {
    const auto nth = numbers.begin() + rank;
    std::nth_element(numbers.begin(), nth, numbers.end(), std::greater<>());
    return *nth;
  }

  void local_offsets(Index tokens, Index k, const Matrix<T>& bias);

  QuantileBalanceConfig config_;
  Index experts_ = 0;
  Index assignments_ = 0;
  List<T> scores_;              // [tokens, experts] of the step so far.
  List<std::uint8_t> allowed_;  // [experts], 1 for those allowed to any token of the step so far.
  List<Index> open_;            // The experts that are.
  List<T> alpha_, local_, sorted_;
};

template <std::floating_point T>
void QuantileBalance<T>::observe(const Routing<T>& routing) {
  if (routing.experts() != experts_) {
    experts_ = routing.experts();
    start();
  }
  mark_allowed(routing, allowed_);
  Index room = config_.most_tokens - (experts_ > 0 ? scores_.count() / experts_ : 0);
  for (Index t = 0; t < routing.tokens() && room > 0; ++t) {
    if (routing.rows.is_padding(t)) continue;
    const T* const z = &routing.logits(t, 0);
    scores_.insert(scores_.end(), z, z + experts_);
    assignments_ += routing.last(t) - routing.first(t);
    --room;
  }
}

template <std::floating_point T>
void QuantileBalance<T>::add_scores(std::span<const T> scores, Index assignments,
                                    std::span<const std::uint8_t> allowed) {
  const auto experts = static_cast<Index>(allowed.size());
  const auto count = static_cast<Index>(scores.size());
  if (experts == 0 || count % experts != 0 || (experts_ > 0 && experts_ != experts)) {
    throw_error<ShapeError>("QuantileBalance::add_scores: ", count, " scores of ", experts,
                            " experts, expected whole tokens of ",
                            experts_ > 0 ? experts_ : experts);
  }
  if (experts_ != experts) {
    experts_ = experts;
    start();
  }
  const Index tokens = count / experts;
  const Index room = config_.most_tokens - scores_.count() / experts_;
  const Index taken = std::min(tokens, room);
  scores_.insert(scores_.end(), scores.begin(), scores.begin() + taken * experts);
  if (taken > 0) assignments_ += assignments * taken / tokens;
  for (Index e = 0; e < experts; ++e) {
    if (element(allowed, e) != 0) allowed_[e] = 1;
  }
}

template <std::floating_point T>
void QuantileBalance<T>::local_offsets(Index tokens, Index k, const Matrix<T>& bias) {
  const Index open = open_.count();
  alpha_.resize(tokens);
  sorted_.resize(open);
  for (Index t = 0; t < tokens; ++t) {
    for (Index i = 0; i < open; ++i) sorted_[i] = score(t, open_[i]) + bias(0, open_[i]);
    alpha_[t] = ranked(sorted_, k);
  }
  local_.resize(open);
  sorted_.resize(tokens);
  const Index share = tokens * k / open;  // Below `tokens`, since k < open.
  for (Index i = 0; i < open; ++i) {
    for (Index t = 0; t < tokens; ++t) sorted_[t] = beyond(score(t, open_[i]), alpha_[t]);
    local_[i] = ranked(sorted_, share);
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::QuantileBalance<float>;
extern template class weir::QuantileBalance<double>;
#endif
