// SPDX-License-Identifier: MIT
/// \file
/// From words to tokens, by byte-pair encoding.
#pragma once

#include <array>
#include <cstddef>
#include <cstdio>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/bpe_merges.hpp>
#include <weir/io/byte_alphabet.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/token_table.hpp>
#include <weir/io/utf8.hpp>

namespace weir::io {

/// What the smallest tokens are.
enum class BpeKind {
  kBytes,      ///< Bytes, spelled with `byte_letters`, as in GPT-2.
  kCharacters  ///< Characters; bytes, spelled "<0x0A>", only of characters without a token.
};

/// A vocabulary with its merges.
class BpeModel {
 public:
  /// \param path          What messages call the file of the vocabulary.
  /// \param table         All its tokens.
  /// \param whole_words   Whether a word that is a token is this one, whatever the merges say.
  /// \throws FileError    if a byte that is part of some text has no token.
  BpeModel(std::string path, TokenTable table, BpeKind kind, bool whole_words);

  /// How a byte is spelled where it is a token.
  static std::string name_of(unsigned char byte, BpeKind kind);

  /// Adds the next merge of a list.
  /// \throws FileError  if a token is not in the vocabulary, or the pair is there already.
  void add_merge(const std::string& left, const std::string& right, Index rank);

  /// Appends the tokens of a word, which is valid UTF-8.
  void append(std::string_view word, std::vector<Index>& ids) const;

  /// The token of a name in the vocabulary; "▁" is a space.
  static Token token_of(const std::string& name, BpeKind kind);

 private:
  static constexpr Index kNone = -1;

  /// Bytes that are in no UTF-8.
  static bool is_never_text(std::size_t byte) {
    return byte == 0xC0 || byte == 0xC1 || byte > 0xF4;
  }

  static std::string bytes_of(std::string_view name, BpeKind kind);
  Index expect_token(const std::string& name, const std::string& left, const std::string& right,
                     Index rank) const;
  void append_characters(std::string_view word, std::vector<Index>& ids) const;

  std::string path_;
  TokenTable table_;  // Without tokens that are added to it.
  BpeKind kind_;
  bool whole_words_;
  BpeMerges merges_;
  std::array<Index, 256> bytes_ = {};
};

inline BpeModel::BpeModel(std::string path, TokenTable table, BpeKind kind, bool whole_words)
    : path_(std::move(path)), table_(std::move(table)), kind_(kind), whole_words_(whole_words) {
  for (std::size_t byte = 0; byte < bytes_.size(); ++byte) {
    const std::string name = name_of(static_cast<unsigned char>(byte), kind);
    const auto id = table_.id_of(name);
    if (!id && !is_never_text(byte)) {
      throw_error<FileError>(path_, ": has no token '", name, "' for the byte ", byte);
    }
    bytes_[byte] = id.value_or(kNone);
  }
}

inline std::string BpeModel::name_of(unsigned char byte, BpeKind kind) {
  if (kind == BpeKind::kBytes) return byte_letters()[byte];
  constexpr std::string_view kDigits = "0123456789ABCDEF";
  return {'<', '0', 'x', kDigits[byte >> 4U], kDigits[byte & 0xFU], '>'};
}

inline Token BpeModel::token_of(const std::string& name, BpeKind kind) {
  Token token{.name = name, .bytes = bytes_of(name, kind)};
  token.begins_word = token.bytes.starts_with(' ');
  return token;
}

inline std::string BpeModel::bytes_of(std::string_view name, BpeKind kind) {
  if (kind == BpeKind::kBytes) return unspelled(name);
  if (name.size() == 6 && name.starts_with("<0x")) {
    for (unsigned int byte = 0; byte < 256; ++byte) {
      if (name_of(static_cast<unsigned char>(byte), kind) == name) {
        return std::string(1, static_cast<char>(byte));
      }
    }
  }
  return replace_all(name, "\xE2\x96\x81", " ");
}

inline Index BpeModel::expect_token(const std::string& name, const std::string& left,
                                    const std::string& right, Index rank) const {
  const auto id = table_.id_of(name);
  if (!id) {
    throw_error<FileError>(path_, ": merge ", rank, " of '", left, "' and '", right, "' needs '",
                           name, "', which is not in the vocabulary");
  }
  return *id;
}

inline void BpeModel::add_merge(const std::string& left, const std::string& right, Index rank) {
  const Index first = expect_token(left, left, right, rank);
  const Index second = expect_token(right, left, right, rank);
  const Index merged = expect_token(left + right, left, right, rank);
  if (!merges_.add(first, second, rank, merged)) {
    throw_error<FileError>(path_, ": merge ", rank, " of '", left, "' and '", right,
                           "' is there twice");
  }
}

inline void BpeModel::append(std::string_view word, std::vector<Index>& ids) const {
  if (whole_words_) {
    const auto id = table_.id_of(kind_ == BpeKind::kBytes ? spelled(word) : std::string(word));
    if (id) {
      ids.push_back(*id);
      return;
    }
  }
  const std::size_t first = ids.size();
  if (kind_ == BpeKind::kCharacters) {
    append_characters(word, ids);
  } else {
    for (const char byte : word) ids.push_back(bytes_[static_cast<unsigned char>(byte)]);
  }
  merges_.apply(ids, first);
}

inline void BpeModel::append_characters(std::string_view word, std::vector<Index>& ids) const {
  while (!word.empty()) {
    const std::string_view character = word.substr(0, utf8_start(word).length);
    if (const auto id = table_.id_of(character)) {
      ids.push_back(*id);
    } else {
      for (const char byte : character) ids.push_back(bytes_[static_cast<unsigned char>(byte)]);
    }
    word.remove_prefix(character.size());
  }
}

}  // namespace weir::io
