// SPDX-License-Identifier: MIT
/// \file
/// Which expert lives on which device.
#pragma once

#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A partition of the experts into groups, none of them empty.
class ExpertGroups {
 public:
  /// \param group_of  The group of each expert.
  /// \throws ConfigError  unless each group from 0 to the highest has an expert.
  explicit ExpertGroups(std::vector<Index> group_of) : group_of_(std::move(group_of)) {
    if (group_of_.empty()) throw_error<ConfigError>("ExpertGroups: experts = 0, expected >= 1");
    for (std::size_t e = 0; e < group_of_.size(); ++e) {
      const Index group = group_of_[e];
      if (group < 0 || group >= experts()) {
        throw_error<ConfigError>("ExpertGroups: the group of expert ", e, " = ", group,
                                 ", expected 0 <= group < experts = ", experts());
      }
      if (group >= count()) size_.resize(static_cast<std::size_t>(group) + 1, 0);
      ++size_[static_cast<std::size_t>(group)];
    }
    for (Index g = 0; g < count(); ++g) {
      if (size(g) == 0) {
        throw_error<ConfigError>("ExpertGroups: group ", g,
                                 " has no expert, expected at least one");
      }
    }
  }

  /// `groups` groups of neighbours, all of the same size.
  /// \throws ConfigError  unless both are at least 1 and `groups` divides `experts`.
  static ExpertGroups uniform(Index experts, Index groups) {
    expect_at_least<Index>("ExpertGroups", "experts", experts, 1);
    expect_at_least<Index>("ExpertGroups", "groups", groups, 1);
    if (experts % groups != 0) {
      throw_error<ConfigError>("ExpertGroups: groups = ", groups,
                               ", expected a divisor of experts = ", experts);
    }
    std::vector<Index> group_of;
    for (Index e = 0; e < experts; ++e) group_of.push_back(e / (experts / groups));
    return ExpertGroups(std::move(group_of));
  }

  /// \throws ConfigError  unless they are groups of `experts` experts.
  void expect_experts(std::string_view who, Index experts) const {
    if (experts != this->experts()) {
      throw_error<ConfigError>(who, ": the groups are of ", this->experts(), " experts, expected ",
                               experts, " as routed to");
    }
  }

  Index count() const { return static_cast<Index>(size_.size()); }
  Index experts() const { return static_cast<Index>(group_of_.size()); }
  Index size(Index group) const { return size_[static_cast<std::size_t>(group)]; }
  Index group_of(Index expert) const { return group_of_[static_cast<std::size_t>(expert)]; }

 private:
  std::vector<Index> group_of_;
  std::vector<Index> size_;
};

}  // namespace weir
