// SPDX-License-Identifier: MIT
/// \file
/// Reinforcement learning from rewards of whole answers: group-relative policy optimisation (GRPO).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <string_view>
#include <vector>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/target_log_probability.hpp>

namespace weir {

/// How much better each answer is than others to the same question, in standard deviations:
///
///     A_i = (r_i - mean(r_1 ... r_G)) / std(r_1 ... r_G)
///
/// The standard deviation is that of a sample, with G - 1 below the sum, as Hugging Face's TRL has
/// it; the papers do not say. In a group without any difference all advantages are 0.
/// (Shao et al. 2024, arXiv:2402.03300; DeepSeek-AI 2025, arXiv:2501.12948.)
///
/// \param rewards  G answers to the first question, then G to the second, ...
/// \param group    G.
/// \return         One for each reward.
/// \throws ConfigError     unless group >= 2 and the rewards are whole groups.
/// \throws NonFiniteError  if a reward is not finite.
inline std::vector<double> group_advantages(std::span<const double> rewards, Index group) {
  expect_at_least<Index>("group_advantages", "group", group, 2);
  const auto count = static_cast<Index>(rewards.size());
  if (count % group != 0) {
    throw_error<ConfigError>("group_advantages: there are ", count,
                             " rewards, expected a multiple of group = ", group);
  }
  for (Index i = 0; i < count; ++i) {
    if (std::isfinite(element(rewards, i))) continue;
    throw_error<NonFiniteError>("group_advantages: rewards[", i, "] = ", element(rewards, i),
                                ", expected a finite number");
  }
  std::vector<double> advantages(rewards.size(), 0.0);
  for (Index first = 0; first < count; first += group) {
    const auto own =
        rewards.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(group));
    const auto [least, most] = std::minmax_element(own.begin(), own.end());
    if (*least == *most) continue;  // Rounding of the mean would look like a difference.
    double mean = 0.0;
    for (const double r : own) mean += r / static_cast<double>(group);
    double squares = 0.0;
    for (const double r : own) squares += (r - mean) * (r - mean);
    const double deviation = std::sqrt(squares / static_cast<double>(group - 1));
    for (Index i = 0; i < group; ++i) {
      advantages[static_cast<std::size_t>(first + i)] = (element(own, i) - mean) / deviation;
    }
  }
  return advantages;
}

/// Questions with answers, as sequences of one pass. Each row's target is the token behind it where
/// that belongs to an answer: answers are learned, questions are not.
template <std::floating_point T>
struct PolicyBatch {
  std::vector<Index> ids;
  std::vector<Index> targets;  ///< One per id; kNoTarget within questions.
  Sequences sequences;
  std::vector<T> advantage;  ///< A of the row's answer.
  std::vector<T> share;      ///< 1 / |o| where there is a target, |o| being the answer's length.
  List<T> old;               ///< log p of the targets under the policy that has drawn them.
  List<T> reference;         ///< The same under the reference model; see PolicyLoss.

  /// Forgets everything but the memory.
  void clear() {
    for (auto* list : {&ids, &targets}) list->clear();
    for (auto* list : {&advantage, &share}) list->clear();
    sequences.clear();
    old.clear();
    reference.clear();
  }

  /// Adds a sequence: the question and the answer without its last token, which nothing follows.
  /// \param old_log_p  One for each token of the answer, such as those of a RolloutRecorder; or
  ///                   none, and `set_old` comes later.
  /// \throws ConfigError  if question or answer is empty, or the advantage is not finite.
  /// \throws ShapeError   unless old_log_p is empty or has one entry for each token of the answer.
  ///                      In these cases nothing has changed.
  void add(TokenIds question, TokenIds answer, double answer_advantage,
           std::span<const T> old_log_p = {});

  Index answers() const { return sequences.count(); }

  /// A pass that trains on the batch, which has to outlive it.
  Pass training(Rng* rng = nullptr) const {
    return {.training = true, .sequences = &sequences, .rng = rng};
  }
  /// A pass that only looks at probabilities.
  Pass evaluation() const { return {.sequences = &sequences}; }

  /// Sets the log-probabilities of the targets under the policy that has drawn them, where they
  /// were not recorded.
  /// \param logits   Of a pass of that policy over the batch.
  /// \throws              As `target_log_probabilities`.
  void set_old(MatrixIn<T> logits) { set(old, logits); }
  /// The same under the reference model.
  void set_reference(MatrixIn<T> logits) { set(reference, logits); }

 private:
  void set(List<T>& log_p, MatrixIn<T> logits) {
    log_p.resize(logits.rows());
    target_log_probabilities<T>("PolicyBatch", logits, targets, log_p);
  }
};

