// SPDX-License-Identifier: MIT
/// \file
/// Tokens that are found in a text as they are written, before it is divided into words.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>

namespace weir::io {

/// A token with a spelling of its own.
struct AddedToken {
  Index id = 0;
  std::string text;           ///< Not empty.
  bool is_special = false;    ///< See EncodeConfig::read_special.
  bool strips_left = false;   ///< Whether it takes in the white space before it,
  bool strips_right = false;  ///< and that behind it.
};

/// Finds added tokens: from left to right, at each place the longest.
class AddedTokens {
 public:
  /// A token, or text between tokens, and where it begins.
  struct Piece {
    const AddedToken* token;  ///< Null for text.
    std::size_t begin;
    std::string_view text;
  };

  AddedTokens() = default;
  explicit AddedTokens(std::vector<AddedToken> tokens);

  /// The pieces of a text, in order. Empty ones are left out.
  /// \param text          Valid UTF-8.
  /// \param read_special  Whether special tokens are found as well.
  std::vector<Piece> split(std::string_view text, bool read_special) const;

 private:
  /// The longest token at the beginning of `text`, or null.
  const AddedToken* longest(std::string_view text) const;

  std::vector<AddedToken> tokens_;  // Sorted by text.
};

/// How many bytes of Unicode's white space `text` begins with, and ends with.
std::size_t spaces_at_start(std::string_view text);
std::size_t spaces_at_end(std::string_view text);

inline AddedTokens::AddedTokens(std::vector<AddedToken> tokens) : tokens_(std::move(tokens)) {
  std::sort(tokens_.begin(), tokens_.end(),
            [](const AddedToken& a, const AddedToken& b) { return a.text < b.text; });
}

inline const AddedToken* AddedTokens::longest(std::string_view text) const {
  // Tokens that share the first `length` bytes of the text lie side by side, the shortest first.
  auto low = tokens_.begin();
  auto high = tokens_.end();
  const AddedToken* best = nullptr;
  for (std::size_t length = 0; low != high; ++length) {
    if (low->text.size() == length) best = &*low++;
    if (length == text.size()) break;
    const auto byte = static_cast<unsigned char>(text[length]);
    const auto at = [&](const AddedToken& token) {
      return static_cast<unsigned char>(token.text[length]);
    };
    low = std::partition_point(low, high, [&](const auto& token) { return at(token) < byte; });
    high = std::partition_point(low, high, [&](const auto& token) { return at(token) == byte; });
  }
  return best;
}

inline std::vector<AddedTokens::Piece> AddedTokens::split(std::string_view text,
                                                          bool read_special) const {
  std::vector<Piece> pieces;
  std::size_t done = 0;
  std::size_t at = 0;
  while (at < text.size()) {
    const AddedToken* const token = longest(text.substr(at));
    if (token == nullptr) {
      ++at;
      continue;
    }
    std::size_t begin = at;
    std::size_t end = at + token->text.size();
    at = end;
    if (token->is_special && !read_special) continue;
    if (token->strips_left) begin -= spaces_at_end(text.substr(0, begin));
    if (token->strips_right) end += spaces_at_start(text.substr(end));
    if (begin > done) pieces.push_back({nullptr, done, text.substr(done, begin - done)});
    pieces.push_back({token, begin, text.substr(begin, end - begin)});
    done = end;
    at = end;
  }
  if (done < text.size()) pieces.push_back({nullptr, done, text.substr(done)});
  return pieces;
}

namespace detail {

/// All white space of Unicode.
inline constexpr std::string_view kSpaces[] = {  // NOLINT(modernize-avoid-c-arrays)
    "\t",           "\n",           "\v",           "\f",           "\r",           " ",
    "\xC2\x85",     "\xC2\xA0",     "\xE1\x9A\x80", "\xE2\x80\x80", "\xE2\x80\x81", "\xE2\x80\x82",
    "\xE2\x80\x83", "\xE2\x80\x84", "\xE2\x80\x85", "\xE2\x80\x86", "\xE2\x80\x87", "\xE2\x80\x88",
    "\xE2\x80\x89", "\xE2\x80\x8A", "\xE2\x80\xA8", "\xE2\x80\xA9", "\xE2\x80\xAF", "\xE2\x81\x9F",
    "\xE3\x80\x80"};

}  // namespace detail

inline std::size_t spaces_at_start(std::string_view text) {
  std::size_t length = 0;
  for (bool found = true; found;) {
    found = false;
    for (const std::string_view space : detail::kSpaces) {
      if (text.substr(length).starts_with(space)) {
        length += space.size();
        found = true;
      }
    }
  }
  return length;
}

inline std::size_t spaces_at_end(std::string_view text) {
  std::size_t length = 0;
  for (bool found = true; found;) {
    found = false;
    for (const std::string_view space : detail::kSpaces) {
      if (text.substr(0, text.size() - length).ends_with(space)) {
        length += space.size();
        found = true;
      }
    }
  }
  return length;
}

}  // namespace weir::io
