// SPDX-License-Identifier: MIT
/// \file
/// The tokenizer in the folder of a published model.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/bpe_tokenizer.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/json_object.hpp>
#include <weir/io/tokenizer.hpp>
#ifdef WEIR_SENTENCEPIECE
#include <weir/io/sentencepiece_tokenizer.hpp>
#endif

namespace weir::io {

namespace detail {

/// The token that tokenizer_config.json names as `key`: a string, or an object with its content.
inline std::optional<Index> configured_token(const JsonObject& json, const std::string& key,
                                             const Tokenizer& tokenizer) {
  if (!json.has(key)) return std::nullopt;
  const std::string name =
      json.at(key).is_object() ? json.object(key).text("content") : json.text(key);
  const auto id = tokenizer.id_of(name);
  if (!id) json.bad(key, "a token of the vocabulary");
  return id;
}

/// Takes from tokenizer_config.json what the vocabulary's file does not say.
inline void configure(const JsonObject& json, Tokenizer& tokenizer) {
  if (const auto bos = configured_token(json, "bos_token", tokenizer)) tokenizer.set_bos(*bos);
  if (const auto eos = configured_token(json, "eos_token", tokenizer)) tokenizer.set_eos(*eos);
  // This class has settings instead of a template, whatever else stands in tokenizer.json.
  const std::string kind = json.has("tokenizer_class") ? json.text("tokenizer_class") : "";
  if (kind != "LlamaTokenizer" && kind != "LlamaTokenizerFast") return;
  const auto frame = [&](const char* key, bool missing, std::optional<Index> token) {
    std::vector<Index> ids;
    if (json.has(key) ? json.flag(key) : missing) {
      if (!token) throw_error<FileError>(json.path(), ": ", key, " = true without such a token");
      ids.push_back(*token);
    }
    return ids;
  };
  tokenizer.set_frame(frame("add_bos_token", true, tokenizer.bos()),
                      frame("add_eos_token", false, tokenizer.eos()));
}

}  // namespace detail

/// Reads tokenizer.json, or else tokenizer.model by SentencePiece, and tokenizer_config.json where
/// it is there: it names `bos` and `eos`.
/// \param dir         The folder of a model, as Hugging Face's transformers write it.
/// \throws FileError  if there is neither, or a file is broken, contradicts another, or has a
///                    setting that would change the tokens and that weir does not know.
inline std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& dir) {
  constexpr std::size_t kMostBytes = std::size_t{16} << 20U;
  const std::filesystem::path json = dir / "tokenizer.json";
  const std::filesystem::path model = dir / "tokenizer.model";
  const std::filesystem::path config = dir / "tokenizer_config.json";
  std::error_code error;
  std::unique_ptr<Tokenizer> tokenizer;
  if (std::filesystem::exists(json, error)) {
    tokenizer = std::make_unique<BpeTokenizer>(BpeTokenizer::read(json.string()));
  } else if (std::filesystem::exists(model, error)) {
#ifdef WEIR_SENTENCEPIECE
    tokenizer =
        std::make_unique<SentencePieceTokenizer>(SentencePieceTokenizer::read(model.string()));
#else
    throw_error<FileError>(model.string(),
                           ": cannot be read: weir was built without SentencePiece");
#endif
  } else {
    throw_error<FileError>(dir.string(), ": has neither tokenizer.json nor tokenizer.model");
  }
  if (std::filesystem::exists(config, error)) {
    detail::configure(JsonObject::read(config.string(), kMostBytes), *tokenizer);
  }
  return tokenizer;
}

}  // namespace weir::io
