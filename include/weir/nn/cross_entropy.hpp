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
  Index ignore_index = kNoTarget;  ///< Tokens with this target are skipped.
  double z_loss = 0.0;             ///< The coefficient of the penalty.
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
    double nll_sum = 0.0, square_sum = 0.0;  ///< The sums over the rows so far.
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

  /// The same for logits that are there a few rows at a time: `begin`, `add_rows` for all rows in
  /// their order, `end`. See LanguageLoss.
  /// \param rows     How many tokens there are in all.
  void begin(Index rows, Index vocab, TokenIds targets, Cache& cache, Index tokens = 0,
             std::span<const std::uint8_t> mask = {}) const;

  /// \param logits   The rows from `first` on, [rows, vocab].
  void add_rows(MatrixIn<T> logits, Index first, Cache& cache) const;

  /// Returns the loss.
  T end(Cache& cache) const;

  /// Sets d_logits, which may be `logits`, to what `backward` returns for these rows.
  /// \param logits   As given to `add_rows`.
  void backward_rows(MatrixIn<T> logits, Index first, const Cache& cache, T scale,
                     MatrixOut<T> d_logits) const;

 private:
  /// Returns N.
  Index check(Index rows, Index vocab, TokenIds targets, Index tokens) const;

  CrossEntropyConfig config_;
};

template <class T>
T CrossEntropy<T>::forward(MatrixIn<T> logits, TokenIds targets, Cache& cache, Index tokens,
                           std::span<const std::uint8_t> mask) const {
  cache.state.begin();
  begin(logits.rows(), logits.cols(), targets, cache, tokens, mask);
  set_shape(cache.logits, logits.rows(), logits.cols());
  parallel_rows(logits.rows(), logits.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      if (cache.targets[t] == config_.ignore_index) continue;  // Nobody reads the row.
      std::copy_n(&logits.coeffRef(t, 0), logits.cols(), &cache.logits(t, 0));
    }
  });
  add_rows(logits, 0, cache);
  const T loss = end(cache);
  cache.state.finish(*this, kTraining, cache.logits);
  return loss;
}

template <class T>
const Matrix<T>& CrossEntropy<T>::backward(Cache& cache, T scale) const {
  if (!cache.state.is_filled()) {
    throw_error<StateError>(
        "CrossEntropy::backward: the cache is empty, expected a forward pass that succeeded");
  }
  set_shape(cache.d_logits, cache.logits.rows(), cache.logits.cols());
  backward_rows(cache.logits, 0, cache, scale, cache.d_logits);
  return cache.d_logits;
}

template <class T>
void CrossEntropy<T>::begin(Index rows, Index vocab, TokenIds targets, Cache& cache, Index tokens,
                            std::span<const std::uint8_t> mask) const {
  targets.copy_to(cache.targets);
  if (!mask.empty() && static_cast<Index>(mask.size()) != rows) {
    throw_error<ShapeError>("CrossEntropy::forward: mask has ", mask.size(), " entries, expected ",
                            rows, " (one per token)");
  }
  const Index targeted = mask.empty() ? 0 : std::min(cache.targets.count(), rows);
  for (Index t = 0; t < targeted; ++t) {
    if (element(mask, t) == 0) cache.targets[t] = config_.ignore_index;
  }
  cache.tokens = check(rows, vocab, cache.targets, tokens);
  cache.log_normaliser.resize(rows);
  cache.nll_sum = cache.square_sum = 0.0;
}

template <class T>
void CrossEntropy<T>::add_rows(MatrixIn<T> logits, Index first, Cache& cache) const {
  parallel_rows(logits.rows(), 4 * logits.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      if (cache.targets[first + t] == config_.ignore_index) continue;
      const T* const row = &logits.coeffRef(t, 0);
      cache.log_normaliser[first + t] = logsumexp<T>(span_of(row, logits.cols()));
    }
  });
  for (Index t = 0; t < logits.rows(); ++t) {
    const Index target = cache.targets[first + t];
    if (target == config_.ignore_index) continue;
    const auto z = static_cast<double>(cache.log_normaliser[first + t]);
    const double loss = z - static_cast<double>(logits(t, target));
    if (!std::isfinite(loss)) {
      throw_error<NonFiniteError>("CrossEntropy::forward: row ", first + t,
                                  " of logits has log sum exp ", z, " and target logit ",
                                  logits(t, target), ", expected finite");
    }
    cache.nll_sum += loss;
    cache.square_sum += z * z;
  }
}

template <class T>
T CrossEntropy<T>::end(Cache& cache) const {
  const auto divisor = static_cast<double>(std::max<Index>(1, cache.tokens));
  cache.nll = static_cast<T>(cache.nll_sum / divisor);
  cache.z_loss = static_cast<T>(config_.z_loss * cache.square_sum / divisor);
  return static_cast<T>((cache.nll_sum + config_.z_loss * cache.square_sum) / divisor);
}

template <class T>
void CrossEntropy<T>::backward_rows(MatrixIn<T> logits, Index first, const Cache& cache, T scale,
                                    MatrixOut<T> d_logits) const {
  const T share = scale / static_cast<T>(std::max<Index>(1, cache.tokens));
  parallel_rows(logits.rows(), 4 * logits.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const Index target = cache.targets[first + t];
      if (target == config_.ignore_index) {
        d_logits.row(t).setZero();
        continue;
      }
      const T z = cache.log_normaliser[first + t];
      const T factor = share * (T(1) + T(2) * static_cast<T>(config_.z_loss) * z);
      const auto f = [=](const Lanes<T>& logit) -> Lanes<T> {
        return factor * exp_lanes<T>(logit - z);
      };
      map_lanes<T>(logits.cols(), f, &d_logits(t, 0), &logits.coeffRef(t, 0));
      d_logits(t, target) -= share;
    }
  });
}

template <class T>
Index CrossEntropy<T>::check(Index rows, Index vocab, TokenIds targets, Index tokens) const {
  expect_at_least<Index>("CrossEntropy::forward", "tokens", tokens, 0);
  if (targets.count() != rows) {
    throw_error<ShapeError>("CrossEntropy::forward: targets has ", targets.count(),
                            " entries, expected ", rows, " (one per token)");
  }
  Index counted = 0;
  for (Index t = 0; t < targets.count(); ++t) {
    if (targets[t] == config_.ignore_index) continue;
    if (targets[t] < 0 || targets[t] >= vocab) {
      throw_error<ConfigError>("CrossEntropy::forward: targets[", t, "] = ", targets[t],
                               ", expected 0 <= target < ", vocab, " or ", config_.ignore_index);
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
