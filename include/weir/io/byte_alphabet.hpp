// SPDX-License-Identifier: MIT
/// \file
/// The letters with which byte-level vocabularies spell bytes.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>

#include <weir/io/utf8.hpp>

namespace weir::io {

/// The letter of each byte. Printable characters of Latin-1 spell themselves, the other bytes are,
/// in order, the characters from U+0100 on: a space is "Ġ". (Radford et al. 2019, GPT-2's
/// encoder.py.)
inline const std::array<std::string, 256>& byte_letters() {
  static const std::array<std::string, 256> letters = [] {
    std::array<std::string, 256> all;
    unsigned int next = 0x100;
    for (unsigned int byte = 0; byte < 256; ++byte) {
      const bool is_printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
      const unsigned int code = is_printable ? byte : next++;
      if (code < 0x80) {
        all[byte] = static_cast<char>(code);
      } else {
        all[byte] = {static_cast<char>(0xC0U | code >> 6U),
                     static_cast<char>(0x80U | (code & 0x3FU))};
      }
    }
    return all;
  }();
  return letters;
}

/// The bytes as they are spelled in a vocabulary.
inline std::string spelled(std::string_view bytes) {
  std::string name;
  for (const char byte : bytes) name += byte_letters()[static_cast<unsigned char>(byte)];
  return name;
}

/// The bytes that a name of valid UTF-8 spells; the name itself if it has other letters.
inline std::string unspelled(std::string_view name) {
  static const std::unordered_map<std::string_view, char> bytes = [] {
    std::unordered_map<std::string_view, char> all;
    for (std::size_t byte = 0; byte < 256; ++byte) {
      all.emplace(byte_letters()[byte], static_cast<char>(byte));
    }
    return all;
  }();
  std::string result;
  for (std::string_view rest = name; !rest.empty();) {
    const std::size_t length = utf8_start(rest).length;
    const auto found = bytes.find(rest.substr(0, length));
    if (found == bytes.end()) return std::string(name);
    result += found->second;
    rest.remove_prefix(length);
  }
  return result;
}

}  // namespace weir::io
