// SPDX-License-Identifier: MIT
/// \file
/// Losses by which one model, the student, learns from another one, the teacher.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <utility>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/target_log_probability.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of DistillationLoss.
struct DistillationLossConfig {
  double temperature = 2.0;
  double hard = 0.1;  ///< How much of the loss the targets have, from 0 to 1.
};

/// The student's logits s learn to be the teacher's, a, and to predict the targets:
///
///     loss = (1 - hard) T^2 1/N sum_t KL(q_t, p_t) + hard 1/N sum_t -log softmax(s_t)[target_t]
///     q_t = softmax(a_t / T),   p_t = softmax(s_t / T),   KL(q, p) = sum_v q_v log(q_v / p_v)
///
/// The sums run over the N tokens that have a target. T^2 keeps the size of the gradient, which
/// is otherwise that of 1/T^2. The teacher is constant to the derivative:
///
///     d(loss)/d(s_t) = ((1 - hard) T (p_t - q_t) + hard (softmax(s_t) - [target_t])) / N
///
/// (Hinton et al. 2015, arXiv:1503.02531, section 2; cross entropy with q there, which has the same
/// derivative.) Both models have the same vocabulary, and may differ in all else.
template <std::floating_point T>
class DistillationLoss {
 public:
  using Scalar = T;

  struct Cache {
    T soft = T(0);     ///< T^2 times the mean KL: 0 where the student is the teacher.
    T hard = T(0);     ///< The cross entropy alone.
    Index tokens = 0;  ///< N.

    CacheState state;
    Matrix<T> logits, teacher, d_logits;
    List<Index> targets;
    List<T> log_p;                 ///< Of the targets.
    List<T> z_student, z_teacher;  ///< log sum_v exp(logit_v / T), one per row.
    List<double> divergence;       ///< KL, one per row.
  };

  /// \throws ConfigError  unless temperature > 0 and 0 <= hard <= 1.
  explicit DistillationLoss(DistillationLossConfig config = {}) : config_(config) {
    expect_positive("DistillationLoss", "temperature", config_.temperature);
    expect_in("DistillationLoss", "hard", config_.hard, 0.0, 1.0);
  }

  const DistillationLossConfig& config() const { return config_; }

  /// \param logits   [tokens, vocab], the student's.
  /// \param teacher  [tokens, vocab].
  /// \param targets  One per token, in [0, vocab), or kNoTarget for one that is not looked at.
  /// \param tokens   N; 0 for the number of tokens with a target. With a batch in parts, that of
  ///                 the whole batch.
  /// \return         The loss; 0 if there is no target.
  /// \throws ShapeError      unless teacher has the shape of logits, and there is one target per
  ///                         token.
  /// \throws ConfigError     if a target is out of range, or `tokens` negative.
  /// \throws NonFiniteError  if a logit of a token with a target is not finite.
  T forward(MatrixIn<T> logits, MatrixIn<T> teacher, TokenIds targets, Cache& cache,
            Index tokens = 0) const;

  /// Nothing is accumulated: it may be called any number of times.
  /// \param scale    What the gradient is multiplied by, such as a loss scale.
  /// \return         scale * d(loss)/d(logits), [tokens, vocab]; zero for tokens without a target.
  /// \throws StateError   if the cache is empty or its last forward pass failed.
  const Matrix<T>& backward(Cache& cache, T scale = T(1)) const;

 private:
  /// log sum_v exp(logit_v / T)
  static T log_normaliser(Index count, const T* logits, T inverse) {
    const T top = loops::max(count, logits);
    const auto f = [=](const Lanes<T>& x) -> Lanes<T> { return exp_lanes<T>(inverse * (x - top)); };
    return inverse * top + std::log(sum_lanes<T>(count, f, logits));
  }

  T inverse_temperature() const { return static_cast<T>(1.0 / config_.temperature); }

  DistillationLossConfig config_;
};

