// SPDX-License-Identifier: MIT
/// \file
/// Loads and saves models as GGUF files, which llama.cpp reads and writes.
#pragma once

#include <concepts>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families.hpp>
#include <weir/io/gguf_model_writer.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/io/gguf_source.hpp>
#include <weir/io/model_config.hpp>
#include <weir/io/read_model.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/io/weights.hpp>
#include <weir/model/decoder.hpp>

namespace weir::io {

namespace detail {

template <class T, class Config>
Pretrained<T> load_gguf_as(const std::shared_ptr<const GgufTensorSource>& source,
                           const LoadConfig& how, const PrepareModel<T>& prepare) {
  const Gguf& file = source->file();
  const Config config = for_texts(read_gguf_config<Config>(file), how.longest_text);
  using Own = GgufFamily<Config>;
  std::vector<std::string_view> ignored;
  if constexpr (requires { Own::ignored(file); }) ignored = Own::ignored(file);
  expect_room(file.path(), config.shape, *source);
  Pretrained<T> loaded = make_unset<T>(config);
  read_model<T>(source, Own::names(config, &file), head_sizes(config.shape), config.shape.k,
                ignored, how, prepare, loaded);
  return loaded;
}

template <class T, class... Configs>
Pretrained<T> load_gguf_of(const std::string& path, const LoadConfig& how,
                           const PrepareModel<T>& prepare, std::variant<Configs...>* /*families*/) {
  const auto source = std::make_shared<const GgufTensorSource>(path);
  const Gguf& file = source->file();
  const std::string_view architecture = file.text("general.architecture");
  std::optional<Pretrained<T>> loaded;
  const auto load = [&]<class Config>(Config* /*family*/) {
    if (!GgufFamily<Config>::reads(file)) return false;
    loaded.emplace(load_gguf_as<T, Config>(source, how, prepare));
    return true;
  };
  if (!(load(static_cast<Configs*>(nullptr)) || ...)) {
    throw_error<FileError>(path, ": key 'general.architecture' is '", architecture, "', expected ",
                           sizeof...(Configs) > 1 ? "one that weir knows, see io/gguf_families.hpp"
                                                  : "that of the family that was asked for");
  }
  return std::move(*loaded);
}

}  // namespace detail

/// Loads a model from a GGUF file of any of GgufConfig's families.
///
///     auto loaded = io::load_gguf("model.gguf", {.storage = ...});
///
/// Weights may be of any kind that Gguf reads, four-bit blocks as well; they are converted layer by
/// layer into the storage asked for, as in `load_pretrained`. The model computes what llama.cpp
/// computes with the file, in the numbers of T: llama.cpp itself also rounds activations to 8 or 16
/// bits where it multiplies them with weights that are stored like that. Where llama.cpp's idea of
/// an architecture differs from the published one, the config says what llama.cpp does, except that
/// a Phi-3.5-MoE is the published one; the files in io/gguf_families/ tell where that is.
/// \tparam T         float or double.
/// \param prepare    May take away what is not to be read, see PrepareModel.
/// \throws FileError    if the file is missing, broken or a part of a model, the architecture or a
///                      setting is not known, or a tensor is missing, unknown or of another shape.
/// \throws ConfigError  if a size is out of range.
template <std::floating_point T = float>
Pretrained<T> load_gguf(const std::filesystem::path& path, const LoadConfig& config = {},
                        const PrepareModel<std::type_identity_t<T>>& prepare = {}) {
  return detail::load_gguf_of<T>(path.string(), config, prepare, static_cast<GgufConfig*>(nullptr));
}

/// The same where the family is known: the program does not contain the code of all the others.
template <class Config, std::floating_point T = float>
Pretrained<T> load_gguf_family(const std::filesystem::path& path, const LoadConfig& config = {},
                               const PrepareModel<std::type_identity_t<T>>& prepare = {}) {
  return detail::load_gguf_of<T>(path.string(), config, prepare,
                                 static_cast<std::variant<Config>*>(nullptr));
}

/// Saves a model as a GGUF file, which llama.cpp and `load_gguf` read. The file appears once it is
/// whole; memory holds the model and one tensor.
/// \param model_config  What the model was made from.
/// \throws StateError   if weights are stored for inference.
/// \throws ConfigError  if such files cannot say what `model_config` does or llama.cpp computes it
///                      otherwise, the model is not what it says, the tokens of `config` are not as
///                      many as its vocabulary, or a setting of `config` is out of range.
/// \throws FileError    if the file cannot be written.
template <std::floating_point T, class Config>
void save_gguf(const std::filesystem::path& path, Decoder<T>& model, const Config& model_config,
               const SaveGgufConfig& config = {}) {
  const GgufMetadata metadata = gguf_metadata(model_config, config);
  const auto tensors = tensors_of("save_gguf", model);
  const auto layout = published_layout(GgufFamily<Config>::names(model_config, nullptr),
                                       shapes_of(tensors), detail::head_sizes(model_config.shape));
  expect_no_loss("save_gguf", tensors, layout);
  write_gguf_model<T>(path, metadata, layout, rope_divisors_of(model_config.shape), config.dtype,
                      [&](const PublishedTensor& tensor, std::vector<T>& numbers) {
                        gather_tensor(tensors, tensor, numbers);
                      });
}

/// The same for a config of any family; ConfigError if GGUF files have no such architecture.
template <std::floating_point T>
void save_gguf(const std::filesystem::path& path, Decoder<T>& model,
               const ModelConfig& model_config, const SaveGgufConfig& config = {}) {
  std::visit(
      [&]<class Config>(const Config& own) {
        if constexpr (requires { GgufFamily<Config>::kMayBeTied; }) {
          save_gguf(path, model, own, config);
        } else {
          throw_error<ConfigError>("save_gguf: weir knows no architecture of GGUF for ",
                                   Family<Config>::kModelTypes[0]);
        }
      },
      model_config);
}

}  // namespace weir::io
