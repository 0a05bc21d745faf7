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

/// Windows of text, and the byte that follows each of their bytes.
struct ByteBatch {
  std::vector<weir::Index> ids, targets;

  void clear() {
    ids.clear();
    targets.clear();
  }

  /// Adds the `length` bytes from `start` on; at least one more has to follow them.
  void add(std::string_view text, std::size_t start, weir::Index length) {
    for (std::size_t i = start; i < start + static_cast<std::size_t>(length); ++i) {
      ids.push_back(static_cast<unsigned char>(text[i]));
      targets.push_back(static_cast<unsigned char>(text[i + 1]));
    }
  }
};
