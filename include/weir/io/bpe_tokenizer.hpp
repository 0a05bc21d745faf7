// SPDX-License-Identifier: MIT
/// \file
/// Byte-pair encoding as published models use it: tokenizer.json, and files of ranks.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/io/added_tokens.hpp>
#include <weir/io/bpe_model.hpp>
#include <weir/io/mapped_file.hpp>
#include <weir/io/text_pipeline.hpp>
#include <weir/io/token_ranks.hpp>
#include <weir/io/token_table.hpp>
#include <weir/io/tokenizer.hpp>
#include <weir/io/tokenizer_json.hpp>

namespace weir::io {

/// A tokenizer of byte-pair encoding. It gives each text the tokens that the libraries give it for
/// which its file was made (Hugging Face's tokenizers, OpenAI's tiktoken), up to characters that
/// are newer than the Unicode of PCRE2 and utf8proc.
class BpeTokenizer : public Tokenizer {
 public:
  /// Reads a tokenizer.json with a model of byte-pair encoding:
  ///
  /// - on bytes (GPT-2, GPT-4, GPT-4o, Llama 3, Qwen, DeepSeek, OLMoE, Granite, gpt-oss): steps
  ///   ByteLevel, Split by an expression, Digits;
  /// - on characters with byte fallback (Llama 2, Mixtral): "▁" for spaces by Prepend and Replace
  ///   or by Metaspace.
  ///
  /// `bos` is the first token that its template puts before a text; the file does not name `eos`.
  /// \throws FileError  if the file is broken, made with ill intent, or has a setting that would
  ///                    change the tokens and that weir does not know; the message names it.
  static BpeTokenizer read(const std::string& path) {
    const MappedFile file(path);
    return BpeTokenizer(path,
                        {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()});
  }

  /// \param path        For messages.
  /// \param json        The content of a tokenizer.json.
  /// \throws FileError  as `read`.
  BpeTokenizer(const std::string& path, std::string_view json)
      : BpeTokenizer(detail::TokenizerJson(path, json).parts()) {}

  /// Reads a file of ranks, as tiktoken, Llama 3, DBRX, Kimi K2 and gpt-oss have it: a line for
  /// each token, with its bytes in base64 and its id, which is also the rank of its merge.
  /// \throws FileError  if the file is broken, or a special token has the id or name of another.
  static BpeTokenizer from_ranks(const std::string& path, const RanksConfig& config) {
    const MappedFile file(path);
    return from_ranks(
        path, {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}, config);
  }

  /// \param path        For messages.
  /// \param lines       The content of a file of ranks.
  /// \throws FileError  as above.
  static BpeTokenizer from_ranks(const std::string& path, std::string_view lines,
                                 const RanksConfig& config) {
    return BpeTokenizer(detail::parts_of_ranks(path, lines, config));
  }

 private:
  explicit BpeTokenizer(BpeParts parts)
      : Tokenizer(std::move(parts.table), parts.strips_space ? Strip::kOne : Strip::kNone),
        model_(std::move(parts.model)),
        pipeline_(std::move(parts.pipeline)),
        added_(std::move(parts.added)),
        added_to_normalised_(std::move(parts.added_to_normalised)) {
    if (!parts.before.empty()) set_bos(parts.before.front());
    set_frame(std::move(parts.before), std::move(parts.after));
  }

  void append_ids(std::string_view text, const EncodeConfig& config,
                  std::vector<Index>& ids) const override;

  BpeModel model_;
  TextPipeline pipeline_;
  AddedTokens added_;
  AddedTokens added_to_normalised_;
};

inline void BpeTokenizer::append_ids(std::string_view text, const EncodeConfig& config,
                                     std::vector<Index>& ids) const {
  for (const auto& piece : added_.split(text, config.read_special)) {
    if (piece.token != nullptr) {
      ids.push_back(piece.token->id);
      continue;
    }
    const std::string normalised = pipeline_.normalised(std::string(piece.text));
    for (const auto& part : added_to_normalised_.split(normalised, config.read_special)) {
      if (part.token != nullptr) {
        ids.push_back(part.token->id);
        continue;
      }
      const bool is_start = piece.begin == 0 && part.begin == 0;
      const std::string words = pipeline_.with_spaces(std::string(part.text), is_start);
      for (const std::string_view word : pipeline_.words(words)) model_.append(word, ids);
    }
  }
}

}  // namespace weir::io
