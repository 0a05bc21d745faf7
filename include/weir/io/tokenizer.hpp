// SPDX-License-Identifier: MIT
/// \file
/// Turns text into the numbers that a language model reads, and back.
#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/token_table.hpp>
#include <weir/io/utf8.hpp>

namespace weir::io {

/// Settings of `Tokenizer::encode`.
struct EncodeConfig {
  /// Whether the tokens that the model expects around a text, such as its beginning, are added.
  bool add_special = true;
  /// Whether special tokens that are written out in the text, such as "<|endoftext|>", become these
  /// tokens. Switched off, nothing that others have written can pose as one.
  bool read_special = true;
};

/// Whether special tokens appear in decoded text.
enum class Specials { kSkip, kKeep };

/// The tokens of a model, and how text is divided into them. All members that are const may be
/// called by several threads at once.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// The tokens of a text in UTF-8, of any length. Bytes that are no UTF-8 count as U+FFFD, see
  /// `valid_utf8`.
  std::vector<Index> encode(std::string_view text, const EncodeConfig& config = {}) const;

  /// The text of tokens, always in UTF-8: bytes that make no character become U+FFFD. Ids without a
  /// token, with which embeddings are padded, add nothing.
  /// \throws ConfigError  if an id is negative.
  std::string decode(std::span<const Index> ids, Specials specials = Specials::kSkip) const;

  /// One more than the largest id: the fewest rows that an embedding has to have.
  Index vocab_size() const { return table_.size(); }

  /// Nothing if no token has that name.
  std::optional<Index> id_of(std::string_view name) const { return table_.id_of(name); }

  /// The name of a token, as the file of the vocabulary spells it.
  /// \throws ConfigError  if there is no such token.
  const std::string& token_of(Index id) const { return known("token_of", id).name; }

  /// The token, nothing for an id without one.
  const Token* find(Index id) const { return table_.find(id); }

  /// The token that begins a text, and the one that ends it, where the model has them.
  std::optional<Index> bos() const { return bos_; }
  std::optional<Index> eos() const { return eos_; }

  /// What `encode` puts before and behind a text.
  const std::vector<Index>& before() const { return before_; }
  const std::vector<Index>& after() const { return after_; }

  /// \throws ConfigError  if there is no such token.
  void set_bos(Index id) {
    known("set_bos", id);
    bos_ = id;
  }
  void set_eos(Index id) {
    known("set_eos", id);
    eos_ = id;
  }
  void set_frame(std::vector<Index> before, std::vector<Index> after);

 protected:
  /// Which spaces at the beginning of decoded text are not part of it, since encoding adds them.
  enum class Strip {
    kNone,
    kOne,            ///< One.
    kOneOfEachToken  ///< One of each token, as long as there is no text.
  };

  Tokenizer(TokenTable table, Strip strip) : table_(std::move(table)), strip_(strip) {}
  Tokenizer(const Tokenizer&) = default;
  Tokenizer(Tokenizer&&) = default;
  Tokenizer& operator=(const Tokenizer&) = default;
  Tokenizer& operator=(Tokenizer&&) = default;

  const TokenTable& table() const { return table_; }

 private:
  friend class TextStream;

  /// Appends the tokens of `text`, which is in UTF-8.
  virtual void append_ids(std::string_view text, const EncodeConfig& config,
                          std::vector<Index>& ids) const = 0;

  const Token& known(std::string_view who, Index id) const {
    const Token* const token = table_.find(id);
    if (token == nullptr) {
      throw_error<ConfigError>(who, ": id = ", id, ", expected one of the ", vocab_size(),
                               " ids that has a token");
    }
    return *token;
  }

  TokenTable table_;
  Strip strip_;
  std::optional<Index> bos_;
  std::optional<Index> eos_;
  std::vector<Index> before_;
  std::vector<Index> after_;
};

/// Decodes tokens one by one, as a model writes them: what has been added up is at any time the
/// beginning of what `Tokenizer::decode` makes of all tokens. Characters whose bytes are spread
/// over several tokens are held back until they are complete.
///
///     TextStream stream(tokenizer);
///     while (...) std::cout << stream.add(next_token()) << std::flush;
///     std::cout << stream.flush();
class TextStream {
 public:
  /// \param tokenizer  Has to outlive the stream.
  explicit TextStream(const Tokenizer& tokenizer, Specials specials = Specials::kSkip)
      : tokenizer_(&tokenizer), specials_(specials) {}

  /// \return             What can be shown now that `id` is known; often nothing.
  /// \throws ConfigError  if the id is negative.
  std::string add(Index id);

  /// \return             What is left of a character that does not go on. The next token begins a
  ///                     new text.
  std::string flush();

 private:
  const Tokenizer* tokenizer_;
  Specials specials_;
  bool has_begun_ = false;
  Utf8Joiner joiner_;
};

inline std::vector<Index> Tokenizer::encode(std::string_view text,
                                            const EncodeConfig& config) const {
  std::vector<Index> ids;
  if (config.add_special) ids = before_;
  append_ids(valid_utf8(text), config, ids);
  if (config.add_special) ids.insert(ids.end(), after_.begin(), after_.end());
  return ids;
}

inline std::string Tokenizer::decode(std::span<const Index> ids, Specials specials) const {
  TextStream stream(*this, specials);
  std::string text;
  for (const Index id : ids) text += stream.add(id);
  return text += stream.flush();
}

inline void Tokenizer::set_frame(std::vector<Index> before, std::vector<Index> after) {
  for (const Index id : before) known("set_frame", id);
  for (const Index id : after) known("set_frame", id);
  before_ = std::move(before);
  after_ = std::move(after);
}

inline std::string TextStream::add(Index id) {
  expect_at_least<Index>("decode", "id", id, 0);
  const Token* const token = tokenizer_->find(id);
  if (token == nullptr || (token->is_special && specials_ == Specials::kSkip)) return "";
  std::string_view bytes = token->bytes;
  if (bytes.empty()) return "";
  const bool strips = tokenizer_->strip_ != Tokenizer::Strip::kNone;
  if (strips && !has_begun_ && token->begins_word) bytes.remove_prefix(1);
  has_begun_ = has_begun_ || !bytes.empty() || tokenizer_->strip_ == Tokenizer::Strip::kOne;
  return joiner_.add(bytes);
}

inline std::string TextStream::flush() {
  has_begun_ = false;
  return joiner_.flush();
}

}  // namespace weir::io
