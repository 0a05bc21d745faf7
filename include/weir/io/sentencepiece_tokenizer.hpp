// SPDX-License-Identifier: MIT
/// \file
/// SentencePiece's tokenizer.model, read by its own library.
#pragma once

#include <memory>
#include <sentencepiece_processor.h>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/added_tokens.hpp>
#include <weir/io/bpe_model.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/token_table.hpp>
#include <weir/io/tokenizer.hpp>

namespace weir::io {

/// A tokenizer of the SentencePiece library, as Llama 2, Mixtral, Grok-1 and ERNIE have it. (Kudo
/// and Richardson 2018, arXiv:1808.06226.)
///
/// `bos` and `eos` are those of the model. A text begins with `bos`, as the models named expect it;
/// `set_frame` changes that.
class SentencePieceTokenizer : public Tokenizer {
 public:
  /// \throws FileError  if SentencePiece does not read the file.
  static SentencePieceTokenizer read(const std::string& path) {
    auto model = std::make_shared<sentencepiece::SentencePieceProcessor>();
    const auto status = model->Load(path);
    if (!status.ok()) throw_error<FileError>(path, ": ", status.error_message());
    return SentencePieceTokenizer(path, std::move(model));
  }

 private:
  using Model = sentencepiece::SentencePieceProcessor;

  static constexpr std::string_view kSpace = "\xE2\x96\x81";

  SentencePieceTokenizer(const std::string& path, std::shared_ptr<const Model> model);

  static TokenTable table_of(const std::string& path, const Model& model);
  static Strip strip_of(const Model& model);
  void append_ids(std::string_view text, const EncodeConfig& config,
                  std::vector<Index>& ids) const override;

  std::shared_ptr<const Model> model_;
  AddedTokens special_;
};

inline SentencePieceTokenizer::SentencePieceTokenizer(const std::string& path,
                                                      std::shared_ptr<const Model> model)
    : Tokenizer(table_of(path, *model), strip_of(*model)), model_(std::move(model)) {
  std::vector<AddedToken> special;
  for (Index id = 0; id < vocab_size(); ++id) {
    if (find(id)->is_special) {
      special.push_back({.id = id, .text = token_of(id), .is_special = true});
    }
  }
  special_ = AddedTokens(std::move(special));
  if (model_->eos_id() >= 0) set_eos(model_->eos_id());
  if (model_->bos_id() >= 0) {
    set_bos(model_->bos_id());
    set_frame({model_->bos_id()}, {});
  }
}

inline TokenTable SentencePieceTokenizer::table_of(const std::string& path, const Model& model) {
  TokenTable table;
  for (int id = 0; id < model.GetPieceSize(); ++id) {
    const std::string& name = model.IdToPiece(id);
    Token token = BpeModel::token_of(name, BpeKind::kCharacters);
    token.is_special = model.IsControl(id);
    token.begins_word = name.starts_with(kSpace);
    if (model.IsUnknown(id)) token.bytes = model.DecodeIds({id});
    if (name.empty() || !table.add(id, std::move(token))) {
      throw_error<FileError>(path, ": the piece ", id, " is empty or there twice");
    }
  }
  return table;
}

/// Asks the library what it does with spaces, since it does not tell the model's settings.
inline Tokenizer::Strip SentencePieceTokenizer::strip_of(const Model& model) {
  for (int id = 0; id < model.GetPieceSize(); ++id) {
    const bool is_text = !model.IsUnknown(id) && !model.IsControl(id);
    const std::string& name = model.IdToPiece(id);
    const bool begins_word = name.starts_with(kSpace);
    if (!is_text || !begins_word || name.find(kSpace, kSpace.size()) == kSpace.size()) continue;
    if (model.DecodeIds({id}).starts_with(' ')) return Strip::kNone;
    const int space = model.PieceToId(kSpace);
    const bool has_space = !model.IsUnknown(space);
    return has_space && model.DecodeIds({space, space}).empty() ? Strip::kOneOfEachToken
                                                                : Strip::kOne;
  }
  return Strip::kNone;
}

inline void SentencePieceTokenizer::append_ids(std::string_view text, const EncodeConfig& config,
                                               std::vector<Index>& ids) const {
  for (const auto& piece : special_.split(text, config.read_special)) {
    if (piece.token != nullptr) {
      ids.push_back(piece.token->id);
      continue;
    }
    const std::vector<int> found = model_->EncodeAsIds(piece.text);
    ids.insert(ids.end(), found.begin(), found.end());
  }
}

}  // namespace weir::io