template <std::floating_point T>
T DistillationLoss<T>::forward(MatrixIn<T> logits, MatrixIn<T> teacher, TokenIds targets,
                               Cache& cache, Index tokens) const {
  constexpr std::string_view kWhere = "DistillationLoss::forward";
  cache.state.begin();
  const Index rows = logits.rows();
  const Index vocab = logits.cols();
  expect_at_least<Index>(kWhere, "tokens", tokens, 0);
  expect_shape(kWhere, "teacher", teacher, rows, vocab);
  cache.log_p.resize(rows);
  target_log_probabilities<T>(kWhere, logits, targets, cache.log_p);
  targets.copy_to(cache.targets);
  for (auto* list : {&cache.z_student, &cache.z_teacher}) list->resize(rows);
  cache.divergence.assign(rows, 0.0);
  const T inverse = inverse_temperature();
  parallel_rows(rows, 12 * vocab, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      if (cache.targets[t] == kNoTarget) continue;
      const T* const s = &logits.coeffRef(t, 0);
      const T* const a = &teacher.coeffRef(t, 0);
      const T z_s = cache.z_student[t] = log_normaliser(vocab, s, inverse);
      const T z_a = cache.z_teacher[t] = log_normaliser(vocab, a, inverse);
      const auto f = [=](const Lanes<T>& of_a, const Lanes<T>& of_s) -> Lanes<T> {
        return exp_lanes<T>(inverse * of_a - z_a) * (inverse * (of_a - of_s) - (z_a - z_s));
      };
      cache.divergence[t] = static_cast<double>(sum_lanes<T>(vocab, f, a, s));
    }
  });
  double soft = 0.0, hard = 0.0;
  Index counted = 0;
  for (Index t = 0; t < rows; ++t) {
    if (cache.targets[t] == kNoTarget) continue;
    if (!std::isfinite(cache.divergence[t])) {
      throw_error<NonFiniteError>(kWhere, ": row ", t, " has the divergence ", cache.divergence[t],
                                  ", expected logits that are finite");
    }
    soft += cache.divergence[t];
    hard -= static_cast<double>(cache.log_p[t]);
    ++counted;
  }
  cache.tokens = tokens > 0 ? tokens : counted;
  const auto n = static_cast<double>(std::max<Index>(1, cache.tokens));
  soft *= config_.temperature * config_.temperature / n;
  cache.soft = static_cast<T>(soft);
  cache.hard = static_cast<T>(hard / n);
  copy_rows<T>(logits, cache.logits);
  copy_rows<T>(teacher, cache.teacher);
  cache.state.finish(*this, kTraining, cache.logits);
  return static_cast<T>((1.0 - config_.hard) * soft + config_.hard * hard / n);
}

template <std::floating_point T>
const Matrix<T>& DistillationLoss<T>::backward(Cache& cache, T scale) const {
  if (!cache.state.is_filled()) {
    throw_error<StateError>(
        "DistillationLoss::backward: the cache is empty, expected a forward pass that succeeded");
  }
  const Index vocab = cache.logits.cols();
  set_shape(cache.d_logits, cache.logits.rows(), vocab);
  const double share =
      static_cast<double>(scale) / static_cast<double>(std::max<Index>(1, cache.tokens));
  const T inverse = inverse_temperature();
  const auto soft = static_cast<T>(share * (1.0 - config_.hard) * config_.temperature);
  const auto hard = static_cast<T>(share * config_.hard);
  parallel_rows(cache.logits.rows(), 12 * vocab, [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const Index target = cache.targets[t];
      if (target == kNoTarget) {
        cache.d_logits.row(t).setZero();
        continue;
      }
      const T z_s = cache.z_student[t];
      const T z_a = cache.z_teacher[t];
      const T z = cache.logits(t, target) - cache.log_p[t];  // At temperature 1.
      const auto f = [=](const Lanes<T>& s, const Lanes<T>& a) -> Lanes<T> {
        return soft * (exp_lanes<T>(inverse * s - z_s) - exp_lanes<T>(inverse * a - z_a)) +
               hard * exp_lanes<T>(s - z);
      };
      map_lanes<T>(vocab, f, &cache.d_logits(t, 0), &cache.logits(t, 0), &cache.teacher(t, 0));
      cache.d_logits(t, target) -= hard;
    }
  });
  return cache.d_logits;
}

