// SPDX-License-Identifier: MIT
/// \file
/// Drawing the next token from the logits of a decoder.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <limits>
#include <numeric>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/random.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// Settings of `Sampler`. They apply in this order, each to the tokens that the one before it left:
///
///     repetition_penalty   divides the logits above zero of the tokens that were there before by
///                          it, and multiplies the others of them by it, once for each token
///     temperature   makes p_i proportional to exp(logit_i / temperature)
///     top_k         keeps the k most probable tokens
///     top_p         keeps the nucleus: as few of the most probable tokens as have probabilities
///                   that add up to at least top_p, and at least one token
///     min_p         keeps the tokens at least min_p times as probable as the most probable one
///
/// Among equally probable tokens, the one with the lowest index is taken first. (Holtzman et al.
/// 2019, arXiv:1904.09751, eq. 2-3, for top_p; Nguyen et al. 2024, arXiv:2407.01082, for min_p;
/// Keskar et al. 2019, arXiv:1909.05858, for the penalty, which Hugging Face's
/// RepetitionPenaltyLogitsProcessor defines for logits below zero, as here.)
struct Sampling {
  double temperature = 1.0;  ///< 0 is greedy: the most probable token is always taken.
  Index top_k = 0;           ///< 0 keeps all tokens, as does anything above the vocabulary's size.
  double top_p = 1.0;        ///< In [0, 1]; 1 keeps all tokens, 0 the most probable one.
  double min_p = 0.0;        ///< In [0, 1]; 0 keeps all tokens, 1 the most probable ones.
  double repetition_penalty = 1.0;  ///< Above zero; 1 is none, more makes repetition rarer.

  /// \throws ConfigError  if a setting is out of range.
  void check() const {
    expect_at_least("Sampling", "temperature", temperature, 0.0);
    expect_at_least<Index>("Sampling", "top_k", top_k, 0);
    expect_in("Sampling", "top_p", top_p, 0.0, 1.0);
    expect_in("Sampling", "min_p", min_p, 0.0, 1.0);
    expect_positive("Sampling", "repetition_penalty", repetition_penalty);
  }
};

/// Draws tokens. A sampler that is kept between calls allocates nothing once it has seen the
/// vocabulary; settings may differ from call to call.
///
/// Logits are [1, vocabulary]. A logit of -inf forbids a token; NaN and +inf are errors, as is a
/// row that forbids every token.
template <std::floating_point T>
class Sampler {
 public:
  /// Draws one token. This takes exactly one number `rng.uniform()`, which says where to stop in
  /// the running sum of the probabilities; greedy sampling takes none. The sum runs over the tokens
  /// in the order of their indices; if top_k or top_p left some out, the most probable come first.
  ///
  /// \param before   The tokens that the repetition penalty is about; not looked at without one.
  /// \throws ShapeError       if logits is not one row of at least one token.
  /// \throws ConfigError      if a setting is out of range, or one of the tokens `before`.
  /// \throws NonFiniteError   if a logit is NaN or +inf, or all of them are -inf.
  Index sample(MatrixIn<T> logits, const Sampling& sampling, Rng& rng, TokenIds before = {});

  /// The probabilities with which `sample` draws: [1, vocabulary]. Their sum is 1, and they are
  /// zero for tokens that the settings exclude. They live here until the next call. Throws as
  /// `sample` does.
  const RowVector<T>& distribution(MatrixIn<T> logits, const Sampling& sampling,
                                   TokenIds before = {});

 private:
  // Fills `kept_` with the tokens that may be drawn, and `weights_` with numbers proportional to
  // their probabilities.
  void choose(std::string_view where, MatrixIn<T> logits, const Sampling& sampling,
              TokenIds before);

  // The logits with the penalty, in `penalised_`.
  void penalise(std::string_view where, MatrixIn<T> logits, double penalty, TokenIds before);

  // Fills `kept_` with every token that is not forbidden, in order.
  void keep_allowed(std::string_view where, MatrixIn<T> logits);

  // Reduces `kept_` to its nucleus, the most probable token first. A heap gives up the tokens one
  // by one: a nucleus is mostly small, and sorting a whole vocabulary for it takes long.
  template <class Weight>
  void keep_nucleus(const T* z, double top_p, const Weight& weight) {
    double total = 0.0;
    for (const Index token : kept_) total += weight(token);
    const auto less_probable = [z](Index a, Index b) {
      return z[a] < z[b] || (z[a] == z[b] && a > b);
    };
    std::make_heap(kept_.begin(), kept_.end(), less_probable);
    auto first = kept_.end();  // Tokens given up gather from here on, the best one last.
    double sum = 0.0;
    do {
      std::pop_heap(kept_.begin(), first, less_probable);
      sum += weight(*--first);
    } while (sum < top_p * total && first != kept_.begin());
    std::reverse(first, kept_.end());
    kept_.erase(kept_.begin(), first);
  }

