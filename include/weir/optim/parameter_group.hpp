// SPDX-License-Identifier: MIT
/// \file
/// Settings of an optimizer for some of the parameters, chosen by their names.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/name_pattern.hpp>

namespace weir {

/// Settings of the parameters whose names match a pattern, in which '*' stands for any characters.
struct ParameterGroup {
  std::string pattern;                      ///< Such as "*.router.*".
  double learning_rate_factor = 1.0;        ///< Multiplies the learning rate.
  std::optional<double> weight_decay = {};  ///< Replaces the weight decay, also of vectors.

  /// \param where    The optimizer, for messages.
  /// \throws ConfigError  if a number is negative or not finite.
  void check(std::string_view where) const {
    expect_at_least(where, "learning_rate_factor", learning_rate_factor, 0.0);
    if (weight_decay) expect_at_least(where, "weight_decay", *weight_decay, 0.0);
  }
};

/// The first of `groups` whose pattern matches `name`, or null.
inline const ParameterGroup* group_of(const std::vector<ParameterGroup>& groups,
                                      std::string_view name) {
  for (const ParameterGroup& group : groups) {
    if (matches_pattern(group.pattern, name)) return &group;
  }
  return nullptr;
}

}  // namespace weir
