// SPDX-License-Identifier: MIT
/// \file
/// Enumerations whose values have short names, such as options of programs take.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string_view>

namespace weir {

/// The value of an enumeration whose names are `names`, in its order, from 0 on; nothing if none
/// has that name.
template <class Enum, std::size_t count>
constexpr std::optional<Enum> value_named(const std::array<std::string_view, count>& names,
                                          std::string_view name) {
  for (std::size_t i = 0; i < count; ++i) {
    if (names[i] == name) return static_cast<Enum>(i);
  }
  return std::nullopt;
}

}  // namespace weir
