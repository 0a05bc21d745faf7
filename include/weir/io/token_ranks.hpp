// SPDX-License-Identifier: MIT
/// \file
/// Vocabularies as tiktoken stores them: the bytes of tokens, in the order of their merges.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/added_tokens.hpp>
#include <weir/io/bpe_model.hpp>
#include <weir/io/bpe_parts.hpp>
#include <weir/io/byte_alphabet.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/regex.hpp>
#include <weir/io/token_table.hpp>
#include <weir/io/utf8.hpp>

namespace weir::io {

/// How published models divide text into words, for `RanksConfig::pattern`.
namespace patterns {

/// GPT-2 and GPT-3.
inline constexpr const char* kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

/// GPT-4 (cl100k_base), DBRX and Llama 3.
inline constexpr const char* kCl100k =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|)"
    R"( ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// GPT-4o (o200k_base), gpt-oss and Llama 4.
inline constexpr const char* kO200k =
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*)"
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"(\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// Kimi K2.
inline constexpr const char* kKimiK2 =
    R"([\p{Han}]+|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*)"
    R"([\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"([^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+)"
    R"([\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|)"
    R"(\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";

}  // namespace patterns

/// Settings of `BpeTokenizer::from_ranks`: what a file of ranks does not say.
struct RanksConfig {
  std::string pattern;  ///< Matches words, see Regex; what it leaves out has no tokens.
  /// Special tokens and their ids, such as {"<|endoftext|>", 50256}.
  std::vector<std::pair<std::string, Index>> special = {};
};

namespace detail {

/// The bytes that a text in base64 stands for; nothing if it is none.
inline std::optional<std::string> from_base64(std::string_view text) {
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  if (text.size() % 4 != 0) return std::nullopt;
  if (text.ends_with("==")) {
    text.remove_suffix(2);
  } else if (text.ends_with("=")) {
    text.remove_suffix(1);
  }
  std::string bytes;
  std::uint32_t bits = 0;
  unsigned int count = 0;
  for (const char c : text) {
    const std::size_t digit = kDigits.find(c);
    if (digit == std::string_view::npos) return std::nullopt;
    bits = (bits << 6U | static_cast<std::uint32_t>(digit)) & 0xFFFFU;
    count += 6;
    if (count >= 8) {
      count -= 8;
      bytes += static_cast<char>(bits >> count & 0xFFU);
    }
  }
  if ((bits & ((1U << count) - 1U)) != 0) return std::nullopt;
  return bytes;
}

inline constexpr std::size_t kMostRankBytes = 512;

/// The tokens of a file of ranks, whose ids are 0, 1, 2, ...
inline std::vector<std::string> tokens_of_ranks(const std::string& path, std::string_view lines) {
  std::vector<std::string> tokens;
  while (!lines.empty()) {
    const std::size_t end = std::min(lines.find('\n'), lines.size());
    const std::string_view line = lines.substr(0, end);
    lines.remove_prefix(std::min(end + 1, lines.size()));
    const auto bad = [&](std::string_view fault) {
      throw_error<FileError>(path, ": line ", tokens.size() + 1, " ", fault);
    };
    const std::size_t space = line.find(' ');
    if (space == std::string_view::npos) bad("has no space, expected base64 and a rank");
    const auto bytes = from_base64(line.substr(0, space));
    if (!bytes || bytes->empty()) bad("does not begin with bytes in base64");
    if (bytes->size() > kMostRankBytes) bad("has a token of more than 512 bytes");
    const std::string_view number = line.substr(space + 1);
    std::size_t rank = 0;
    const auto read = std::from_chars(number.data(), number.data() + number.size(), rank);
    if (read.ec != std::errc() || read.ptr != number.data() + number.size() ||
        rank != tokens.size()) {
      bad("does not have the next rank, expected 0, 1, 2, ...");
    }
    tokens.push_back(*bytes);
  }
  return tokens;
}

/// \throws FileError  as `BpeTokenizer::from_ranks`.
inline BpeParts parts_of_ranks(const std::string& path, std::string_view lines,
                               const RanksConfig& config) {
  TokenTable table;
  const std::vector<std::string> tokens = tokens_of_ranks(path, lines);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    if (!table.add(static_cast<Index>(i), {spelled(tokens[i]), tokens[i]})) {
      throw_error<FileError>(path, ": line ", i + 1, " has the token of another line");
    }
  }
  BpeModel model(path, table, BpeKind::kBytes, true);
  // Each two tokens that make a third one merge, by its rank.
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    for (std::size_t length = 1; length < tokens[i].size(); ++length) {
      const std::string left = spelled(std::string_view(tokens[i]).substr(0, length));
      const std::string right = spelled(std::string_view(tokens[i]).substr(length));
      if (table.id_of(left) && table.id_of(right)) {
        model.add_merge(left, right, static_cast<Index>(i));
      }
    }
  }

  std::vector<AddedToken> special;
  for (const auto& [text, id] : config.special) {
    expect_in<Index>("from_ranks", "id of '" + text + "'", id, 0, 2 * table.size() + 65536);
    if (text.empty() || valid_utf8(text) != text || !table.add(id, {text, text, true})) {
      throw_error<FileError>(path, ": the special token '", text, "' with the id ", id,
                             " is empty, no UTF-8, or there already");
    }
    special.push_back({id, text, true});
  }
  return {.table = std::move(table),
          .model = std::move(model),
          .pipeline = {.splitters = {{Regex(path, config.pattern), true, false}}},
          .added = AddedTokens(std::move(special))};
}

}  // namespace detail
}  // namespace weir::io
