// SPDX-License-Identifier: MIT
/// \file
/// What happens to a text before its words become tokens.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utf8proc.h>
#include <utility>
#include <variant>
#include <vector>

#include <weir/io/regex.hpp>
#include <weir/io/utf8.hpp>

namespace weir::io {

/// Gives characters that can be written in several ways one of them: Unicode's normalization form
/// C.
struct ComposeCharacters {};

/// Puts `text` before a text that is not empty.
struct Prepend {
  std::string text;
};

/// Writes `to` in place of each `from`, which is not empty.
struct Replace {
  std::string from;
  std::string to;
};

using Normaliser = std::variant<ComposeCharacters, Prepend, Replace>;

/// Divides text where an expression matches.
struct Splitter {
  Regex regex;
  bool keeps_matches = true;  ///< Whether what matches makes words.
  bool keeps_rest = true;     ///< Whether what lies between makes words.
};

/// Before which pieces of a text a space is put.
enum class LeadingSpace {
  kNever,
  kFirst,  ///< Before what a text begins with.
  kAlways  ///< Before each piece between added tokens.
};

/// The steps from a piece of text to words, in the order in which they are done.
struct TextPipeline {
  std::vector<Normaliser> normalisers = {};
  std::string space = " ";                            ///< What is written for a space.
  LeadingSpace leading_space = LeadingSpace::kNever;  ///< Unless the piece begins with one.
  std::vector<Splitter> splitters = {};

  std::string normalised(std::string text) const;

  /// Replaces spaces and adds the leading one.
  /// \param is_start  Whether the piece is what the text begins with.
  std::string with_spaces(std::string text, bool is_start) const;

  /// The words of a piece, none of them empty.
  /// \throws FileError  if a splitter takes too many steps.
  std::vector<std::string_view> words(std::string_view text) const;
};

namespace detail {

/// \param text     Valid UTF-8.
inline std::string composed(std::string_view text) {
  const bool is_ascii = std::all_of(text.begin(), text.end(),
                                    [](char c) { return static_cast<unsigned char>(c) < 0x80; });
  if (is_ascii) return std::string(text);
  utf8proc_uint8_t* mapped = nullptr;
  const auto length =
      utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                   static_cast<utf8proc_ssize_t>(text.size()), &mapped,
                   static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owner(mapped, &std::free);
  if (length < 0) throw std::bad_alloc();
  return {reinterpret_cast<const char*>(mapped), static_cast<std::size_t>(length)};
}

struct Normalise {
  std::string text;

  std::string operator()(const ComposeCharacters& /*form*/) const { return composed(text); }
  std::string operator()(const Prepend& step) const {
    return text.empty() ? text : step.text + text;
  }
  std::string operator()(const Replace& step) const {
    return replace_all(text, step.from, step.to);
  }
};

}  // namespace detail

inline std::string TextPipeline::normalised(std::string text) const {
  for (const Normaliser& normaliser : normalisers) {
    text = std::visit(detail::Normalise{std::move(text)}, normaliser);
  }
  return text;
}

inline std::string TextPipeline::with_spaces(std::string text, bool is_start) const {
  if (space != " ") text = replace_all(text, " ", space);
  const bool adds =
      leading_space == LeadingSpace::kAlways || (leading_space == LeadingSpace::kFirst && is_start);
  if (adds && !text.starts_with(space)) text.insert(0, space);
  return text;
}

inline std::vector<std::string_view> TextPipeline::words(std::string_view text) const {
  std::vector<std::string_view> words;
  if (!text.empty()) words.push_back(text);
  for (const Splitter& splitter : splitters) {
    std::vector<std::string_view> parts;
    const auto add = [&](std::string_view part, bool keeps) {
      if (keeps && !part.empty()) parts.push_back(part);
    };
    for (const std::string_view word : words) {
      std::size_t done = 0;
      for (const auto& [begin, end] : splitter.regex.matches(word)) {
        add(word.substr(done, begin - done), splitter.keeps_rest);
        add(word.substr(begin, end - begin), splitter.keeps_matches);
        done = end;
      }
      add(word.substr(done), splitter.keeps_rest);
    }
    words = std::move(parts);
  }
  return words;
}

}  // namespace weir::io
