// SPDX-License-Identifier: MIT
/// \file
/// YaRN: rotary frequencies for a longer context than a model was trained on
/// (Peng et al. 2023, arXiv:2309.00071).
#pragma once

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Stretches rotary angles by `factor`, "NTK by parts": pair i of a head, whose frequency is f_i,
/// turns r_i = original_context * f_i / (2 pi) times within the original context. Pairs that turn
/// more than `beta_fast` times keep their frequency, since they tell neighbours apart; pairs that
/// turn less than `beta_slow` times are slowed down by `factor`, since they would come to angles
/// never seen; those between are mixed:
///
///     frequency_i = (1 - ramp_i) f_i + ramp_i f_i / factor
///     ramp_i = clamp((i - low) / (high - low), 0, 1)
///     low, high = the i at which r_i is beta_fast, beta_slow
///
/// The ramp is linear in i, as in the authors' code and its successors; in the paper it is linear
/// in r_i. As in that code, low and high are kept within [0, head_dim - 1], and high is low + 0.001
/// where they are equal. Unlike there, both are kept at both ends: where all pairs turn fast, all
/// keep their frequency, and where all turn slowly, all except the first are slowed down.
///
/// Attention over more tokens is made sharper by
///
///     sharpness(m) = 0.1 m ln(factor) + 1
///
/// in one of two ways. gpt-oss, and Hugging Face by default, multiply cosines and sines by
/// sharpness(1), and so both queries and keys: these are the defaults here. DeepSeek-V2 and V3,
/// which rotate only a part of each head, set mscale = mscale_all_dim and multiply the whole score
/// by sharpness(mscale_all_dim)^2 instead.
struct Yarn {
  double factor = 1.0;            ///< The new context over the original one.
  Index original_context = 4096;  ///< Tokens the model was trained on.
  double beta_fast = 32.0;        ///< Turns above which a frequency stays.
  double beta_slow = 1.0;         ///< Turns below which it is divided by `factor`.
  double mscale = 1.0;            ///< m of the sharpness by which cosines and sines are multiplied.
  double mscale_all_dim =
      0.0;               ///< m of the score's sharpness, by which cosines and sines are divided.
  bool truncate = true;  ///< Whether low is rounded down and high up; not in gpt-oss.

  bool operator==(const Yarn&) const = default;

  double sharpness(double m) const { return 0.1 * m * std::log(factor) + 1.0; }

  /// The factor of cosines and sines.
  double rotation_scale() const { return sharpness(mscale) / sharpness(mscale_all_dim); }

  /// The factor of the product of query and key, beside 1 / sqrt(head_dim).
  double score_scale() const { return sharpness(mscale_all_dim) * sharpness(mscale_all_dim); }

  /// How much of pair i is slowed down, from 0 to 1.
  /// \param theta  Base of the frequencies, above 1.
  double ramp(Index i, Index head_dim, double theta) const {
    const double last = static_cast<double>(head_dim) - 1.0;
    double low = pair_turning(beta_fast, head_dim, theta);
    double high = pair_turning(beta_slow, head_dim, theta);
    if (truncate) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::clamp(low, 0.0, last);
    high = std::clamp(high, 0.0, last);
    if (low == high) high += 0.001;
    return std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
  }

  /// The radians per position of pair i.
  double frequency(Index i, Index head_dim, double theta) const {
    const double plain =
        std::pow(theta, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    const double slowed = ramp(i, head_dim, theta);
    return (1.0 - slowed) * plain + slowed * (plain / factor);
  }

  /// \throws ConfigError  unless factor and original_context are at least 1, mscale and
  ///                      mscale_all_dim at least 0, 0 < beta_slow <= beta_fast, all are finite,
  ///                      and theta is above 1.
  void check(std::string_view where, Index /*head_dim*/, double theta) const {
    expect_at_least(where, "yarn.factor", factor, 1.0);
    expect_at_least<Index>(where, "yarn.original_context", original_context, 1);
    expect_positive(where, "yarn.beta_slow", beta_slow);
    expect_positive(where, "yarn.beta_fast", beta_fast);
    if (beta_fast < beta_slow) {
      throw_error<ConfigError>(where, ": yarn.beta_fast = ", beta_fast,
                               ", expected >= beta_slow = ", beta_slow);
    }
    expect_at_least(where, "yarn.mscale", mscale, 0.0);
    expect_at_least(where, "yarn.mscale_all_dim", mscale_all_dim, 0.0);
    if (!(theta > 1.0)) {
      throw_error<ConfigError>(where, ": theta = ", theta, ", expected > 1 with a Yarn");
    }
  }

 private:
  /// The i of the pair that turns `turns` times within the original context; mostly a fraction.
  double pair_turning(double turns, Index head_dim, double theta) const {
    const double turns_of_first = static_cast<double>(original_context) / (2.0 * std::numbers::pi);
    return static_cast<double>(head_dim) * std::log(turns_of_first / turns) /
           (2.0 * std::log(theta));
  }
};

}  // namespace weir