template <std::floating_point T>
void PolicyBatch<T>::add(TokenIds question, TokenIds answer, double answer_advantage,
                         std::span<const T> old_log_p) {
  const Index length = answer.count();
  expect_at_least<Index>("PolicyBatch::add", "question.count()", question.count(), 1);
  expect_at_least<Index>("PolicyBatch::add", "answer.count()", length, 1);
  expect_finite("PolicyBatch::add", "answer_advantage", answer_advantage);
  if (!old_log_p.empty() && static_cast<Index>(old_log_p.size()) != length) {
    throw_error<ShapeError>("PolicyBatch::add: old_log_p has ", old_log_p.size(),
                            " entries, expected ", length, " (one per token of the answer)");
  }
  const Index before = question.count() - 1;  // Rows without a target.
  for (Index i = 0; i < question.count(); ++i) ids.push_back(question[i]);
  for (Index i = 0; i + 1 < length; ++i) ids.push_back(answer[i]);
  for (Index i = 0; i < before + length; ++i) {
    const bool learns = i >= before;
    targets.push_back(learns ? answer[i - before] : kNoTarget);
    advantage.push_back(static_cast<T>(answer_advantage));
    share.push_back(learns ? T(1) / static_cast<T>(length) : T(0));
    if (!old_log_p.empty()) old.push_back(learns ? element(old_log_p, i - before) : T(0));
  }
  sequences.append(before + length);
}

/// Settings of PolicyLoss.
struct PolicyLossConfig {
  double clip_low = 0.2;   ///< How far a ratio below 1 counts.
  double clip_high = 0.2;  ///< How far a ratio above 1 counts. DAPO: 0.28 (arXiv:2503.14476).
  double kl = 0.04;        ///< beta; 0: there is no reference.
};

/// What group-relative policy optimisation makes smaller:
///
///     loss = -1/N sum_i 1/|o_i| sum_t (min(rho_it A_i, clip(rho_it, 1 - e_low, 1 + e_high) A_i)
///                                      - beta KL_it)
///     rho_it = p(o_it) / p_old(o_it)
///     KL_it  = p_ref(o_it) / p(o_it) - log(p_ref(o_it) / p(o_it)) - 1
///
/// p(o_it) is the probability of the t-th token of answer i, given what comes before it, under the
/// policy that learns, p_old that under the policy that has drawn it, p_ref that under a reference,
/// mostly the model before its training by rewards. KL_it is an unbiased estimate, and never
/// negative, of how far the policy is from the reference. A ratio beyond the clip, on the side to
/// which the advantage pushes it, has no gradient but that of KL_it; on the edge it has. A, p_old
/// and p_ref are constant to the derivative:
///
///     d(loss)/d(log p_it) = -1/(N |o_i|) ([not clipped] rho_it A_i - beta (1 - p_ref / p))
///
/// N is the number of answers, or, with a batch in parts, what the caller says it is in the whole
/// batch. (Shao et al. 2024, arXiv:2402.03300; DeepSeek-AI 2025, arXiv:2501.12948; two clips: Yu et
/// al. 2025, arXiv:2503.14476.)
template <std::floating_point T>
class PolicyLoss {
 public:
  using Scalar = T;

  struct Cache {
    T surrogate = T(0);    ///< The loss without KL.
    T kl = T(0);           ///< 1/N sum_i 1/|o_i| sum_t KL_it, without beta; 0 without reference.
    double clipped = 0.0;  ///< The share of tokens whose ratio had no gradient.
    double drift = 0.0;    ///< The mean of rho - 1 - log rho: estimates KL(p_old, p), as KL_it.
    double largest_ratio = 0.0;

    CacheState state;
    Matrix<T> logits, d_logits;
    List<Index> targets;
    List<T> log_p, d_log_p;  ///< One per row.
  };

  /// \throws ConfigError  unless 0 <= clip_low < 1, and clip_high and kl are at least 0.
  explicit PolicyLoss(PolicyLossConfig config = {}) : config_(config) {
    expect_fraction("PolicyLoss", "clip_low", config_.clip_low);
    expect_at_least("PolicyLoss", "clip_high", config_.clip_high, 0.0);
    expect_at_least("PolicyLoss", "kl", config_.kl, 0.0);
  }

  const PolicyLossConfig& config() const { return config_; }

  /// \param logits   [tokens, vocab] of a pass over the batch.
  /// \param answers  N; 0 for those in the batch.
  /// \return         The loss; 0 if there is no answer.
  /// \throws ShapeError      unless every list of the batch has one entry per row of the logits,
  ///                         `reference` only with a KL.
  /// \throws ConfigError     if a target is out of range, or `answers` is negative.
  /// \throws NonFiniteError  if a log-probability, a ratio or a term of the loss is not finite.
  T forward(MatrixIn<T> logits, const PolicyBatch<T>& batch, Cache& cache, Index answers = 0) const;

