// SPDX-License-Identifier: MIT
/// \file
/// Models from disk: one that train_lm saved, one in a folder as Hugging Face has them, or a GGUF
/// file as llama.cpp has them.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/io/checkpoint_folder.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_model.hpp>
#include <weir/io/json_object.hpp>
#include <weir/io/pretrained.hpp>
#include <weir/io/weights.hpp>
#if defined(WEIR_TEXT)
#include <weir/io/load_tokenizer.hpp>
#endif
#include <weir/model/decoder.hpp>

#include "byte_decoder.hpp"
#include "command_line.hpp"
#include "escaped.hpp"
#include "rank_job.hpp"
#include "text.hpp"

#ifdef WEIR_MPI
#include <weir/parallel/mpi/spread_experts.hpp>
#endif

#if defined(WEIR_TEXT)
/// For models with a tokenizer.
class Tokens final : public Text {
 public:
  explicit Tokens(std::shared_ptr<const weir::io::Tokenizer> tokenizer)
      : tokenizer_(std::move(tokenizer)), stream_(*tokenizer_) {}

  std::vector<weir::Index> encode(const std::string& text, bool first) const override {
    return tokenizer_->encode(text, {.add_special = first});
  }
  std::string add(weir::Index id) override { return escaped_part(stream_.add(id)); }
  std::string flush() override { return escaped_part(stream_.flush()) + escaper_.flush(); }

 private:
  std::string escaped_part(const std::string& text) {
    std::string shown;
    for (const char byte : text) shown += escaper_.add(static_cast<unsigned char>(byte));
    return shown;
  }

  std::shared_ptr<const weir::io::Tokenizer> tokenizer_;
  weir::io::TextStream stream_;
  Escaper escaper_;
};
#endif

/// A model, and how to talk with it.
struct LoadedModel {
  weir::Decoder<float> model;
  MakeText make_text;
  std::vector<weir::Index> ends = {};  ///< Tokens that end a text.
  std::shared_ptr<weir::io::ExpertStore<float>> experts = {};
};

/// What can be said about how to load one.
struct ModelOptions {
  std::string storage = "packed";
  double expert_memory = 0.0;  ///< Megabytes for experts; 0: all in memory.
  weir::Index longest_text = 0;
  bool numbers = false;  ///< Whether texts are lists of token ids.
};

/// The options that say how to load a model.
inline void add_model_options(CommandLine& line, ModelOptions& how) {
  line.add("--storage", how.storage, "How weights are kept; bf16 is half as large")
      ->check(CLI::IsMember(
          std::vector<std::string>(weir::kStorageNames.begin(), weir::kStorageNames.end())));
  line.add("--expert-memory", how.expert_memory,
           "Megabytes for experts, the others stay in the files (0: all in memory)")
      ->check(limits::at_least(0));
  line.add("--longest-text", how.longest_text,
           "Tokens of a text at most, where positions depend on it (0: as the model says)")
      ->check(limits::at_least(0));
}

namespace load_model {

/// A checkpoint that train_lm has saved, alone or on several ranks. Of the experts, each rank reads
/// its own.
inline LoadedModel trained(const std::filesystem::path& checkpoint, weir::Storage storage) {
  weir::Rng rng = weir::Rng::unset();
  weir::Decoder<float> model = make_byte_decoder(config_of(weir::io::read_notes(checkpoint)), rng);
  weir::io::load_weights(weir::io::CheckpointFolder(checkpoint), model);
  weir::set_storage(model, storage);
  return {std::move(model), [] { return std::make_unique<Bytes>(); }};
}

/// The tokens that end a text, as the configuration of the model names them.
inline std::vector<weir::Index> ends_of(const std::filesystem::path& folder) {
  for (const char* const name : {"generation_config.json", "config.json"}) {
    if (!std::filesystem::exists(folder / name)) continue;
    const auto json = weir::io::JsonObject::read((folder / name).string(), std::size_t{16} << 20U);
    if (!json.has("eos_token_id")) continue;
    const auto& value = json.at("eos_token_id");
    return value.is_array() ? value.get<std::vector<weir::Index>>()
                            : std::vector<weir::Index>{json.count("eos_token_id")};
  }
  return {};
}

/// The tokens that end a text, as a GGUF file names them.
inline std::vector<weir::Index> ends_in(const weir::io::Gguf& file) {
  std::vector<weir::Index> ends;
  for (const char* const key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    if (file.has(key)) ends.push_back(static_cast<weir::Index>(file.integer(key)));
  }
  return ends;
}

/// A model of others: a folder, or a GGUF file. On several ranks, each reads its own experts, where
/// they are a GluBank, as those of most families. The tokenizer is that of the folder. The one
/// within a GGUF file is not used, since such files name the rules by which they divide text into
/// words without saying them.
inline LoadedModel published(const std::filesystem::path& path, const ModelOptions& options,
                             weir::Storage storage) {
  constexpr double kMega = 1e6;
  const bool is_gguf = path.extension() == ".gguf";
  const weir::io::LoadConfig how = {
      .storage = storage,
      .expert_bytes = static_cast<std::size_t>(kMega * options.expert_memory),
      .longest_text = options.longest_text};
  weir::io::PrepareModel<float> prepare;
#ifdef WEIR_MPI
  if (rank_job().size() > 1) {
    prepare = [](weir::Decoder<float>& model) { weir::spread_experts(model, rank_job().channels); };
  }
#endif
  auto loaded = is_gguf ? weir::io::load_gguf<float>(path, how, prepare)
                        : weir::io::load_pretrained<float>(path, how, prepare);
  LoadedModel model{std::move(loaded.model), [] { return std::make_unique<Numbers>(); },
                    is_gguf ? ends_in(weir::io::Gguf::read(path.string())) : ends_of(path),
                    loaded.experts};
  const std::filesystem::path folder = is_gguf ? path.parent_path() : path;
  const bool has_tokenizer = std::filesystem::exists(folder / "tokenizer.json") ||
                             std::filesystem::exists(folder / "tokenizer.model");
  if (options.numbers || !has_tokenizer) return model;
#if defined(WEIR_TEXT)
  const std::shared_ptr<const weir::io::Tokenizer> tokenizer = weir::io::load_tokenizer(folder);
  if (model.ends.empty() && tokenizer->eos()) model.ends = {*tokenizer->eos()};
  model.make_text = [tokenizer] { return std::make_unique<Tokens>(tokenizer); };
#endif
  return model;
}

}  // namespace load_model

/// \throws std::runtime_error, FileError, CheckpointError  if there is no model, or it cannot be
/// read.
inline LoadedModel load_any_model(const std::filesystem::path& path, const ModelOptions& options) {
  if (rank_job().size() > 1 && options.expert_memory > 0.0) {
    throw std::runtime_error(
        "--expert-memory: expected 0 on several ranks, each of which has "
        "experts of its own in memory");
  }
  const weir::Storage storage = weir::storage_named(options.storage).value();
  if (path.extension() == ".gguf" || std::filesystem::exists(path / "config.json")) {
    return load_model::published(path, options, storage);
  }
  if (std::filesystem::exists(path / "state.json")) {
    return load_model::trained(path, storage);
  }
  const auto checkpoint = weir::io::latest_checkpoint(path.string());
  if (!checkpoint) {
    throw std::runtime_error(path.string() + ": there is neither config.json nor a checkpoint");
  }
  return load_model::trained(*checkpoint, storage);
}
