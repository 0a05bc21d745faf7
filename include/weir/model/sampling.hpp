// SPDX-License-Identifier: MIT
/// \file
/// Drawing the next token from the logits of a decoder.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <numeric>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/random.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/top_k.hpp>
#include <weir/ops/vector_loops.hpp>

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
  /// in the order of their indices; if top_k left some out, the most probable come first.
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

  // Sets `weights_` of `kept_`.
  void weigh(MatrixIn<T> logits, double temperature);

  // Reduces `kept_` and `weights_` to the nucleus, in the order in which they are.
  void keep_nucleus(const T* z, double top_p);

  // Leaves only the places i with `keeps(i)`.
  template <class Keeps>
  void filter(Keeps&& keeps) {
    Index count = 0;
    for (Index i = 0; i < kept_.count(); ++i) {
      const bool stays = keeps(i);  // No branch, which nobody could predict.
      kept_[count] = kept_[i];
      weights_[count] = weights_[i];
      count += stays ? 1 : 0;
    }
    kept_.resize(count);
    weights_.resize(count);
  }

  // Which of `kBuckets` a weight in [0, 1] belongs to: the first has the largest. Each is 1/64 of
  // an octave wide; the last has all that are smaller.
  static std::uint16_t bucket_of(double weight) {
    constexpr int kShift = 52 - 6;
    const auto steps =
        (std::bit_cast<std::uint64_t>(1.0) - std::bit_cast<std::uint64_t>(std::min(weight, 1.0))) >>
        static_cast<unsigned>(kShift);
    return static_cast<std::uint16_t>(std::min<std::uint64_t>(steps, kBuckets - 1));
  }
  static constexpr std::uint64_t kBuckets = 4096;

  double total_weight() const { return std::accumulate(weights_.begin(), weights_.end(), 0.0); }

  List<Index> kept_;
  List<double> weights_;
  List<double> sums_;            // Of the weights in each bucket, in `keep_nucleus`.
  List<std::uint16_t> buckets_;  // To which each weight belongs.
  List<Index> candidates_;       // The places of those in one bucket.
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
  const bool greedy = sampling.temperature == 0.0;
  const Index wanted = greedy ? 1 : sampling.top_k;
  if (wanted > 0 && wanted < kept_.count()) {
    kept_.resize(wanted);
    top_k<T>(row_span(logits, 0), kept_);
  }

  weigh(logits, sampling.temperature);
  if (sampling.top_p < 1.0) keep_nucleus(logits.data(), sampling.top_p);
  if (sampling.min_p > 0.0) filter([&](Index i) { return weights_[i] >= sampling.min_p; });
}

template <std::floating_point T>
void Sampler<T>::weigh(MatrixIn<T> logits, double temperature) {
  // Exponentials of differences to the largest logit: no temperature is too low.
  weights_.resize(kept_.count());
  const T* const z = logits.data();
  const auto best = static_cast<double>(loops::max(logits.cols(), z));
  if (temperature == 0.0) {
    std::fill(weights_.begin(), weights_.end(), 1.0);
    return;
  }
  for (Index i = 0; i < kept_.count(); ++i) {
    weights_[i] = (static_cast<double>(z[kept_[i]]) - best) / temperature;
  }
  loops::exp_shifted<double>(weights_.count(), weights_.data(), 0.0, weights_.data());
}

template <std::floating_point T>
void Sampler<T>::keep_nucleus(const T* z, double top_p) {
  // The bucket in which the sum of the most probable reaches the target is found by the sums of all
  // buckets, and the tokens of that one alone are compared with each other.
  sums_.assign(static_cast<Index>(kBuckets), 0.0);
  buckets_.resize(weights_.count());
  for (Index i = 0; i < weights_.count(); ++i) buckets_[i] = bucket_of(weights_[i]);
  for (Index i = 0; i < weights_.count(); ++i) sums_[buckets_[i]] += weights_[i];
  const double target = top_p * std::accumulate(sums_.begin(), sums_.end(), 0.0);
  double sum = 0.0;
  Index last = 0;
  while (last + 1 < sums_.count() && sum + sums_[last] < target) sum += sums_[last++];
  while (last > 0 && sums_[last] == 0.0) sum -= sums_[--last];  // Rounding went past the end.

  candidates_.clear();
  for (Index i = 0; i < kept_.count(); ++i) {
    if (buckets_[i] == last) candidates_.push_back(i);
  }
  const auto more_probable = [&](Index a, Index b) {
    const T of_a = z[kept_[a]];
    const T of_b = z[kept_[b]];
    return of_a > of_b || (of_a == of_b && kept_[a] < kept_[b]);
  };
  // The first `least` are in the nucleus, none behind the first `most` is.
  auto least = candidates_.begin();
  auto most = candidates_.end();
  while (most - least > 1) {
    const auto middle = least + (most - least) / 2;
    std::nth_element(least, middle, most, more_probable);
    double half = 0.0;
    for (auto i = least; i != middle; ++i) half += weights_[*i];
    if (sum + half < target) {
      sum += half;
      least = middle;
    } else {
      most = middle;
    }
  }
  const Index worst = kept_[*least];
  filter([&](Index i) {
    if (buckets_[i] != last) return buckets_[i] < last;
    const T logit = z[kept_[i]];
    return logit > z[worst] || (logit == z[worst] && kept_[i] <= worst);
  });
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
  const T* const z = logits.data();
  kept_.resize(logits.cols());
  Index count = 0;
  bool is_sound = true;
  for (Index token = 0; token < logits.cols(); ++token) {
    kept_[count] = token;
    count += z[token] != -kInfinity ? 1 : 0;
    is_sound = is_sound && z[token] < kInfinity;
  }
  kept_.resize(count);
  for (Index token = 0; !is_sound && token < logits.cols(); ++token) {
    if (z[token] < kInfinity) continue;
    throw_error<NonFiniteError>(where, ": logits[", token,
                                "] = ", std::isnan(z[token]) ? "nan" : "inf",
                                ", expected finite or -inf");
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