  double total_weight() const { return std::accumulate(weights_.begin(), weights_.end(), 0.0); }

  List<Index> kept_;
  List<double> weights_;
  RowVector<T> distribution_, penalised_;
};

template <std::floating_point T>
Index Sampler<T>::sample(MatrixIn<T> logits, const Sampling& sampling, Rng& rng, TokenIds before) {
  choose("Sampler::sample", logits, sampling, before);
  if (sampling.temperature == 0.0) return kept_.front();
  const double target = rng.uniform() * total_weight();
  double sum = 0.0;
  Index drawn = kept_.front();
  for (Index i = 0; i < kept_.count() && sum <= target; ++i) {
    if (weights_[i] > 0.0) drawn = kept_[i];  // The last of these, if rounding ends the list.
    sum += weights_[i];
  }
  return drawn;
}

template <std::floating_point T>
const RowVector<T>& Sampler<T>::distribution(MatrixIn<T> logits, const Sampling& sampling,
                                             TokenIds before) {
  choose("Sampler::distribution", logits, sampling, before);
  const double total = total_weight();
  set_zero(distribution_, logits.cols());
  for (Index i = 0; i < kept_.count(); ++i) {
    distribution_[kept_[i]] = static_cast<T>(weights_[i] / total);
  }
  return distribution_;
}

template <std::floating_point T>
void Sampler<T>::choose(std::string_view where, MatrixIn<T> logits, const Sampling& sampling,
                        TokenIds before) {
  sampling.check();
  if (logits.rows() != 1 || logits.cols() == 0) {
    throw_error<ShapeError>(where, ": logits is ", shape_of(logits), ", expected [1, vocabulary]");
  }
  if (sampling.repetition_penalty != 1.0 && before.count() > 0) {
    penalise(where, logits, sampling.repetition_penalty, before);
    Sampling rest = sampling;
    rest.repetition_penalty = 1.0;
    return choose(where, penalised_, rest, {});
  }
  keep_allowed(where, logits);
  const T* z = logits.data();
  const bool greedy = sampling.temperature == 0.0;
  const Index wanted = greedy ? 1 : sampling.top_k;
  if (wanted > 0 && wanted < kept_.count()) {
    kept_.resize(wanted);
    top_k<T>(row_span(logits, 0), kept_);
  }

  // Weights are exponentials of differences to the largest logit: no temperature is too low.
  Index best = 0;
  top_k<T>(row_span(logits, 0), {&best, 1});
  const auto weight = [&](Index token) {
    if (greedy) return 1.0;
    const double difference = static_cast<double>(z[token]) - static_cast<double>(z[best]);
    return std::exp(difference / sampling.temperature);
  };
  if (sampling.top_p < 1.0) keep_nucleus(z, sampling.top_p, weight);
  weights_.clear();
  if (sampling.min_p > 0.0) {
    std::erase_if(kept_, [&](Index token) { return weight(token) < sampling.min_p; });
  }
  for (const Index token : kept_) weights_.push_back(weight(token));
}

template <std::floating_point T>
void Sampler<T>::penalise(std::string_view where, MatrixIn<T> logits, double penalty,
                          TokenIds before) {
  assign(penalised_, logits);
  for (Index i = 0; i < before.count(); ++i) {
    const Index token = before[i];
    if (token < 0 || token >= logits.cols()) {
      throw_error<ConfigError>(where, ": before[", i, "] = ", token, ", expected 0 <= token < ",
                               logits.cols());
    }
    const auto logit = static_cast<double>(logits(0, token));
    penalised_[token] = static_cast<T>(logit > 0.0 ? logit / penalty : logit * penalty);
  }
}

template <std::floating_point T>
void Sampler<T>::keep_allowed(std::string_view where, MatrixIn<T> logits) {
  constexpr T kInfinity = std::numeric_limits<T>::infinity();
  kept_.clear();
  for (Index token = 0; token < logits.cols(); ++token) {
    const T logit = logits(0, token);
    if (std::isnan(logit) || logit == kInfinity) {
      throw_error<NonFiniteError>(where, ": logits[", token,
                                  "] = ", std::isnan(logit) ? "nan" : "inf",
                                  ", expected finite or -inf");
    }
    if (logit != -kInfinity) kept_.push_back(token);
  }
  if (kept_.empty()) {
    throw_error<NonFiniteError>(where, ": all ", logits.cols(),
                                " logits are -inf, expected at least one finite");
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Sampler<float>;
extern template class weir::Sampler<double>;
#endif