/// The student's hidden states h learn to be the teacher's, H:
///
///     loss = coefficient 1/(N D) sum_t |W h_t - H_t|^2
///
/// [tokens, d] and [tokens, D]. W is a linear map that is trained too, and that nobody needs
/// afterwards; without it, which takes d = D, W is the identity. The sum runs over the N tokens
/// that count; the teacher is constant to the derivative. (Romero et al. 2014, arXiv:1412.6550,
/// whose regressor is W; Jiao et al. 2019, arXiv:1909.10351.)
template <std::floating_point T>
class HiddenLoss {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    typename Linear<T>::Cache map;
    Matrix<T> difference;  ///< [tokens, D], zero for tokens that do not count.
    Index tokens = 0;      ///< N.
  };

  /// Without a map: both models have the same width.
  /// \throws ConfigError  unless the coefficient is finite and at least 0.
  explicit HiddenLoss(double coefficient = 1.0) : coefficient_(coefficient) {
    expect_at_least("HiddenLoss", "coefficient", coefficient, 0.0);
  }

  /// \param student  The student's width.
  /// \param teacher  The teacher's.
  /// \throws ConfigError  as above, and unless both widths are positive.
  HiddenLoss(Index student, Index teacher, Rng& rng, double coefficient = 1.0)
      : HiddenLoss(coefficient) {
    expect_positive("HiddenLoss", "student", student);
    expect_positive("HiddenLoss", "teacher", teacher);
    map_.emplace(student, teacher, rng);
  }

  /// \param h        [tokens, d], such as Decoder::hidden of the student.
  /// \param teacher  [tokens, D].
  /// \param mask     One byte per token, 0 for one that does not count; if empty, all do.
  /// \param tokens   N; 0 for the number of those that count.
  /// \throws ShapeError      if widths, tokens or the mask do not fit.
  /// \throws ConfigError     if `tokens` is negative.
  /// \throws NonFiniteError  if the loss is not finite.
  T forward(MatrixIn<T> h, MatrixIn<T> teacher, Cache& cache,
            std::span<const std::uint8_t> mask = {}, Index tokens = 0) const;

  /// Adds to the gradient of the map. A cache serves once.
  /// \param scale    What the gradient is multiplied by, such as a loss scale.
  /// \return         scale * d(loss)/dh, [tokens, d]. It lives in the cache.
  /// \throws StateError   if the cache does not fit, see CacheState.
  const Matrix<T>& backward(Cache& cache, T scale = T(1)) {
    cache.state.begin_backward("HiddenLoss::backward", *this, cache.difference, "the difference");
    const auto n = static_cast<double>(std::max<Index>(1, cache.tokens * cache.difference.cols()));
    cache.difference *= static_cast<T>(2.0 * coefficient_ * static_cast<double>(scale) / n);
    return map_ ? map_->backward(cache.difference, cache.map) : cache.difference;
  }

  double coefficient() const { return coefficient_; }
  bool has_map() const { return map_.has_value(); }

  /// Member `map`, where there is one.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (self.map_) visit("map", *self.map_);
  }

 private:
  double coefficient_ = 1.0;
  std::optional<Linear<T>> map_;
};

template <std::floating_point T>
T HiddenLoss<T>::forward(MatrixIn<T> h, MatrixIn<T> teacher, Cache& cache,
                         std::span<const std::uint8_t> mask, Index tokens) const {
  constexpr std::string_view kWhere = "HiddenLoss::forward";
  cache.state.begin();
  const Index rows = h.rows();
  expect_at_least<Index>(kWhere, "tokens", tokens, 0);
  expect_shape(kWhere, "teacher", teacher, rows, map_ ? map_->d_out() : h.cols());
  if (map_) expect_columns(kWhere, "h", h, map_->d_in());
  Pass{.mask = mask}.check(kWhere, rows);
  set_shape(cache.difference, rows, teacher.cols());
  const auto subtract = [&](MatrixIn<T> mapped) {
    add_scaled_rows<T>(mapped, T(-1), teacher, cache.difference);
  };
  if (map_) {
    subtract(map_->forward(h, {.training = true, .mask = mask}, cache.map));
  } else {
    subtract(h);
  }
  cache.tokens = rows;
  for (Index t = 0; t < static_cast<Index>(mask.size()); ++t) {
    if (element(mask, t) != 0) continue;
    cache.difference.row(t).setZero();
    --cache.tokens;
  }
  if (tokens > 0) cache.tokens = tokens;
  double sum = 0.0;
  for (Index t = 0; t < rows; ++t) {
    const T* const row = &cache.difference(t, 0);
    sum += static_cast<double>(loops::dot(teacher.cols(), row, row));
    if (std::isfinite(sum)) continue;
    throw_error<NonFiniteError>(kWhere, ": row ", t, " differs by ", sum,
                                ", expected hidden states that are finite");
  }
  const auto n = static_cast<double>(std::max<Index>(1, cache.tokens * teacher.cols()));
  cache.state.finish(*this, kTraining, cache.difference);
  return static_cast<T>(coefficient_ * sum / n);
}

}  // namespace weir
