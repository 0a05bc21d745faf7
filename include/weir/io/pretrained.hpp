// SPDX-License-Identifier: MIT
/// \file
/// Loads and saves models as Hugging Face publishes them.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
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
#include <weir/io/safetensors_writer.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/io/weights.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/multi_token.hpp>

namespace weir::io {

/// A model that somebody has trained.
template <class T>
struct Pretrained {
  ModelConfig config;
  Decoder<T> model;
  std::optional<MultiToken<T>> prediction;  ///< The modules of multi-token prediction, if any.
};

/// Settings of `load_pretrained`.
struct LoadConfig {
  Storage storage = Storage::kTrainable;  ///< How the weights are stored from the beginning on.
};

/// Settings of `save_pretrained`.
struct SavePretrainedConfig {
  Dtype dtype = Dtype::kF32;                 ///< How numbers are stored.
  std::int64_t shard_bytes = 5'000'000'000;  ///< A larger model is divided into files of this size.
};

namespace detail {

/// Tensors that a model does not need: tables of rotation that are computed, and what modules of
/// prediction share with the model.
inline constexpr auto kNeedless =
    std::to_array<std::string_view>({"*.rotary_emb.inv_freq", "model.layers.*.embed_tokens.weight",
                                     "model.layers.*.shared_head.head.weight"});

/// The config of a family whose models have modules of multi-token prediction.
template <class Config, class T>
concept Predicts = requires(const Config& config, Rng& rng) {
  make_prediction<T>(config, rng);
};

inline HeadSizes head_sizes(const presets::ModelShape& shape) {
  return std::visit(
      [&](const auto& attention) -> HeadSizes {
        if constexpr (std::is_same_v<std::remove_cvref_t<decltype(attention)>, LatentConfig>) {
          return {.heads = attention.heads, .head_dim = attention.query_dim()};
        } else {
          const Index own = attention.head_dim;
          return {.heads = attention.heads,
                  .head_dim = own > 0 ? own : shape.d_model / attention.heads};
        }
      },
      shape.attention);
}

/// The tensors of a model and of its modules of prediction. Module m is called a layer of the model
/// with the number layers + m, as checkpoints have it.
template <class T>
ModelTensors<T> all_tensors(std::string_view who, Decoder<T>& model, MultiToken<T>* prediction) {
  ModelTensors<T> all = tensors_of(who, model);
  if (prediction == nullptr) return all;
  const auto layers = static_cast<Index>(model.layers().size());
  for (auto& [name, matrix] : tensors_of(who, *prediction)) {  // modules.0.layer.attention.query
    const std::size_t number = name.find('.') + 1;
    const std::size_t rest = name.find('.', number);
    const std::string layer =
        std::to_string(layers + std::stoll(name.substr(number, rest - number)));
    const std::string inner = ".layer.";
    const bool is_inner = name.compare(rest, inner.size(), inner) == 0;
    all.emplace_back(is_inner ? "layers." + layer + "." + name.substr(rest + inner.size())
                              : "modules." + layer + name.substr(rest),
                     matrix);
  }
  return all;
}

template <class T, class Config>
Pretrained<T> make_unset(const Config& config) {
  Rng rng = Rng::unset();
  Pretrained<T> loaded{.config = config, .model = make<T>(config, rng), .prediction = {}};
  if constexpr (Predicts<Config, T>) {
    if (config.shape.prediction_modules > 0) {
      loaded.prediction.emplace(make_prediction<T>(config, rng));
    }
  }
  return loaded;
}

/// Reads all weights of a model that has been made with a generator that leaves them unset. Each
/// layer gets its storage before the next is read.
template <class T>
void read_model(const TensorSource& source, const std::vector<presets::TensorName>& names,
                const HeadSizes& sizes, std::span<const std::string_view> ignored,
                Pretrained<T>& into, Storage storage) {
  MultiToken<T>* const prediction = into.prediction ? &*into.prediction : nullptr;
  ModelTensors<T> tensors = all_tensors("load_pretrained", into.model, prediction);
  const auto layout = published_layout(names, shapes_of(tensors), sizes);
  PublishedReader<T> reader(source, std::move(tensors), layout, ignored);
  auto& layers = into.model.layers();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    reader.read("layers." + std::to_string(l) + ".");
    set_storage(layers[l], storage);
  }
  reader.read("");
  set_storage(into.model, storage);
  if (prediction != nullptr) set_storage(*prediction, storage);
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

template <class T>
void write_model(const std::filesystem::path& dir, const ModelTensors<T>& tensors,
                 const std::vector<PublishedTensor>& layout, const SavePretrainedConfig& config) {
  const std::vector<std::size_t> first = divide(layout, config.dtype, config.shard_bytes);
  const std::size_t files = first.size() - 1;
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
    SafetensorsWriter writer(dir / name, shapes, config.dtype, {{"format", "pt"}});
    for (std::size_t t = first[f]; t < first[f + 1]; ++t) {
      gather_tensor(tensors, layout[t], numbers);
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

}  // namespace detail

/// Loads a model from a folder as Hugging Face publishes them: config.json, and the weights in
/// model.safetensors or in the files of model.safetensors.index.json. ModelConfig lists the
/// families.
///
///     auto [config, model, prediction] = io::load_pretrained("OLMoE-1B-7B", {.storage =
///     kBfloat16});
///
/// Weights are converted from whatever kind of numbers the files hold. They go layer by layer into
/// the storage asked for, so that memory never holds more than that and one layer.
/// \tparam T         float or double.
/// \throws FileError    if a file is missing or broken, the family or a setting is not known, or a
///                      tensor is missing, unknown or of another shape.
/// \throws ConfigError  if a size is out of range.
template <std::floating_point T = float>
Pretrained<T> load_pretrained(const std::filesystem::path& dir, const LoadConfig& config = {}) {
  const ModelConfig model_config = read_config((dir / "config.json").string());
  const CheckpointFolder source(dir);
  return std::visit(
      [&](const auto& own) {
        using Own = Family<std::remove_cvref_t<decltype(own)>>;
        Pretrained<T> loaded = detail::make_unset<T>(own);
        detail::read_model(source, Own::names(own, &source), detail::head_sizes(own.shape),
                           detail::kNeedless, loaded, config.storage);
        return loaded;
      },
      model_config);
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
  nlohmann::json json = {{"model_type", Own::kModelTypes[0]},
                         {"architectures", {Own::kArchitecture}},
                         {"torch_dtype", detail::torch_name(config.dtype)}};
  Own::write(model_config, json);
  const auto tensors = detail::all_tensors("save_pretrained", model, prediction);
  const auto layout = published_layout(Own::names(model_config, nullptr), shapes_of(tensors),
                                       detail::head_sizes(model_config.shape));
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) throw_error<FileError>(dir.string(), ": cannot be created: ", error.message());
  detail::write_model(dir, tensors, layout, config);
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
