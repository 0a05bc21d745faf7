// SPDX-License-Identifier: MIT
/// \file
/// Reads tokenizer.json, the format of Hugging Face's tokenizers.
#pragma once

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/added_tokens.hpp>
#include <weir/io/bpe_model.hpp>
#include <weir/io/bpe_parts.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/json_object.hpp>
#include <weir/io/text_pipeline.hpp>
#include <weir/io/token_table.hpp>
#include <weir/io/tokenizer_steps.hpp>

namespace weir::io::detail {

/// A tokenizer.json whose parts are taken one by one.
class TokenizerJson {
 public:
  /// \throws FileError  unless it is the JSON of an object.
  TokenizerJson(const std::string& path, std::string_view text)
      : path_(path), root_(JsonObject(path, parse_json(path, text, kMostBytes))) {}

  /// \throws FileError  as `BpeTokenizer::read`.
  BpeParts parts();

 private:
  using Json = nlohmann::json;

  static constexpr std::size_t kMostBytes = std::size_t{256} << 20U;

  /// An object of the file.
  ConfigFile object(const std::string& name, Json json) const {
    return ConfigFile(JsonObject(path_ + ": " + name, std::move(json)));
  }

  /// Refuses what would make memory grow with an id rather than with the file.
  void expect_dense(const std::string& name, const Json& id, std::size_t tokens) const;

  bool read_model_settings(bool is_byte_level) const;
  TokenTable read_vocabulary(BpeKind kind) const;
  void read_merges(BpeModel& model) const;
  void read_added_tokens(BpeParts& parts, BpeKind kind);

  const Json& list_at(const char* key) const {
    const Json& list = model().at(key);
    if (!list.is_array()) throw_error<FileError>(path_, ": model: '", key, "' is not a list");
    return list;
  }

  const Json& model() const { return *model_; }

