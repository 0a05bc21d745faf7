// SPDX-License-Identifier: MIT
/// \file
/// The ways to stretch rotary positions to a longer context than a model was trained on.
#pragma once

#include <algorithm>
#include <cmath>
#include <string_view>
#include <variant>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/llama3_scaling.hpp>
#include <weir/ops/long_rope.hpp>
#include <weir/ops/yarn.hpp>

namespace weir {

/// Frequencies as they were trained: pair i turns by theta^(-2i / rotary_dim) radians per position.
struct NoScaling {
  bool operator==(const NoScaling&) const = default;
  double frequency(Index pair, Index rotary_dim, double theta) const {
    return std::pow(theta, -2.0 * static_cast<double>(pair) / static_cast<double>(rotary_dim));
  }
  double rotation_scale() const { return 1.0; }
  double score_scale() const { return 1.0; }
  void check(std::string_view /*where*/, Index /*rotary_dim*/, double /*theta*/) const {}
};

/// Position interpolation: positions are divided by `factor`, which is the same as dividing all
/// frequencies. (Chen et al. 2023, arXiv:2306.15595.)
struct LinearScaling {
  double factor = 1.0;  ///< The new context over the original one.

  bool operator==(const LinearScaling&) const = default;
  double frequency(Index pair, Index rotary_dim, double theta) const {
    return NoScaling{}.frequency(pair, rotary_dim, theta) / factor;
  }
  double rotation_scale() const { return 1.0; }
  double score_scale() const { return 1.0; }

  /// \throws ConfigError  unless factor is finite and at least 1.
  void check(std::string_view where, Index /*rotary_dim*/, double /*theta*/) const {
    expect_at_least(where, "linear.factor", factor, 1.0);
  }
};

/// Raises theta with the length of the sequence, so that slow pairs are slowed down most and the
/// first pair not at all:
///
///     theta' = theta (factor l / original_context - (factor - 1))^(rotary_dim / (rotary_dim - 2))
///     l = max(length, original_context)
///
/// Published code takes the number of tokens so far for `length`. Frequencies then change while a
/// text grows, and keys that are kept from before would not fit those that follow. Here `length` is
/// a setting: the longest sequence that is going to be read. All tokens of all sequences have its
/// frequencies, in training and decoding. (rope_type "dynamic" in Hugging Face's.)
struct DynamicNtkScaling {
  double factor = 1.0;            ///< How fast theta grows with the length.
  Index original_context = 2048;  ///< Tokens the model was trained on.
  Index length = 0;  ///< Tokens of the longest sequence; up to original_context nothing changes.

  bool operator==(const DynamicNtkScaling&) const = default;
  double frequency(Index pair, Index rotary_dim, double theta) const {
    const auto dim = static_cast<double>(rotary_dim);
    const double ratio = static_cast<double>(std::max(length, original_context)) /
                         static_cast<double>(original_context);
    const double growth = std::pow(factor * ratio - (factor - 1.0), dim / (dim - 2.0));
    return NoScaling{}.frequency(pair, rotary_dim, theta * growth);
  }
  double rotation_scale() const { return 1.0; }
  double score_scale() const { return 1.0; }

  /// \throws ConfigError  unless factor is finite and at least 1, original_context at least 1,
  ///                      length at least 0, and rotary_dim at least 4.
  void check(std::string_view where, Index rotary_dim, double /*theta*/) const {
    expect_at_least(where, "dynamic_ntk.factor", factor, 1.0);
    expect_at_least<Index>(where, "dynamic_ntk.original_context", original_context, 1);
    expect_at_least<Index>(where, "dynamic_ntk.length", length, 0);
    if (rotary_dim < 4) {
      throw_error<ConfigError>(where, ": ", rotary_dim,
                               " rotated numbers, expected >= 4 with DynamicNtkScaling");
    }
  }
};

/// How the angles of `Rope` depend on the position. All kinds have the same members:
///
///     frequency(pair, rotary_dim, theta)   the radians per position of a pair
///     rotation_scale()                     the factor of cosines and sines
///     score_scale()                        the factor of query times key, beside the usual one
///     check(where, rotary_dim, theta)      throws ConfigError if a setting is not sound
using RopeScaling =
    std::variant<NoScaling, LinearScaling, DynamicNtkScaling, Llama3Scaling, Yarn, LongRopeScaling>;

/// `score_scale()` of whichever kind `scaling` is.
inline double score_scale(const RopeScaling& scaling) {
  return std::visit([](const auto& kind) { return kind.score_scale(); }, scaling);
}

/// `check` of whichever kind `scaling` is.
inline void check_scaling(const RopeScaling& scaling, std::string_view where, Index rotary_dim,
                          double theta) {
  std::visit([&](const auto& kind) { kind.check(where, rotary_dim, theta); }, scaling);
}

}  // namespace weir
