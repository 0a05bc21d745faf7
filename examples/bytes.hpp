// SPDX-License-Identifier: MIT
/// \file
/// Text as token ids, one for each byte.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include <weir/core/types.hpp>

/// How many ids there are.
inline constexpr weir::Index kBytes = 256;

inline std::vector<weir::Index> to_ids(std::string_view text) {
  std::vector<weir::Index> ids;
  for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
  return ids;
}

/// What cannot be shown becomes '?'.
inline std::string to_text(const std::vector<weir::Index>& ids) {
  std::string text;
  for (const weir::Index id : ids) {
    const bool shown = (id >= ' ' && id < 127) || id == '\n' || id == '\t';
    text += shown ? static_cast<char>(id) : '?';
  }
  return text;
}
