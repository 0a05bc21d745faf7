// SPDX-License-Identifier: MIT
/// \file
/// Loads and saves models as Hugging Face publishes them.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/random.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/checkpoint_folder.hpp>
#include <weir/io/config_file.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/model_config.hpp>
#include <weir/io/published_tensors.hpp>
#include <weir/io/read_model.hpp>
#include <weir/io/safetensors_writer.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/io/weights.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/multi_token.hpp>

namespace weir::io {

/// Settings of `save_pretrained`.
struct SavePretrainedConfig {
  Dtype dtype = Dtype::kF32;                 ///< How numbers are stored.
  std::int64_t shard_bytes = 5'000'000'000;  ///< A larger model is divided into files of this size.
  std::map<std::string, std::string> metadata = {};  ///< Texts for the headers of the files.
};

namespace detail {

/// Tensors that a model does not need: tables of rotation that are computed, and what modules of
/// prediction share with the model.
inline constexpr auto kNeedless =
    std::to_array<std::string_view>({"*.rotary_emb.inv_freq", "model.layers.*.embed_tokens.weight",
                                     "model.layers.*.shared_head.head.weight"});

/// The name of a kind of numbers in config.json.
inline std::string_view torch_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kF64:
      return "float64";
    case Dtype::kF16:
      return "float16";
    case Dtype::kBF16:
      return "bfloat16";
    default:
      return "float32";
  }
}

template <class T, class Config>
Pretrained<T> load_as(const std::filesystem::path& dir, const Config& read, const LoadConfig& how,
                      const PrepareModel<T>& prepare) {
  using Own = Family<Config>;
  const Config config = for_texts(read, how.longest_text);
  const auto source = std::make_shared<const CheckpointFolder>(dir);
  std::vector<std::string_view> ignored(kNeedless.begin(), kNeedless.end());
  if (config.shape.tied) ignored.emplace_back("lm_head.weight");  // The embedding once more.
  if constexpr (requires { Own::kIgnored; }) {
    ignored.insert(ignored.end(), Own::kIgnored.begin(), Own::kIgnored.end());
  }
  expect_room((dir / "config.json").string(), config.shape, *source);
  Pretrained<T> loaded = make_unset<T>(config);
  read_model<T>(source, Own::names(config, source.get()), head_sizes(config.shape), config.shape.k,
                ignored, how, prepare, loaded);
  loaded.metadata = source->metadata();
  return loaded;
}

/// The settings in config.json.
/// \throws ConfigError  if it would be read as another model.
template <class Config>
nlohmann::json config_json(const Config& config, Dtype dtype) {
  using Own = Family<Config>;
  nlohmann::json json = {{"model_type", Own::kModelTypes[0]},
                         {"architectures", {Own::kArchitecture}},
                         {"torch_dtype", torch_name(dtype)}};
  Own::write(config, json);
  ConfigFile written(
      JsonObject("save_pretrained: config.json", nlohmann::json::parse(json.dump())));
  written.ignore("model_type");
  if (presets::settled(Own::read(written).shape) != presets::settled(config.shape)) {
    throw_error<ConfigError>("save_pretrained: the model has sizes or options that config.json of ",
                             Own::kModelTypes[0], " cannot hold");
  }
  written.finish();
  return json;
}

/// Divides tensors into files of at most `most` bytes; a larger tensor has a file of its own.
/// \return         The number of the first tensor of each file, and behind them how many there are.
inline std::vector<std::size_t> divide(const std::vector<PublishedTensor>& layout, Dtype dtype,
                                       std::int64_t most) {
  std::vector<std::size_t> first = {0};
  std::int64_t bytes = 0;
  for (std::size_t t = 0; t < layout.size(); ++t) {
    auto own = static_cast<std::int64_t>(width_of(dtype));
    for (const Index length : layout[t].shape) own *= length;
    if (t > first.back() && bytes + own > most) {
      first.push_back(t);
      bytes = 0;
    }
    bytes += own;
  }
  first.push_back(layout.size());
  return first;
}

/// "model.safetensors", or "model-00002-of-00003.safetensors" with i = 1.
inline std::string shard_name(std::size_t i, std::size_t count) {
  if (count == 1) return "model.safetensors";
  const auto digits = [](std::size_t number) {
    const std::string text = std::to_string(number);
    return std::string(text.size() < 5 ? 5 - text.size() : 0, '0') + text;
  };
  return "model-" + digits(i + 1) + "-of-" + digits(count) + ".safetensors";
}

