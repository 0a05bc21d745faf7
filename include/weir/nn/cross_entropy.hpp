// SPDX-License-Identifier: MIT
/// \file
/// The loss of a language model.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/logsumexp.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of `CrossEntropy`.
struct CrossEntropyConfig {
  Index ignore_index = -100;  ///< Tokens with this target are skipped.
  double z_loss = 0.0;        ///< The coefficient of the penalty.
};

/// Mean negative log-likelihood of the targets, and optionally a penalty that keeps the normaliser
/// of the softmax near one:
///
///     loss = 1/N sum_t (Z_t - logits[t, target_t]) + z_loss 1/N sum_t Z_t^2
///     Z_t  = log sum_v exp(logits[t, v])
///
/// The sums run over the tokens whose target is not `ignore_index`; the others are not looked at.
/// N is their number, or what the caller says: with a batch split into micro-batches, the number in
/// the whole batch, and losses and gradients add up to those of the batch. (The penalty: Chowdhery
/// et al. 2022, arXiv:2204.02311, section 5, with z_loss = 1e-4.)
template <class T>
class CrossEntropy {
 public:
  struct Cache {
    T nll = T(0);      ///< The loss without the penalty.
    T z_loss = T(0);   ///< The penalty alone.
    Index tokens = 0;  ///< N.

    CacheState state;
    Matrix<T> logits, d_logits;
    List<T> log_normaliser;  ///< Z, one per token.
    List<Index> targets;
  };

  /// \throws ConfigError  if `z_loss` is negative or not finite.
  explicit CrossEntropy(CrossEntropyConfig config = {}) : config_(config) {
    expect_at_least("CrossEntropy", "z_loss", config_.z_loss, 0.0);
  }

  const CrossEntropyConfig& config() const { return config_; }

  /// \param logits   [tokens, vocab].
  /// \param targets  One per token, in [0, vocab) or `ignore_index`.
  /// \param tokens   N; 0 for the number of tokens that are not ignored.
  /// \param mask     One byte per token, 0 for one whose target is ignored, whatever it is; if
  ///                 empty, none is. It says what is learned (the answers, not the questions),
  ///                 while `Pass::mask` says which tokens exist.
  /// \return         The loss; 0 if there is nothing to predict.
  /// \throws ShapeError      unless there is one target per token, and one byte if there is a mask.
  /// \throws ConfigError     if a target is out of range, or `tokens` negative.
  /// \throws NonFiniteError  if a logit is NaN or +inf, or that of a target -inf.
  T forward(MatrixIn<T> logits, TokenIds targets, Cache& cache, Index tokens = 0,
            std::span<const std::uint8_t> mask = {}) const;

  /// Nothing is accumulated: it may be called any number of times.
  /// \param scale    What the gradient is multiplied by, such as a loss scale.
  /// \return         scale * d(loss)/d(logits), [tokens, vocab]; zero for ignored tokens.
  /// \throws StateError   if the cache is empty or its last forward pass failed.
  const Matrix<T>& backward(Cache& cache, T scale = T(1)) const;

 private:
  /// Returns N.
  Index check(MatrixIn<T> logits, TokenIds targets, Index tokens) const;

  CrossEntropyConfig config_;
};

template <class T>
T CrossEntropy<T>::forward(MatrixIn<T> logits, TokenIds targets, Cache& cache, Index tokens,
                           std::span<const std::uint8_t> mask) const {
  cache.state.begin();
  targets.copy_to(cache.targets);
  if (!mask.empty() && static_cast<Index>(mask.size()) != logits.rows()) {
    throw_error<ShapeError>("CrossEntropy::forward: mask has ", mask.size(), " entries, expected ",
                            logits.rows(), " (one per token)");
  }
  const Index targeted = mask.empty() ? 0 : std::min(cache.targets.count(), logits.rows());
  for (Index t = 0; t < targeted; ++t) {
    if (element(mask, t) == 0) cache.targets[t] = config_.ignore_index;
  }
  cache.tokens = check(logits, cache.targets, tokens);
  set_shape(cache.logits, logits.rows(), logits.cols());
  cache.log_normaliser.resize(targets.count());
  parallel_rows(logits.rows(), 4 * logits.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      if (cache.targets[t] == config_.ignore_index) continue;  // Nobody reads the row.
      std::copy_n(&logits.coeffRef(t, 0), logits.cols(), &cache.logits(t, 0));
      cache.log_normaliser[t] = logsumexp<T>(row_span(cache.logits, t));
    }
  });

  double nll = 0.0;
  double squares = 0.0;
  for (Index t = 0; t < logits.rows(); ++t) {
    const Index target = cache.targets[t];
    if (target == config_.ignore_index) continue;
    const auto z = static_cast<double>(cache.log_normaliser[t]);
    const double loss = z - static_cast<double>(logits(t, target));
    if (!std::isfinite(loss)) {
      throw_error<NonFiniteError>("CrossEntropy::forward: row ", t, " of logits has log sum exp ",
                                  z, " and target logit ", logits(t, target), ", expected finite");
    }
    nll += loss;
    squares += z * z;
  }
  const auto divisor = static_cast<double>(std::max<Index>(1, cache.tokens));
  cache.nll = static_cast<T>(nll / divisor);
  cache.z_loss = static_cast<T>(config_.z_loss * squares / divisor);
  cache.state.finish(*this, kTraining, cache.logits);
  return static_cast<T>((nll + config_.z_loss * squares) / divisor);
}

template <class T>
const Matrix<T>& CrossEntropy<T>::backward(Cache& cache, T scale) const {
  if (!cache.state.is_filled()) {
    throw_error<StateError>(
        "CrossEntropy::backward: the cache is empty, expected a forward pass that succeeded");
  }
  const Matrix<T>& logits = cache.logits;
  const T share = scale / static_cast<T>(std::max<Index>(1, cache.tokens));
  set_shape(cache.d_logits, logits.rows(), logits.cols());
  parallel_rows(logits.rows(), 4 * logits.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const Index target = cache.targets[t];
      if (target == config_.ignore_index) {
        cache.d_logits.row(t).setZero();
        continue;
      }
      const T z = cache.log_normaliser[t];
      const T factor = share * (T(1) + T(2) * static_cast<T>(config_.z_loss) * z);
      const auto f = [=](const Lanes<T>& logit) -> Lanes<T> {
        return factor * exp_lanes<T>(logit - z);
      };
      map_lanes<T>(logits.cols(), f, &cache.d_logits(t, 0), &logits.coeffRef(t, 0));
      cache.d_logits(t, target) -= share;
    }
  });
  return cache.d_logits;
}

template <class T>
Index CrossEntropy<T>::check(MatrixIn<T> logits, TokenIds targets, Index tokens) const {
  expect_at_least<Index>("CrossEntropy::forward", "tokens", tokens, 0);
  if (targets.count() != logits.rows()) {
    throw_error<ShapeError>("CrossEntropy::forward: targets has ", targets.count(),
                            " entries, expected ", logits.rows(), " (one per token)");
  }
  Index counted = 0;
  for (Index t = 0; t < targets.count(); ++t) {
    if (targets[t] == config_.ignore_index) continue;
    if (targets[t] < 0 || targets[t] >= logits.cols()) {
      throw_error<ConfigError>("CrossEntropy::forward: targets[", t, "] = ", targets[t],
                               ", expected 0 <= target < ", logits.cols(), " or ",
                               config_.ignore_index);
    }
    ++counted;
  }
  return tokens > 0 ? tokens : counted;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::CrossEntropy<float>;
extern template class weir::CrossEntropy<double>;
#endif