  std::string path_;
  ConfigFile root_;
  const Json* model_ = nullptr;  // In `root_`.
};

inline BpeParts TokenizerJson::parts() {
  root_.ignore("version");
  for (const char* key : {"truncation", "padding"}) {
    if (root_.has(key)) root_.bad(key, "null");
  }
  TextPipeline pipeline;
  if (root_.has("normalizer")) read_normaliser(root_.object("normalizer"), pipeline);
  PreTokenizerReader reader(pipeline);
  if (root_.has("pre_tokenizer")) reader.read(root_.object("pre_tokenizer"));
  const BpeKind kind = reader.is_byte_level() ? BpeKind::kBytes : BpeKind::kCharacters;
  model_ = &root_.at("model");
  const bool whole_words = read_model_settings(reader.is_byte_level());

  TokenTable vocabulary = read_vocabulary(kind);
  BpeModel model(path_, vocabulary, kind, whole_words);
  read_merges(model);
  BpeParts parts{
      .table = std::move(vocabulary), .model = std::move(model), .pipeline = std::move(pipeline)};
  read_added_tokens(parts, kind);
  if (root_.has("post_processor")) {
    Frame frame;
    read_post_processor(root_.object("post_processor"), parts.table, frame);
    parts.before = std::move(frame.before);
    parts.after = std::move(frame.after);
  }
  parts.strips_space = read_decoder(root_.object("decoder"), kind);
  root_.finish();
  return parts;
}

/// \return         Whether words that are tokens are not divided.
inline bool TokenizerJson::read_model_settings(bool is_byte_level) const {
  Json settings = Json::object();  // Without copies of the vocabulary and the merges.
  if (!model().is_object()) throw_error<FileError>(path_, ": 'model' is not an object");
  for (const auto& [key, value] : model().items()) {
    if (key != "vocab" && key != "merges") settings[key] = value;
  }
  ConfigFile json = object("model", std::move(settings));
  json.expect("type", "BPE");
  json.expect("dropout", 0);
  json.expect("continuing_subword_prefix", "");
  json.expect("end_of_word_suffix", "");
  json.ignore("unk_token", "fuse_unk");  // Each character or each of its bytes has a token.
  if (!json.flag("byte_fallback", false) && !is_byte_level) {
    throw_error<FileError>(
        json.path(), ": has neither ByteLevel nor byte_fallback = true, expected one of them");
  }
  const bool whole_words = json.flag("ignore_merges", false);
  json.finish();
  for (const char* key : {"vocab", "merges"}) {
    if (!model().contains(key)) throw_error<FileError>(json.path(), ": has no '", key, "'");
  }
  return whole_words;
}

inline void TokenizerJson::expect_dense(const std::string& name, const Json& id,
                                        std::size_t tokens) const {
  if (name.empty() || name.find('\0') != std::string::npos) {
    throw_error<FileError>(path_, ": the token with the id ", id.dump(),
                           " is empty or has a NUL in it");
  }
  const std::size_t bound = 2 * tokens + 1024;
  if (!id.is_number_unsigned() || id.get<std::size_t>() >= bound) {
    throw_error<FileError>(path_, ": token '", name, "' has the id ", id.dump().substr(0, 100),
                           ", expected 0 <= id < ", bound, " with ", tokens, " tokens");
  }
}

inline TokenTable TokenizerJson::read_vocabulary(BpeKind kind) const {
  const Json& vocabulary = model().at("vocab");
  if (!vocabulary.is_object()) throw_error<FileError>(path_, ": model: 'vocab' is not an object");
  TokenTable table;
  for (const auto& [name, id] : vocabulary.items()) {
    expect_dense(name, id, vocabulary.size());
    if (!table.add(id.get<Index>(), BpeModel::token_of(name, kind))) {
      throw_error<FileError>(path_, ": token '", name, "' has the id ", id.get<Index>(),
                             " of another token");
    }
  }
  return table;
}

inline void TokenizerJson::read_merges(BpeModel& model) const {
  Index rank = 0;
  for (const Json& merge : list_at("merges")) {
    const auto bad = [&] {
      throw_error<FileError>(path_, ": merge ", rank, " is not a pair of tokens");
    };
    if (merge.is_array()) {
      if (merge.size() != 2 || !merge[0].is_string() || !merge[1].is_string()) bad();
      model.add_merge(merge[0].get_ref<const std::string&>(),
                      merge[1].get_ref<const std::string&>(), rank);
    } else {
      if (!merge.is_string()) bad();
      const auto& pair = merge.get_ref<const std::string&>();
      const std::size_t space = pair.find(' ');
      if (space == std::string::npos || pair.find(' ', space + 1) != std::string::npos) bad();
      model.add_merge(pair.substr(0, space), pair.substr(space + 1), rank);
    }
    ++rank;
  }
}

inline void TokenizerJson::read_added_tokens(BpeParts& parts, BpeKind kind) {
  if (!root_.has("added_tokens")) return;
  std::vector<AddedToken> as_it_is;
  std::vector<AddedToken> normalised;
  const Json& list = root_.at("added_tokens");
  const std::size_t count = list.size() + model().at("vocab").size();
  for (ConfigFile& json : objects_at(root_, "added_tokens")) {
    json.expect("single_word", false);
    AddedToken token{.text = json.text("content"),
                     .is_special = json.flag("special", false),
                     .strips_left = json.flag("lstrip", false),
                     .strips_right = json.flag("rstrip", false)};
    expect_dense(token.text, json.at("id"), count);
    token.id = json.count("id");
    const bool is_normalised = json.flag("normalized", !token.is_special);
    json.finish();
    const Token* const other = parts.table.find(token.id);
    if (other == nullptr || other->name != token.text) {
      Token entry = BpeModel::token_of(token.text, kind);
      entry.is_special = token.is_special;
      if (!parts.table.add(token.id, std::move(entry))) {
        throw_error<FileError>(path_, ": added token '", token.text, "' with the id ", token.id,
                               " has the id or the name of another token");
      }
    } else if (token.is_special) {
      parts.table.mark_special(token.id);
    }
    if (is_normalised) {
      token.text = parts.pipeline.normalised(token.text);
      normalised.push_back(std::move(token));
    } else {
      as_it_is.push_back(std::move(token));
    }
  }
  parts.added = AddedTokens(std::move(as_it_is));
  parts.added_to_normalised = AddedTokens(std::move(normalised));
}

}  // namespace weir::io::detail