  /// Nothing is accumulated: it may be called any number of times.
  /// \param scale    What the gradient is multiplied by, such as a loss scale.
  /// \return         scale * d(loss)/d(logits), [tokens, vocab]; zero for rows without a target.
  /// \throws StateError   if the cache is empty or its last forward pass failed.
  const Matrix<T>& backward(Cache& cache, T scale = T(1)) const {
    if (!cache.state.is_filled()) {
      throw_error<StateError>(
          "PolicyLoss::backward: the cache is empty, expected a forward pass that succeeded");
    }
    set_shape(cache.d_logits, cache.logits.rows(), cache.logits.cols());
    target_log_probabilities_backward<T>(cache.logits, cache.targets, cache.log_p, cache.d_log_p,
                                         cache.d_logits);
    if (scale != T(1)) cache.d_logits *= scale;
    return cache.d_logits;
  }

 private:
  /// What one token adds.
  struct Term {
    double surrogate = 0.0, kl = 0.0, ratio = 1.0;
    double d_log_p = 0.0;  ///< Of -(surrogate - beta kl).
    bool clipped = false;
  };

  Term term(double log_p, double old, double reference, double advantage) const {
    Term term;
    term.ratio = std::exp(log_p - old);
    const double bounded = std::clamp(term.ratio, 1.0 - config_.clip_low, 1.0 + config_.clip_high);
    term.clipped = bounded * advantage < term.ratio * advantage;
    term.surrogate = (term.clipped ? bounded : term.ratio) * advantage;
    if (!term.clipped) term.d_log_p = -term.ratio * advantage;
    if (config_.kl > 0.0) {
      const double difference = reference - log_p;
      term.kl = std::expm1(difference) - difference;
      term.d_log_p -= config_.kl * std::expm1(difference);
    }
    return term;
  }

  static void check(Index rows, const PolicyBatch<T>& batch, bool with_reference) {
    const auto expect_rows = [rows](std::string_view name, std::size_t size) {
      if (static_cast<Index>(size) == rows) return;
      throw_error<ShapeError>("PolicyLoss::forward: batch.", name, " has ", size,
                              " entries, expected ", rows, " (one per row of logits)");
    };
    expect_rows("targets", batch.targets.size());
    expect_rows("advantage", batch.advantage.size());
    expect_rows("share", batch.share.size());
    expect_rows("old", batch.old.size());
    if (with_reference) expect_rows("reference", batch.reference.size());
  }

  PolicyLossConfig config_;
};

template <std::floating_point T>
T PolicyLoss<T>::forward(MatrixIn<T> logits, const PolicyBatch<T>& batch, Cache& cache,
                         Index answers) const {
  cache.state.begin();
  const Index rows = logits.rows();
  expect_at_least<Index>("PolicyLoss::forward", "answers", answers, 0);
  check(rows, batch, config_.kl > 0.0);
  cache.log_p.resize(rows);
  target_log_probabilities<T>("PolicyLoss::forward", logits, batch.targets, cache.log_p);
  cache.d_log_p.assign(rows, T(0));
  const auto n = static_cast<double>(std::max<Index>(1, answers > 0 ? answers : batch.answers()));
  double surrogate = 0.0, kl = 0.0, clipped = 0.0, drift = 0.0;
  double largest = 0.0;
  Index tokens = 0;
  for (Index t = 0; t < rows; ++t) {
    const auto at = static_cast<std::size_t>(t);
    if (batch.targets[at] == kNoTarget) continue;
    const auto log_p = static_cast<double>(cache.log_p[t]);
    const auto old = static_cast<double>(batch.old[t]);
    const double reference = config_.kl > 0.0 ? static_cast<double>(batch.reference[t]) : 0.0;
    const Term own = term(log_p, old, reference, static_cast<double>(batch.advantage[at]));
    const double share = static_cast<double>(batch.share[at]) / n;
    if (!std::isfinite(own.surrogate) || !std::isfinite(own.kl) || !std::isfinite(share)) {
      throw_error<NonFiniteError>("PolicyLoss::forward: row ", t, " has log p ", log_p, ", old ",
                                  old, ", reference ", reference, " and advantage ",
                                  batch.advantage[at], ", expected a finite loss");
    }
    surrogate += share * own.surrogate;
    kl += share * own.kl;
    clipped += own.clipped ? 1.0 : 0.0;
    drift += own.ratio - 1.0 - (log_p - old);
    largest = std::max(largest, own.ratio);
    cache.d_log_p[t] = static_cast<T>(share * own.d_log_p);
    ++tokens;
  }
  cache.surrogate = static_cast<T>(-surrogate);
  cache.kl = static_cast<T>(kl);
  cache.clipped = clipped / static_cast<double>(std::max<Index>(1, tokens));
  cache.drift = drift / static_cast<double>(std::max<Index>(1, tokens));
  cache.largest_ratio = largest;
  cache.targets.assign(batch.targets.begin(), batch.targets.end());
  copy_rows<T>(logits, cache.logits);
  cache.state.finish(*this, kTraining, cache.logits);
  return static_cast<T>(config_.kl * kl - surrogate);
}

}  // namespace weir
