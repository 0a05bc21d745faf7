// SPDX-License-Identifier: MIT
/// \file
/// The names of experts in the whole mixture, where a bank has some of them.
#pragma once

#include <charconv>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/index_span.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The number e of a member's name "e.*" in a bank, or -1 if it has none.
inline Index expert_number(std::string_view name) {
  Index number = -1;
  const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
  const auto length = static_cast<std::size_t>(end - name.data());
  const bool whole = length == name.size() || name[length] == '.';
  return error == std::errc() && whole ? number : Index(-1);
}

/// A visitor of a bank that has the experts `experts` of a larger one: hands the members of its
/// expert l, "l.*", to `visit` under the number that the expert has there. Members that have no
/// number keep their names.
template <class Visit>
class WithExpertNumbers {
 public:
  WithExpertNumbers(Visit& visit, std::span<const Index> experts)
      : visit_(visit), experts_(experts) {}

  template <class Member>
  void operator()(std::string_view name, Member& member) {
    if constexpr (requires { Member::visit(member, *this); }) {
      if (name.empty()) return Member::visit(member, *this);
    }
    const Index slot = expert_number(name);
    if (slot < 0 || slot >= static_cast<Index>(experts_.size())) {
      visit_(name, member);
      return;
    }
    std::string renamed = std::to_string(element(experts_, slot));
    renamed.append(name.substr(std::to_string(slot).size()));
    visit_(renamed, member);
  }

  /// The members of a vector are the experts.
  template <class Member>
  void operator()(std::string_view name, std::vector<Member>& members) {
    for (std::size_t i = 0; name.empty() && i < members.size(); ++i) {
      (*this)(std::to_string(i), members[i]);
    }
    if (!name.empty()) visit_(name, members);
  }

 private:
  Visit& visit_;
  std::span<const Index> experts_;
};

}  // namespace weir
