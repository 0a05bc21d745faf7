// SPDX-License-Identifier: MIT
/// \file
/// The logarithms of the probabilities that logits give to certain tokens.
#pragma once

#include <cmath>
#include <span>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/logsumexp.hpp>

namespace weir {

/// Sets, for each row t of the logits that has a target,
///
///     log_p_t = logits[t, target_t] - log sum_v exp(logits[t, v])
///
/// and 0 for the others, which are not looked at.
///
/// \param where    The caller, for messages.
/// \param logits   [tokens, vocab]
/// \param targets  One per token, in [0, vocab) or kNoTarget.
/// \param log_p    One per token.
/// \throws ShapeError      unless there is one target and one place in log_p for each token.
/// \throws ConfigError     if a target is out of range.
/// \throws NonFiniteError  if a log_p_t is not finite: a logit is NaN or +inf, or the target's is
///                         -inf.
template <class T>
void target_log_probabilities(std::string_view where, MatrixIn<T> logits, TokenIds targets,
                              std::span<T> log_p) {
  const Index rows = logits.rows();
  if (targets.count() != rows || static_cast<Index>(log_p.size()) != rows) {
    throw_error<ShapeError>(where, ": targets has ", targets.count(), " entries, expected ", rows,
                            " (one per row of logits)");
  }
  for (Index t = 0; t < rows; ++t) {
    const Index target = targets[t];
    if (target == kNoTarget || (target >= 0 && target < logits.cols())) continue;
    throw_error<ConfigError>(where, ": targets[", t, "] = ", target, ", expected 0 <= target < ",
                             logits.cols(), " or ", kNoTarget);
  }
  parallel_rows(rows, 4 * logits.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const T* const row = &logits.coeffRef(t, 0);
      element(log_p, t) = targets[t] == kNoTarget
                              ? T(0)
                              : row[targets[t]] - logsumexp<T>(span_of(row, logits.cols()));
    }
  });
  for (Index t = 0; t < rows; ++t) {
    if (std::isfinite(element(log_p, t))) continue;
    throw_error<NonFiniteError>(where, ": token ", targets[t], " has the log-probability ",
                                element(log_p, t), " in row ", t, ", expected finite");
  }
}

/// The derivative:
///
///     d_logits[t, v] = d_t ([v = target_t] - p_tv),    p_tv = exp(logits[t, v]) / sum_u exp(...)
///
/// \param log_p     As `target_log_probabilities` has set it.
/// \param d         The gradient of log_p, one per token.
/// \param d_logits  [tokens, vocab], which may be `logits`; zero for rows without a target.
template <class T>
void target_log_probabilities_backward(MatrixIn<T> logits, TokenIds targets,
                                       std::span<const T> log_p, std::span<const T> d,
                                       MatrixOut<T> d_logits) {
  parallel_rows(logits.rows(), 4 * logits.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const T factor = element(d, t);
      if (targets[t] == kNoTarget || factor == T(0)) {
        d_logits.row(t).setZero();
        continue;
      }
      const T* const row = &logits.coeffRef(t, 0);
      const T z = row[targets[t]] - element(log_p, t);
      const auto f = [=](const Lanes<T>& logit) -> Lanes<T> {
        return -factor * exp_lanes<T>(logit - z);
      };
      map_lanes<T>(logits.cols(), f, &d_logits(t, 0), row);
      d_logits(t, targets[t]) += factor;
    }
  });
}

}  // namespace weir
