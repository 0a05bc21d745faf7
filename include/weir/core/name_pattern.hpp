// SPDX-License-Identifier: MIT
/// \file
/// Patterns of names, such as "layers.*.moe.experts.*".
#pragma once

#include <string_view>

namespace weir {

/// Whether `name` matches `pattern`, in which '*' stands for any number of characters, dots
/// included. Every other character stands for itself.
inline bool matches_pattern(std::string_view pattern, std::string_view name) {
  std::size_t p = 0;
  std::size_t n = 0;
  std::size_t star = std::string_view::npos;  // The last '*' so far.
  std::size_t taken = 0;                      // Where in `name` its match ends.
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
