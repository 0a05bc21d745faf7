// SPDX-License-Identifier: MIT
/// \file
/// The steps of a tokenizer.json before and behind its model.
#pragma once

#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/io/bpe_model.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/json_object.hpp>
#include <weir/io/text_pipeline.hpp>
#include <weir/io/token_ranks.hpp>
#include <weir/io/token_table.hpp>

namespace weir::io::detail {

/// The name of what stands for a space in vocabularies of characters.
inline constexpr std::string_view kLowerBlock = "\xE2\x96\x81";

/// The objects in the list `key`.
inline std::vector<ConfigFile> objects_at(ConfigFile& json, const std::string& key) {
  std::vector<ConfigFile> all;
  const nlohmann::json& list = json.at(key);
  if (!list.is_array()) json.bad(key, "a list");
  for (const nlohmann::json& item : list) {
    all.emplace_back(JsonObject(json.path() + ": " + key, item));
  }
  return all;
}

/// A text that is neither empty nor has a NUL.
inline std::string letters_at(ConfigFile& json, const std::string& key) {
  std::string text = json.text(key);
  if (text.empty() || text.find('\0') != std::string::npos) {
    json.bad(key, "at least one character, none of them NUL");
  }
  return text;
}

/// Adds the steps of "normalizer".
inline void read_normaliser(ConfigFile json, TextPipeline& pipeline) {
  const std::string type = json.text("type");
  if (type == "Sequence") {
    for (ConfigFile& step : objects_at(json, "normalizers")) read_normaliser(step, pipeline);
  } else if (type == "NFC") {
    pipeline.normalisers.emplace_back(ComposeCharacters{});
  } else if (type == "Prepend") {
    pipeline.normalisers.emplace_back(Prepend{letters_at(json, "prepend")});
  } else if (type == "Replace") {
    ConfigFile pattern = json.object("pattern");
    pipeline.normalisers.emplace_back(Replace{letters_at(pattern, "String"), json.text("content")});
    pattern.finish();
  } else {
    json.bad("type", "NFC, Prepend, Replace or Sequence");
  }
  json.finish();
}

/// Reads "pre_tokenizer": which words a text has.
class PreTokenizerReader {
 public:
  explicit PreTokenizerReader(TextPipeline& pipeline) : pipeline_(&pipeline) {}

  /// Adds the steps of one object.
  void read(ConfigFile json);

  /// Whether the model's letters are bytes.
  bool is_byte_level() const { return is_byte_level_; }

 private:
  static constexpr std::size_t kMostSplitters = 32;

  void read_split(ConfigFile& json);
  void read_byte_level(ConfigFile& json);
  void read_metaspace(ConfigFile& json);
  void add(const ConfigFile& json, std::string pattern, bool keeps_matches, bool keeps_rest);

