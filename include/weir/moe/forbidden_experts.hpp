// SPDX-License-Identifier: MIT
/// \file
/// Passes that forbid experts to tokens (Pass::allowed, Pass::without_best), and what becomes of
/// the logits.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Whether the pass allows expert e of `experts` to the token. pass.allowed has to fit.
inline bool is_allowed(const Pass& pass, Index experts, Index token, Index e) {
  if (pass.allowed.empty()) return true;
  const auto size = static_cast<Index>(pass.allowed.size());
  return element(pass.allowed, size == experts ? e : token * experts + e) != 0;
}

/// Checks that pass.allowed fits the tokens and the experts.
/// \param k        How many experts each token is to have; 0 if that is not fixed.
/// \throws ShapeError   unless pass.allowed is empty, [experts] or [tokens * experts].
/// \throws ConfigError  if a real token is allowed fewer than k experts, or none.
inline void expect_allowed_fits(std::string_view who, Index tokens, Index experts, const Pass& pass,
                                Index k) {
  if (pass.allowed.empty()) return;
  const auto size = static_cast<Index>(pass.allowed.size());
  if (size != experts && size != tokens * experts) {
    throw_error<ShapeError>(who, ": pass.allowed has ", size, " entries, expected ", experts,
                            " (one per expert) or ", tokens * experts, " (for each token)");
  }
  for (Index t = 0; t < tokens; ++t) {
    if (pass.is_padding(t)) continue;
    Index allowed = 0;
    for (Index e = 0; e < experts; ++e) allowed += is_allowed(pass, experts, t, e) ? 1 : 0;
    if (allowed >= std::max(k, Index(1))) continue;
    throw_error<ConfigError>(who, ": token ", t, " is allowed ", allowed, " of ", experts,
                             " experts, expected at least ", k > 0 ? "k = " : "",
                             std::max(k, Index(1)));
  }
}

/// \throws NonFiniteError  if a logit of a real token is NaN or infinite, where it is allowed.
template <class T>
void expect_finite_logits(std::string_view who, MatrixIn<T> logits, const Pass& pass) {
  std::atomic<bool> finite = true;
  parallel_rows(logits.rows(), logits.cols(), [&](Index begin, Index end) {
    // NaN if it is not finite. NOLINTNEXTLINE(misc-redundant-expression)
    const auto zero = [](const Lanes<T>& z) -> Lanes<T> { return z - z; };
    for (Index t = begin; t < end; ++t) {
      if (pass.is_padding(t)) continue;
      if (sum_lanes<T>(logits.cols(), zero, &logits.coeffRef(t, 0)) != T(0)) finite = false;
    }
  });
  if (finite) return;
  for (Index t = 0; t < logits.rows(); ++t) {
    if (pass.is_padding(t)) continue;
    for (Index e = 0; e < logits.cols(); ++e) {
      if (std::isfinite(logits(t, e)) || !is_allowed(pass, logits.cols(), t, e)) continue;
      throw_error<NonFiniteError>(who, ": logits[", t, ", ", e, "] = ", logits(t, e),
                                  ", expected a finite number");
    }
  }
}

/// Sets `open` to the experts that the pass allows to some real token, in ascending order. Without
/// real tokens, and with a mask for all tokens, it is those of the mask.
inline void find_open_experts(const Pass& pass, Index tokens, Index experts, List<Index>& open) {
  const bool is_for_all = static_cast<Index>(pass.allowed.size()) <= experts;
  open.clear();
  open.reserve(experts);
  for (Index e = 0; e < experts; ++e) {
    bool is_open = is_for_all && is_allowed(pass, experts, 0, e);
    for (Index t = 0; t < tokens && !is_for_all && !is_open; ++t) {
      is_open = !pass.is_padding(t) && is_allowed(pass, experts, t, e);
    }
    if (is_open) open.push_back(e);
  }
}

/// Makes the logits [tokens, experts] -infinity where the pass forbids the expert to the token.
template <class T>
void forbid_experts(const Pass& pass, Matrix<T>& logits) {
  for (Index t = 0; t < logits.rows(); ++t) {
    for (Index e = 0; e < logits.cols(); ++e) {
      if (is_allowed(pass, logits.cols(), t, e)) continue;
      logits(t, e) = -std::numeric_limits<T>::infinity();
    }
  }
}

/// How many of `experts` a share of them is, see Pass::without_best.
inline Index share_of_experts(double share, Index experts) {
  return static_cast<Index>(std::lround(share * static_cast<double>(experts)));
}

/// Makes the logits [tokens, experts] of each real token's best experts -infinity, as many as
/// pass.without_best says; of equal logits, those of the lowest indices.
/// \param k        How many experts each token is to have; 0 if that is not fixed.
/// \throws ConfigError  unless 0 <= pass.without_best < 1, or if a real token is left fewer than k
///                      experts, or none.
template <class T>
void forbid_best_experts(std::string_view who, const Pass& pass, Index k, Matrix<T>& logits) {
  constexpr T kForbidden = -std::numeric_limits<T>::infinity();
  if (!(pass.without_best >= 0.0 && pass.without_best < 1.0)) {
    throw_error<ConfigError>(who, ": pass.without_best = ", pass.without_best,
                             ", expected 0 <= without_best < 1");
  }
  const Index count = share_of_experts(pass.without_best, logits.cols());
  for (Index t = 0; t < logits.rows(); ++t) {
    if (pass.is_padding(t)) continue;
    const auto open = static_cast<Index>((logits.row(t).array() != kForbidden).count());
    if (open - count < std::max(k, Index(1))) {
      throw_error<ConfigError>(who, ": token ", t, " is left ", std::max(open - count, Index(0)),
                               " of ", logits.cols(),
                               " experts by pass.without_best = ", pass.without_best,
                               ", expected at least ", k > 0 ? "k = " : "", std::max(k, Index(1)));
    }
    for (Index i = 0; i < count; ++i) {
      T* const best = std::max_element(&logits(t, 0), &logits(t, 0) + logits.cols());
      *best = kForbidden;
    }
  }
}

}  // namespace weir
