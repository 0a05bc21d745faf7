// SPDX-License-Identifier: MIT
/// \file
/// config.json of a published model.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/json_object.hpp>

namespace weir::io {

/// Settings of Hugging Face's configurations that change nothing of what a decoder computes: how
/// it was made and stored, how it is trained, how text is generated with it.
inline constexpr auto kSettingsWithoutEffect =
    std::to_array<std::string_view>({"_attn_implementation",
                                     "_attn_implementation_autoset",
                                     "_commit_hash",
                                     "_name_or_path",
                                     "add_cross_attention",
                                     "architectures",
                                     "attention_dropout",
                                     "attn_pdrop",
                                     "auto_map",
                                     "bad_words_ids",
                                     "begin_suppress_tokens",
                                     "bos_token_id",
                                     "chunk_size_feed_forward",
                                     "cross_attention_hidden_size",
                                     "decoder_start_token_id",
                                     "diversity_penalty",
                                     "do_sample",
                                     "dtype",
                                     "early_stopping",
                                     "emb_pdrop",
                                     "embd_pdrop",
                                     "encoder_no_repeat_ngram_size",
                                     "eos_token_id",
                                     "ep_size",
                                     "exponential_decay_length_penalty",
                                     "finetuning_task",
                                     "forced_bos_token_id",
                                     "forced_eos_token_id",
                                     "gradient_checkpointing",
                                     "hidden_dropout",
                                     "id2label",
                                     "initializer_range",
                                     "is_decoder",
                                     "is_encoder_decoder",
                                     "label2id",
                                     "length_penalty",
                                     "max_length",
                                     "max_position_embeddings",
                                     "min_length",
                                     "model_type",
                                     "num_beams",
                                     "output_attentions",
                                     "output_hidden_states",
                                     "output_router_logits",
                                     "pad_token_id",
                                     "prefix",
                                     "problem_type",
                                     "quantization_config",
                                     "resid_pdrop",
                                     "return_dict",
                                     "return_dict_in_generate",
                                     "task_specific_params",
                                     "temperature",
                                     "tokenizer_class",
                                     "torch_dtype",
                                     "torchscript",
                                     "transformers_version",
                                     "use_bfloat16",
                                     "use_cache",
                                     "initial_context_length"});

/// A configuration that is read setting by setting. What nobody has asked for must not matter:
/// `finish` refuses the rest by name.
class ConfigFile {
 public:
  explicit ConfigFile(JsonObject json) : json_(std::move(json)) {}

  /// \throws FileError  if there is no such file, or it does not hold a JSON object.
  static ConfigFile read(const std::string& path) {
    constexpr std::size_t kMostBytes = std::size_t{16} << 20U;
    return ConfigFile(JsonObject::read(path, kMostBytes));
  }

  /// The settings with these names. Each is used; without a `missing` it has to be there.
  /// \throws FileError  if it is missing or of another kind.
  Index count(const std::string& key) { return use(key).count(key); }
  Index count(const std::string& key, Index missing) {
    return use(key).has(key) ? json_.count(key) : missing;
  }
  double number(const std::string& key) { return use(key).number(key); }
  double number(const std::string& key, double missing) {
    return use(key).has(key) ? json_.number(key) : missing;
  }
  bool flag(const std::string& key, bool missing) {
    return use(key).has(key) ? json_.flag(key) : missing;
  }
  std::string text(const std::string& key) { return use(key).text(key); }
  std::string text(const std::string& key, const std::string& missing) {
    return use(key).has(key) ? json_.text(key) : missing;
  }

  /// Whether it is there and not null.
  bool has(const std::string& key) { return use(key).has(key); }

  /// Whether it is there, even as null.
  bool mentions(const std::string& key) { return use(key).json().contains(key); }

  /// The setting as it stands.
  const nlohmann::json& at(const std::string& key) { return use(key).at(key); }

  /// An object in it, whose settings are used one by one as well.
  ConfigFile object(const std::string& key) { return ConfigFile(use(key).object(key)); }

  /// Settings that do not matter here.
  template <class... Keys>
  void ignore(const Keys&... keys) {
    (used_.insert(keys), ...);
  }

  /// The only value with which weir computes what the model does.
  /// \throws FileError  if the setting is there with another one.
  void expect(const std::string& key, const nlohmann::json& value) {
    if (use(key).has(key) && json_.at(key) != value) json_.bad(key, value.dump());
  }

  /// \throws FileError  that says what the setting had to be.
  [[noreturn]] void bad(const std::string& key, std::string_view expected) const {
    json_.bad(key, expected);
  }

  /// \throws FileError  if a setting is neither used nor without effect.
  void finish() const {
    for (const auto& [key, value] : json_.json().items()) {
      if (used_.contains(key) || value.is_null()) continue;
      if (std::find(kSettingsWithoutEffect.begin(), kSettingsWithoutEffect.end(), key) !=
          kSettingsWithoutEffect.end()) {
        continue;
      }
      json_.bad(key, "it not to be there: weir does not know what it changes");
    }
  }

  const std::string& path() const { return json_.path(); }

 private:
  const JsonObject& use(const std::string& key) {
    used_.insert(key);
    return json_;
  }

  JsonObject json_;
  std::set<std::string> used_;
};

}  // namespace weir::io
