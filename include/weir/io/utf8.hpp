// SPDX-License-Identifier: MIT
/// \file
/// Text in UTF-8 that may be broken or come in pieces.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace weir::io {

/// The bytes at the start of a text that belong together.
struct Utf8Start {
  enum class Kind {
    kCharacter,   ///< A whole character.
    kBroken,      ///< Bytes that no character begins with, or one that does not go on.
    kIncomplete,  ///< The text ends within a character.
  };
  Kind kind;
  std::size_t length;
};

/// What a text that is not empty begins with. Characters are those of the Unicode Standard, table
/// 3-7: none is longer than needed, a surrogate or above U+10FFFF.
Utf8Start utf8_start(std::string_view text);

/// The text with U+FFFD in place of each broken start of a character, or byte that starts none, as
/// the Unicode Standard (section 3.9) and web browsers do it.
std::string valid_utf8(std::string_view text);

/// The text with `to` in place of each `from`, which is not empty.
std::string replace_all(std::string_view text, std::string_view from, std::string_view to);

/// Puts text together whose pieces may end within a character.
class Utf8Joiner {
 public:
  /// \return         All characters that are complete, with U+FFFD for broken ones.
  std::string add(std::string_view bytes);

  /// \return         U+FFFD if a character has been left incomplete, otherwise nothing.
  std::string flush();

 private:
  std::string held_;
};

inline Utf8Start utf8_start(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(0);
  if (first < 0x80) return {Utf8Start::Kind::kCharacter, 1};
  if (first < 0xC2 || first > 0xF4) return {Utf8Start::Kind::kBroken, 1};
  const std::size_t length = first < 0xE0 ? 2 : (first < 0xF0 ? 3 : 4);
  unsigned char least = first == 0xE0 ? 0xA0 : (first == 0xF0 ? 0x90 : 0x80);
  unsigned char most = first == 0xED ? 0x9F : (first == 0xF4 ? 0x8F : 0xBF);
  for (std::size_t i = 1; i < length; ++i) {
    if (i == text.size()) return {Utf8Start::Kind::kIncomplete, i};
    if (byte(i) < least || byte(i) > most) return {Utf8Start::Kind::kBroken, i};
    least = 0x80;
    most = 0xBF;
  }
  return {Utf8Start::Kind::kCharacter, length};
}

inline std::string valid_utf8(std::string_view text) {
  Utf8Joiner joiner;
  std::string valid = joiner.add(text);
  return valid += joiner.flush();
}

inline std::string replace_all(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  while (true) {
    const std::size_t at = text.find(from);
    result += text.substr(0, at);
    if (at == std::string_view::npos) return result;
    result += to;
    text.remove_prefix(at + from.size());
  }
}

inline std::string Utf8Joiner::add(std::string_view bytes) {
  std::string joined = held_;
  joined += bytes;
  held_.clear();
  std::string valid;
  std::string_view rest = joined;
  while (!rest.empty()) {
    const auto [kind, length] = utf8_start(rest);
    if (kind == Utf8Start::Kind::kIncomplete) {
      held_ = rest;
      break;
    }
    if (kind == Utf8Start::Kind::kCharacter) {
      valid += rest.substr(0, length);
    } else {
      valid += "\xEF\xBF\xBD";
    }
    rest.remove_prefix(length);
  }
  return valid;
}

inline std::string Utf8Joiner::flush() {
  const bool is_open = !held_.empty();
  held_.clear();
  return is_open ? "\xEF\xBF\xBD" : "";
}

}  // namespace weir::io