  TextPipeline* pipeline_;
  bool is_byte_level_ = false;
};

inline void PreTokenizerReader::read(ConfigFile json) {
  const std::string type = json.text("type");
  if (type != "Sequence" && is_byte_level_) json.bad("type", "ByteLevel to be the last step");
  if (type == "Sequence") {
    for (ConfigFile& step : objects_at(json, "pretokenizers")) read(step);
  } else if (type == "Split") {
    read_split(json);
  } else if (type == "Digits") {
    add(json, json.flag("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)", true, true);
  } else if (type == "ByteLevel") {
    read_byte_level(json);
  } else if (type == "Metaspace") {
    read_metaspace(json);
  } else {
    json.bad("type", "ByteLevel, Digits, Metaspace, Sequence or Split");
  }
  json.finish();
}

inline void PreTokenizerReader::read_split(ConfigFile& json) {
  ConfigFile pattern = json.object("pattern");
  const std::string regex = letters_at(pattern, "Regex");
  pattern.finish();
  const std::string behaviour = json.text("behavior");
  const bool is_inverted = json.flag("invert", false);
  if (behaviour == "Isolated") {
    add(json, regex, true, true);
  } else if (behaviour == "Removed") {
    add(json, regex, is_inverted, !is_inverted);
  } else {
    json.bad("behavior", "Isolated or Removed");
  }
}

inline void PreTokenizerReader::read_byte_level(ConfigFile& json) {
  json.ignore("trim_offsets");  // Where tokens lie in the text is not asked for.
  is_byte_level_ = true;
  if (json.flag("add_prefix_space", true)) {
    if (!pipeline_->splitters.empty() || pipeline_->leading_space != LeadingSpace::kNever) {
      json.bad("type", "add_prefix_space = false where it is not the first step");
    }
    pipeline_->leading_space = LeadingSpace::kAlways;
  }
  if (json.flag("use_regex", true)) add(json, patterns::kGpt2, true, true);
}

inline void PreTokenizerReader::read_metaspace(ConfigFile& json) {
  if (!pipeline_->splitters.empty() || pipeline_->space != " ") {
    json.bad("type", "Metaspace to be the first step");
  }
  pipeline_->space = letters_at(json, "replacement");
  json.expect("split", false);
  if (!json.has("split")) json.bad("type", "'split' to be false");
  const std::string scheme = json.text("prepend_scheme", "always");
  if (scheme == "always") {
    pipeline_->leading_space = LeadingSpace::kAlways;
  } else if (scheme == "first") {
    pipeline_->leading_space = LeadingSpace::kFirst;
  } else if (scheme != "never") {
    json.bad("prepend_scheme", "always, first or never");
  }
}

inline void PreTokenizerReader::add(const ConfigFile& json, std::string pattern, bool keeps_matches,
                                    bool keeps_rest) {
  if (pipeline_->splitters.size() == kMostSplitters) json.bad("type", "at most 32 of them");
  pipeline_->splitters.push_back(
      {Regex(json.path(), std::move(pattern)), keeps_matches, keeps_rest});
}

/// What "post_processor" puts around a text.
struct Frame {
  std::vector<Index> before = {};
  std::vector<Index> after = {};
};

inline void read_template(ConfigFile& json, const TokenTable& table, Frame& frame) {
  if (!frame.before.empty() || !frame.after.empty()) json.bad("type", "only one template");
  json.ignore("pair");
  ConfigFile special = json.object("special_tokens");
  bool is_behind = false;
  for (ConfigFile& item : objects_at(json, "single")) {
    const bool is_text = item.has("Sequence");
    ConfigFile part = item.object(is_text ? "Sequence" : "SpecialToken");
    item.finish();
    part.ignore("type_id");
    const std::string id = part.text("id");
    part.finish();
    if (is_text) {
      if (id != "A" || is_behind) json.bad("single", "the text 'A' once");
      is_behind = true;
      continue;
    }
    ConfigFile token = special.object(id);
    const nlohmann::json& ids = token.at("ids");
    if (!ids.is_array() || ids.empty()) token.bad("ids", "a list of ids");
    for (const nlohmann::json& number : ids) {
      if (!number.is_number_unsigned() || table.find(number.get<Index>()) == nullptr) {
        token.bad("ids", "ids of tokens");
      }
      (is_behind ? frame.after : frame.before).push_back(number.get<Index>());
    }
  }
  if (!is_behind) json.bad("single", "the text 'A' once");
}

/// Reads "post_processor".
inline void read_post_processor(ConfigFile json, const TokenTable& table, Frame& frame) {
  const std::string type = json.text("type");
  if (type == "Sequence") {
    for (ConfigFile& step : objects_at(json, "processors")) {
      read_post_processor(step, table, frame);
    }
  } else if (type == "TemplateProcessing") {
    read_template(json, table, frame);
  } else if (type == "ByteLevel") {
    json.ignore("add_prefix_space", "trim_offsets", "use_regex");  // Not used here.
  } else {
    json.bad("type", "ByteLevel, Sequence or TemplateProcessing");
  }
  json.finish();
}

/// Reads "decoder", which has to undo what `kind` is.
/// \return         Whether a space at the beginning of a text is removed.
inline bool read_decoder(ConfigFile json, BpeKind kind) {
  const std::string type = json.text("type");
  if (kind == BpeKind::kBytes) {
    if (type != "ByteLevel") json.bad("type", "ByteLevel");
    json.ignore("add_prefix_space", "trim_offsets", "use_regex");  // Not used here.
    json.finish();
    return false;
  }
  if (type != "Sequence") json.bad("type", "Sequence");
  const nlohmann::json steps = {
      {{"type", "Replace"}, {"pattern", {{"String", kLowerBlock}}}, {"content", " "}},
      {{"type", "ByteFallback"}},
      {{"type", "Fuse"}},
      {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}};
  const nlohmann::json without_strip = {steps[0], steps[1], steps[2]};
  const bool strips = json.at("decoders") == steps;
  if (!strips && json.at("decoders") != without_strip) {
    json.bad("decoders", steps.dump() + ", the last one or not");
  }
  json.finish();
  return strips;
}

}  // namespace weir::io::detail
