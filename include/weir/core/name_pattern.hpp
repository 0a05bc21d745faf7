// SPDX-License-Identifier: MIT
/// \file
/// Patterns of names, such as "layers.*.moe.experts.*".
#pragma once

#include <string_view>

namespace weir {

/// Whether `name` is as `pattern` says, in which '*' stands for any characters, dots included, also
/// for none. Everything else stands for itself.
inline bool matches_pattern(std::string_view pattern, std::string_view name) {
  std::size_t p = 0;
  std::size_t n = 0;
  std::size_t star = std::string_view::npos;  // The last '*' so far, and
  std::size_t taken = 0;                      // how far in `name` it reaches.
  while (n < name.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      taken = n;
    } else if (p < pattern.size() && pattern[p] == name[n]) {
      ++p;
      ++n;
    } else if (star != std::string_view::npos) {
      p = star + 1;
      n = ++taken;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

}  // namespace weir
