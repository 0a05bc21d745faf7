// SPDX-License-Identifier: MIT
/// \file
/// The regular expressions with which published tokenizers divide text into words.
#pragma once

#define PCRE2_CODE_UNIT_WIDTH 8

#include <algorithm>
#include <cctype>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>
#include <pcre2.h>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/io/file_error.hpp>

namespace weir::io {

/// A regular expression in the syntax of Oniguruma, the library for which those of tokenizer.json
/// are written, matched by PCRE2. Taken is what means the same to both: characters, `.`, `^`, `$`
/// (at lines), sets of characters and ranges, also [A&&[^B]], \s \S \d \D, \p{..} with a general
/// category or a script, (?:..), (?i:..), (?>..), look-around, `|` and the quantifiers. Everything
/// else is refused with the reason, and so is what can match nothing. White space is Unicode's.
class Regex {
 public:
  /// Where a match begins, and where it ends.
  using Range = std::pair<std::size_t, std::size_t>;

  /// The longest expression that is read.
  static constexpr std::size_t kMostPattern = 16384;

  /// \param path        What messages call the file that it stands in.
  /// \throws FileError  if it is none, or uses what is not taken.
  Regex(std::string path, std::string pattern);

  /// The matches in a text from left to right, without overlap.
  /// \param text        Valid UTF-8.
  /// \throws FileError  if a match takes more than 64 steps for each byte of the text, and a
  ///                    million. Published expressions need 2 or 3.
  std::vector<Range> matches(std::string_view text) const;

 private:
  struct Free {
    void operator()(pcre2_code* code) const { pcre2_code_free(code); }
    void operator()(pcre2_compile_context* context) const { pcre2_compile_context_free(context); }
    void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
    void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  };

  static constexpr std::uint32_t kLeastSteps = 1'000'000;
  static constexpr std::uint32_t kStepsPerByte = 64;
  static constexpr std::uint32_t kMostKilobytes = 262'144;

  template <class... Parts>
  [[noreturn]] void reject(const Parts&... parts) const {
    throw_error<FileError>(path_, ": the regular expression '", pattern_, "' ", parts...);
  }

  /// The expression as PCRE2 spells it.
  std::string translated() const;
  std::size_t read_escape(std::size_t at, std::string& result) const;
  std::size_t read_property(std::size_t at, std::string& result) const;
  std::size_t read_set(std::size_t at, std::string& result) const;
  std::size_t read_list(std::size_t at, std::string& result) const;
  std::size_t read_group(std::size_t at, std::string& result) const;
  std::size_t read_count(std::size_t at, std::string& result) const;

  std::string_view rest(std::size_t at) const { return std::string_view(pattern_).substr(at); }

  std::string path_;
  std::string pattern_;
  std::shared_ptr<const pcre2_code> code_;
};

inline Regex::Regex(std::string path, std::string pattern)
    : path_(std::move(path)), pattern_(std::move(pattern)) {
  if (pattern_.size() > kMostPattern) {
    throw_error<FileError>(path_, ": a regular expression has ", pattern_.size(),
                           " bytes, expected at most ", kMostPattern);
  }
  const std::string text = translated();
  const std::unique_ptr<pcre2_compile_context, Free> context(pcre2_compile_context_create(nullptr));
  if (!context) throw std::bad_alloc();
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  std::size_t where = 0;
  pcre2_code* const code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_AUTO_CAPTURE, &error, &where,
                    context.get());
  if (code == nullptr) {
    unsigned char message[256] = {};  // NOLINT(modernize-avoid-c-arrays): C's interface.
    pcre2_get_error_message(error, message, sizeof message);
    reject("is none: ", reinterpret_cast<const char*>(message));
  }
  code_ = {code, Free()};
  std::uint32_t matches_nothing = 0;
  pcre2_pattern_info(code, PCRE2_INFO_MATCHEMPTY, &matches_nothing);
  if (matches_nothing != 0) reject("can match nothing, expected one that always matches something");
}

inline std::vector<Regex::Range> Regex::matches(std::string_view text) const {
  const std::unique_ptr<pcre2_match_context, Free> context(pcre2_match_context_create(nullptr));
  const std::unique_ptr<pcre2_match_data, Free> data(
      pcre2_match_data_create_from_pattern(code_.get(), nullptr));
  if (!context || !data) throw std::bad_alloc();
  const std::size_t steps = kLeastSteps + kStepsPerByte * text.size();
  pcre2_set_match_limit(context.get(), static_cast<std::uint32_t>(std::min<std::size_t>(
                                           steps, std::numeric_limits<std::uint32_t>::max())));
  pcre2_set_heap_limit(context.get(), kMostKilobytes);
  std::vector<Range> found;
  std::size_t from = 0;
  while (from < text.size()) {
    const int result =
        pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                    PCRE2_NO_UTF_CHECK, data.get(), context.get());
    if (result == PCRE2_ERROR_NOMATCH) break;
    if (result == PCRE2_ERROR_NOMEMORY) throw std::bad_alloc();
    if (result < 0) reject("takes too many steps on a text of ", text.size(), " bytes");
    const std::size_t* const ends = pcre2_get_ovector_pointer(data.get());
    found.emplace_back(ends[0], ends[1]);
    from = ends[1];
  }
  return found;
}