/// Writes the tensors of `layout` to one file or several; `numbers_of(tensor, numbers)` gives the
/// numbers of one.
template <class T>
void write_model(const std::filesystem::path& dir, const std::vector<PublishedTensor>& layout,
                 const SavePretrainedConfig& config,
                 FunctionRef<void(const PublishedTensor&, std::vector<T>&)> numbers_of) {
  const std::vector<std::size_t> first = divide(layout, config.dtype, config.shard_bytes);
  const std::size_t files = first.size() - 1;
  std::map<std::string, std::string> metadata = config.metadata;
  metadata.emplace("format", "pt");  // Without which Hugging Face's code does not read them.
  nlohmann::json places = nlohmann::json::object();
  std::int64_t total = 0;
  std::vector<T> numbers;
  for (std::size_t f = 0; f < files; ++f) {
    const std::string name = shard_name(f, files);
    std::vector<TensorShape> shapes;
    for (std::size_t t = first[f]; t < first[f + 1]; ++t) {
      shapes.push_back({layout[t].name, layout[t].shape});
      places[layout[t].name] = name;
    }
    SafetensorsWriter writer(dir / name, shapes, config.dtype, metadata);
    for (std::size_t t = first[f]; t < first[f + 1]; ++t) {
      numbers_of(layout[t], numbers);
      writer.append(numbers.data(), static_cast<Index>(numbers.size()));
      total += static_cast<std::int64_t>(numbers.size() * width_of(config.dtype));
    }
    writer.commit();
  }
  const std::filesystem::path index = dir / "model.safetensors.index.json";
  std::error_code ignored;
  if (files == 1) {
    std::filesystem::remove(index, ignored);  // Of a larger model that was here before.
    return;
  }
  const nlohmann::json json = {{"metadata", {{"total_size", total}}}, {"weight_map", places}};
  write_file(index, json.dump(2) + "\n");
  std::filesystem::remove(dir / shard_name(0, 1), ignored);
}

}  // namespace detail

/// Loads a model from a folder as Hugging Face publishes them: config.json, and the weights in
/// model.safetensors or in the files of model.safetensors.index.json. ModelConfig lists the
/// families.
///
///     auto loaded = io::load_pretrained("OLMoE-1B-7B", {.storage = Storage::kBfloat16});
///
/// Weights are converted from whatever kind of numbers the files hold. They go layer by layer into
/// the storage asked for, so that memory never holds more than that and one layer.
/// \tparam T         float or double.
/// \param prepare    May take away what is not to be read, see PrepareModel.
/// \throws FileError    if a file is missing or broken, the family or a setting is not known, or a
///                      tensor is missing, unknown or of another shape.
/// \throws ConfigError  if a size is out of range.
template <std::floating_point T = float>
Pretrained<T> load_pretrained(const std::filesystem::path& dir, const LoadConfig& config = {},
                              const PrepareModel<std::type_identity_t<T>>& prepare = {}) {
  const ModelConfig model_config = parse_config(ConfigFile::read((dir / "config.json").string()));
  return std::visit([&](const auto& own) { return detail::load_as<T>(dir, own, config, prepare); },
                    model_config);
}

/// The same where the family is known, as in `load_family<presets::OlmoeConfig>(dir)`: the program
/// does not contain the code of all the others.
template <class Config, std::floating_point T = float>
Pretrained<T> load_family(const std::filesystem::path& dir, const LoadConfig& config = {},
                          const PrepareModel<std::type_identity_t<T>>& prepare = {}) {
  const auto own = parse_config_of<Config>(ConfigFile::read((dir / "config.json").string()));
  return detail::load_as<T>(dir, std::get<0>(own), config, prepare);
}

/// Saves a model as `load_pretrained` and Hugging Face's code read it: config.json and
/// model.safetensors, or several files with an index. Each file appears once it is whole,
/// config.json as the last.
/// \param model_config  What the model was made from.
/// \param prediction    Its modules of multi-token prediction, if any.
/// \throws StateError   if weights are stored for inference.
/// \throws ConfigError  if the family's configurations cannot say what `model_config` does, the
///                      model is not what it says, or unless `is_storable(dtype)`.
/// \throws FileError    if a file cannot be written.
template <std::floating_point T, class Config>
void save_pretrained(const std::filesystem::path& dir, Decoder<T>& model,
                     const Config& model_config, const SavePretrainedConfig& config = {},
                     MultiToken<T>* prediction = nullptr) {
  using Own = Family<Config>;
  expect_at_least<std::int64_t>("save_pretrained", "shard_bytes", config.shard_bytes, 1);
  const nlohmann::json json = detail::config_json(model_config, config.dtype);
  const auto tensors = detail::all_tensors("save_pretrained", model, prediction);
  const auto layout = published_layout(Own::names(model_config, nullptr), shapes_of(tensors),
                                       detail::head_sizes(model_config.shape));
  expect_no_loss("save_pretrained", tensors, layout);
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) throw_error<FileError>(dir.string(), ": cannot be created: ", error.message());
  detail::write_model<T>(dir, layout, config,
                         [&](const PublishedTensor& tensor, std::vector<T>& numbers) {
                           gather_tensor(tensors, tensor, numbers);
                         });
  write_file(dir / "config.json", json.dump(2) + "\n");
}

/// The same for a config of any family.
template <std::floating_point T>
void save_pretrained(const std::filesystem::path& dir, Decoder<T>& model,
                     const ModelConfig& model_config, const SavePretrainedConfig& config = {},
                     MultiToken<T>* prediction = nullptr) {
  std::visit([&](const auto& own) { save_pretrained(dir, model, own, config, prediction); },
             model_config);
}

}  // namespace weir::io
