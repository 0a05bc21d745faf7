// SPDX-License-Identifier: MIT
/// \file
/// Text of unknown origin that is shown on a terminal.
#pragma once

#include <cstdio>
#include <string>

/// Lets through what a terminal shows, and writes everything else as "\xNN": control bytes, except
/// for the ends of lines and tabs, which could move the cursor or change its colours, and bytes
/// that are no UTF-8. Bytes come one after the other; a character is held back until it is
/// complete.
class Escaper {
 public:
  /// \return         What can be shown now that `byte` is known.
  std::string add(unsigned char byte) {
    std::string shown;
    if (!held_.empty() && !continues(byte)) shown = flush();
    if (byte < 0x80) return shown + (is_plain(byte) ? std::string(1, char(byte)) : escaped(byte));
    held_ += static_cast<char>(byte);
    const int length = length_of(static_cast<unsigned char>(held_[0]));
    if (length == 0) return shown + flush();
    if (static_cast<int>(held_.size()) < length) return shown;
    shown += held_;
    held_.clear();
    return shown;
  }

  /// \return         What is left of a character that does not go on, escaped.
  std::string flush() {
    std::string shown;
    for (const char byte : held_) shown += escaped(static_cast<unsigned char>(byte));
    held_.clear();
    return shown;
  }

 private:
  static bool is_plain(unsigned char byte) {
    return (byte >= ' ' && byte != 0x7F) || byte == '\n' || byte == '\t';
  }

  static std::string escaped(unsigned char byte) {
    char text[5];
    std::snprintf(text, sizeof text, "\\x%02X", byte);
    return text;
  }

  /// How many bytes a character has that begins with `first`; 0 if none does.
  static int length_of(unsigned char first) {
    if (first >= 0xC2 && first <= 0xDF) return 2;
    if (first >= 0xE0 && first <= 0xEF) return 3;
    if (first >= 0xF0 && first <= 0xF4) return 4;
    return 0;
  }

  /// Whether `byte` is the next one of the character that is held. The ranges of the second byte
  /// leave out what is not Unicode, and U+0080 to U+009F, which are control characters.
  bool continues(unsigned char byte) const {
    if (byte < 0x80 || byte > 0xBF) return false;
    if (held_.size() > 1) return true;
    switch (static_cast<unsigned char>(held_[0])) {
      case 0xC2:
      case 0xE0:
        return byte >= 0xA0;
      case 0xED:
        return byte <= 0x9F;
      case 0xF0:
        return byte >= 0x90;
      case 0xF4:
        return byte <= 0x8F;
      default:
        return true;
    }
  }

  std::string held_;
};

/// The whole of a text, see Escaper.
inline std::string escaped(const std::string& text) {
  Escaper escaper;
  std::string shown;
  for (const char byte : text) shown += escaper.add(static_cast<unsigned char>(byte));
  return shown + escaper.flush();
}
