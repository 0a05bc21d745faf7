// SPDX-License-Identifier: MIT
/// \file
/// What a narrow cache costs a model in accuracy.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <span>
#include <vector>

#include <weir/core/cache_storage.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/ops/logsumexp.hpp>

namespace weir {

/// How a cache that rounds its numbers changes what a model predicts, token by token of a text.
struct CacheReport {
  CacheStorage storage = CacheStorage::kFull;
  Index bytes_per_token = 0;       ///< Of all layers, scales included.
  Index full_bytes_per_token = 0;  ///< The same with CacheStorage::kFull.
  double logit_error = 0.0;        ///< ||logits - full logits|| / ||full logits||
  /// sum_v p_v log(p_v / q_v), p and q being the probabilities with the full and the narrow cache,
  /// in nats: the mean over all tokens. The loss of the model on its own text rises by that.
  double divergence = 0.0;
  double agreement =
      1.0;  ///< For which share of the tokens the most probable next one is the same.
};

namespace detail {

/// The divergence of a row of logits from a row of full logits.
template <class T>
double divergence(std::span<const T> logits, std::span<const T> full) {
  const auto total = static_cast<double>(logsumexp<T>(logits));
  const auto full_total = static_cast<double>(logsumexp<T>(full));
  double sum = 0.0;
  for (std::size_t v = 0; v < full.size(); ++v) {
    const double log_p = static_cast<double>(full[v]) - full_total;
    const double log_q = static_cast<double>(logits[v]) - total;
    if (std::isfinite(log_p)) sum += std::exp(log_p) * (log_p - log_q);
  }
  return sum;
}

}  // namespace detail

/// Lets `model` read `text` twice, with a full cache and with one that is stored as `storage`.
///
///     const CacheReport report = cache_report(model, text, CacheStorage::kInt8);
///
/// \param text          At least one token; attention over many tokens averages errors out.
/// \throws ConfigError  if the text is empty, or an id is out of range.
template <std::floating_point T>
CacheReport cache_report(const Decoder<T>& model, TokenIds text, CacheStorage storage) {
  constexpr Index kChunk = 64;
  expect_at_least<Index>("cache_report", "text", text.count(), 1);
  typename Decoder<T>::State narrow(storage);
  typename Decoder<T>::State full;
  typename Decoder<T>::Cache cache;
  CacheReport report = {.storage = storage};
  double error = 0.0;
  double norm = 0.0;
  Index agreeing = 0;
  std::vector<Index> ids;
  for (Index begin = 0; begin < text.count(); begin += kChunk) {
    ids.clear();
    for (Index t = begin; t < std::min(text.count(), begin + kChunk); ++t) ids.push_back(text[t]);
    const Matrix<T> exact = decode(model, ids, full, cache);
    const Matrix<T>& rounded = decode(model, ids, narrow, cache);
    error += static_cast<double>((rounded - exact).squaredNorm());
    norm += static_cast<double>(exact.squaredNorm());
    for (Index i = 0; i < exact.rows(); ++i) {
      Index best = 0;
      Index exact_best = 0;
      rounded.row(i).maxCoeff(&best);
      exact.row(i).maxCoeff(&exact_best);
      agreeing += best == exact_best ? 1 : 0;
      report.divergence += detail::divergence<T>(row_span(rounded, i), row_span(exact, i));
    }
  }
  const auto tokens = static_cast<double>(text.count());
  report.bytes_per_token = narrow.bytes_per_token();
  report.full_bytes_per_token = full.bytes_per_token();
  report.logit_error = norm > 0.0 ? std::sqrt(error / norm) : std::sqrt(error);
  report.divergence /= tokens;
  report.agreement = static_cast<double>(agreeing) / tokens;
  return report;
}

}  // namespace weir
