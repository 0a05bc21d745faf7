// SPDX-License-Identifier: MIT
/// \file
/// Parts of texts that are spread over each of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>

#include "text.hpp"

/// A text, and what it is called.
struct Domain {
  std::string name, text;
};

/// Tokens of all texts, in pieces that are spread over each of them.
struct Pieces {
  struct Piece {
    weir::Index domain = 0;
    std::vector<weir::Index> ids;
  };
  std::vector<Piece> all;
  weir::Index tokens = 0;
};

/// Where a piece begins that is to begin at `at` or a little later: behind the end of a line, else
/// behind a space, so that no word and no number is cut, else with a whole character of UTF-8.
inline std::size_t piece_begin(const std::string& text, std::size_t at) {
  constexpr std::size_t kNear = 200;
  if (at == 0) return 0;
  for (const char* const ends : {"\n", " \t\r\n"}) {
    // One before, as the piece may begin right behind it.
    const std::size_t found = text.find_first_of(ends, at - 1);
    if (found != std::string::npos && found < at + kNear && found + 1 < text.size()) {
      return found + 1;
    }
  }
  while (at < text.size() && (static_cast<unsigned char>(text[at]) & 0xC0U) == 0x80U) ++at;
  return at;
}

/// About `bytes` of the text from `begin` on, up to a space, or to the end of the text.
inline std::string piece_of(const std::string& text, std::size_t begin, std::size_t bytes) {
  std::string part = text.substr(begin, bytes);
  if (begin + part.size() == text.size()) return part;
  const std::size_t space = part.find_last_of(" \t\r\n");
  if (space != std::string::npos) part.resize(space);
  return part;
}

/// \param tokens   Of all pieces together, at most; each text has the same share.
/// \param context  Of a piece, at most.
inline Pieces pieces_of(const std::vector<Domain>& domains, const Text& text, weir::Index tokens,
                        weir::Index context) {
  using weir::Index;
  constexpr Index kBytesOfToken = 12;
  Pieces pieces;
  const Index each = tokens / static_cast<Index>(domains.size());
  for (std::size_t d = 0; d < domains.size(); ++d) {
    const std::string& all = domains[d].text;
    const Index count = std::max<Index>(1, each / context);
    for (Index i = 0; i < count; ++i) {
      const std::size_t at =
          all.size() * static_cast<std::size_t>(i) / static_cast<std::size_t>(count);
      const std::string part =
          piece_of(all, piece_begin(all, at), static_cast<std::size_t>(context * kBytesOfToken));
      std::vector<Index> ids = text.encode(part, true);
      ids.resize(std::min(ids.size(), static_cast<std::size_t>(std::min(context, each))));
      if (ids.empty()) continue;
      pieces.tokens += static_cast<Index>(ids.size());
      pieces.all.push_back({static_cast<Index>(d), std::move(ids)});
    }
  }
  return pieces;
}