inline std::string Regex::translated() const {
  std::string result;
  std::size_t at = 0;
  while (at < pattern_.size()) {
    const char c = pattern_[at];
    if (c == '\\') {
      at = read_escape(at, result);
    } else if (c == '[') {
      at = read_set(at, result);
    } else if (c == '(') {
      at = read_group(at, result);
    } else if (c == '{') {
      at = read_count(at, result);
    } else {
      if (c == '}' || c == ']') reject("has an unescaped bracket at byte ", at);
      result += c;
      ++at;
    }
  }
  return result;
}

/// A backslash and what follows it.
inline std::size_t Regex::read_escape(std::size_t at, std::string& result) const {
  if (at + 1 == pattern_.size()) reject("ends with a backslash");
  const char c = pattern_[at + 1];
  switch (c) {
    case 's':
      result += "\\p{White_Space}";  // PCRE2's own has U+180E as well.
      return at + 2;
    case 'S':
      result += "\\P{White_Space}";
      return at + 2;
    case 'p':
    case 'P':
      return read_property(at, result);
    default:
      break;
  }
  const bool is_known = std::string_view("dDrntf").find(c) != std::string_view::npos;
  if (!is_known && std::ispunct(static_cast<unsigned char>(c)) == 0) {
    reject("uses ", rest(at).substr(0, 2), ", which weir does not know");
  }
  result += rest(at).substr(0, 2);
  return at + 2;
}

/// "\p{L}" and "\p{Han}".
inline std::size_t Regex::read_property(std::size_t at, std::string& result) const {
  const std::size_t end = pattern_.find('}', at);
  if (rest(at + 2).substr(0, 1) != "{" || end == std::string::npos) {
    reject("has a property without braces at byte ", at);
  }
  const std::string name = pattern_.substr(at + 3, end - at - 3);
  for (const char c : name) {
    if (std::isalpha(static_cast<unsigned char>(c)) == 0 && c != '_') {
      reject("uses the property '", name, "', which weir does not know");
    }
  }
  // A category has one or two letters. Scripts are those of Script, not Script_Extensions.
  result += rest(at).substr(0, 3);
  result += (name.size() > 2 ? "sc:" : "") + name + "}";
  return end + 1;
}

/// A set of characters. "[A&&[^B]]" is those of A that are not in B; other brackets and "&&" within
/// a set, which Oniguruma knows and PCRE2 does not, are refused.
inline std::size_t Regex::read_set(std::size_t at, std::string& result) const {
  std::string set;
  const std::size_t begin = at;
  at = read_list(at, set);
  if (!rest(at).starts_with("&&")) {
    result += set + "]";
    return at + 1;
  }
  std::string without;
  if (!rest(at).starts_with("&&[^") || rest(begin).starts_with("[^")) {
    reject("combines sets at byte ", at, ", which weir does not know");
  }
  at = read_list(at + 2, without);
  if (!rest(at).starts_with("]]")) {
    reject("combines sets at byte ", at, ", which weir does not know");
  }
  result += "(?:(?![" + without.substr(2) + "])" + set + "])";
  return at + 2;
}

/// A set up to its end or to "&&", neither of which is read.
inline std::size_t Regex::read_list(std::size_t at, std::string& result) const {
  result += pattern_[at++];
  if (rest(at).starts_with('^')) result += pattern_[at++];
  if (rest(at).starts_with(']') || rest(at).starts_with("&&")) {
    reject("has an empty set at byte ", at);
  }
  while (at < pattern_.size() && pattern_[at] != ']' && !rest(at).starts_with("&&")) {
    if (pattern_[at] == '\\') {
      at = read_escape(at, result);
      continue;
    }
    if (pattern_[at] == '[') reject("combines sets at byte ", at, ", which weir does not know");
    result += pattern_[at++];
  }
  if (at == pattern_.size()) reject("has a set without an end");
  return at;
}

/// The beginning of a group.
inline std::size_t Regex::read_group(std::size_t at, std::string& result) const {
  std::string_view start = "(";
  if (rest(at + 1).starts_with('?')) {
    start = "";
    for (const std::string_view known : {"(?:", "(?i:", "(?>", "(?=", "(?!", "(?<=", "(?<!"}) {
      if (rest(at).starts_with(known)) start = known;
    }
  }
  if (start.empty() || rest(at + 1).starts_with('*')) {
    reject("has a group '", rest(at).substr(0, 4), "' that weir does not know");
  }
  result += start;
  return at + start.size();
}

/// "{3}", "{1,3}" or "{2,}". What a quantifier behind it means differs.
inline std::size_t Regex::read_count(std::size_t at, std::string& result) const {
  std::size_t end = at + 1;
  while (end < pattern_.size() && std::isdigit(static_cast<unsigned char>(pattern_[end])) != 0) {
    ++end;
  }
  const bool has_least = end > at + 1;
  if (rest(end).starts_with(',')) ++end;
  while (end < pattern_.size() && std::isdigit(static_cast<unsigned char>(pattern_[end])) != 0) {
    ++end;
  }
  const std::string_view behind = rest(end).substr(0, 2);
  if (!has_least || !behind.starts_with('}') || behind == "}+" || behind == "}?" ||
      behind == "}*") {
    reject("has a brace at byte ", at, " that weir does not know");
  }
  result += rest(at).substr(0, end + 1 - at);
  return end + 1;
}

}  // namespace weir::io
