// SPDX-License-Identifier: MIT
/// \file
/// Reads the weights of a model from the tensors of a checkpoint.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/storage_rules.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/expert_store.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/model_config.hpp>
#include <weir/io/published_tensors.hpp>
#include <weir/io/streamed_experts.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/io/weights.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/multi_token.hpp>
#include <weir/ops/rope_scaling.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// Is handed a model before its weights are read, and may take parts away, such as the experts that
/// other processes have: those are not read.
template <class T>
using PrepareModel = std::function<void(Decoder<T>&)>;

/// A model that somebody has trained.
template <class T>
struct Pretrained {
  ModelConfig config;
  Decoder<T> model;
  std::optional<MultiToken<T>> prediction;  ///< The modules of multi-token prediction, if any.
  std::shared_ptr<ExpertStore<T>> experts;  ///< If experts stay in the files, those in memory.
  std::map<std::string, std::string> metadata = {};  ///< The texts in the headers of the files.
};

/// Settings of `load_pretrained`.
struct LoadConfig {
  Storage storage = Storage::kTrainable;  ///< How the weights are stored from the beginning on.

  /// The same for the parts of the model that these rules match by name, see `set_storage`.
  StorageRules rules = {};

  /// Above zero, the gated experts of mixtures stay in the files, and at most as many of them as
  /// have room in this many bytes are in memory, see ExpertStore and StreamedExperts. Outputs are
  /// the same to the bit. The files have to stay; not with Storage::kTrainable.
  std::size_t expert_bytes = 0;

  /// How many tokens the longest text will have, where rotary frequencies depend on that: `length`
  /// of LongRopeScaling and DynamicNtkScaling. 0 stands for as many as the files say that the model
  /// can read: Phi-3.5-MoE then has the frequencies of long texts. Hugging Face's code chooses by
  /// each text, so that those of up to `original_max_position_embeddings` tokens have its results
  /// if that number is given here.
  Index longest_text = 0;
};

namespace detail {

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

/// At least how many numbers a model of that shape has; sizes may be absurd, which is why they are
/// no integers.
inline double least_numbers(const presets::ModelShape& shape) {
  const auto real = [](Index size) { return static_cast<double>(size); };
  const double d = real(shape.d_model);
  const auto attention_numbers = [&](const presets::AttentionShape& shape_of) {
    return std::visit(
        [&](const auto& a) {
          if constexpr (std::is_same_v<std::remove_cvref_t<decltype(a)>, LatentConfig>) {
            const double heads = real(a.heads);
            return d * (real(a.kv_rank) + real(a.rope_dim) + heads * real(a.value_dim)) +
                   heads * real(a.kv_rank) * (real(a.nope_dim) + real(a.value_dim)) +
                   heads * (real(a.nope_dim) + real(a.rope_dim)) *
                       (a.q_rank > 0 ? real(a.q_rank) : d);
          } else {
            return 2.0 * real(a.head_dim) * (real(a.heads) + real(a.kv_heads)) * d;
          }
        },
        shape_of);
  };
  double attention = attention_numbers(shape.attention);
  if (shape.other_attention) {
    attention = std::min(attention, attention_numbers(*shape.other_attention));
  }
  const double matrices = real(presets::matrices_of(shape.network));
  const double sparse = shape.experts > 0 ? 1.0 : 0.0;  // At least one layer.
  return d * real(shape.vocab) + real(shape.layers) * attention +
         sparse * matrices * d *
             (real(shape.experts) * real(shape.d_hidden) + real(shape.shared_hidden));
}

/// Refuses a configuration that asks for much more than the files hold, before memory is.
/// \throws FileError  naming `path`, where the configuration is from.
inline void expect_room(const std::string& path, const presets::ModelShape& shape,
                        const TensorSource& source) {
  double stored = 0.0;
  Index tensors = 0;
  for (const std::string& name : source.names()) {
    double numbers = 1.0;
    for (const Index length : source.find(name)->shape()) numbers *= static_cast<double>(length);
    stored += numbers;
    ++tensors;
  }
  if (shape.layers > tensors) {
    throw_error<FileError>(path, ": asks for ", shape.layers, " layers, ", source.path(), " has ",
                           tensors, " tensors");
  }
  if (const double wanted = least_numbers(shape); wanted > stored) {
    throw_error<FileError>(path, ": asks for at least ", wanted, " numbers, ", source.path(),
                           " has ", stored);
  }
}

/// `config` for texts of at most `longest` tokens, see LoadConfig.
template <class Config>
Config for_texts(Config config, Index longest) {
  expect_at_least<Index>("LoadConfig", "longest_text", longest, 0);
  if (longest == 0) return config;
  const auto set_length = [&](presets::AttentionShape& attention) {
    std::visit(
        [&](auto& own) {
          if (auto* const rope = std::get_if<LongRopeScaling>(&own.rope_scaling)) {
            rope->length = longest;
          } else if (auto* const ntk = std::get_if<DynamicNtkScaling>(&own.rope_scaling)) {
            ntk->length = longest;
          }
        },
        attention);
  };
  set_length(config.shape.attention);
  if (config.shape.other_attention) set_length(*config.shape.other_attention);
  return config;
}

template <class T, class Config>
Pretrained<T> make_unset(const Config& config) {
  Rng rng = Rng::unset();
  Pretrained<T> loaded{
      .config = config, .model = make<T>(config, rng), .prediction = {}, .experts = {}};
  if constexpr (Predicts<Config, T>) {
    if (config.shape.prediction_modules > 0) {
      loaded.prediction.emplace(make_prediction<T>(config, rng));
    }
  }
  return loaded;
}

/// Reads all weights of a model that has been made with a generator that leaves them unset. Weights
/// that are stored for inference go there panel by panel; each layer has its storage before the
/// next is read.
/// \param k        How many experts a token visits.
/// \param ignored  Patterns of tensors that the model does not need.
template <class T>
void read_model(const std::shared_ptr<const TensorSource>& source,
                const std::vector<presets::TensorName>& names, const HeadSizes& sizes, Index k,
                std::span<const std::string_view> ignored, const LoadConfig& how,
                const PrepareModel<T>& prepare, Pretrained<T>& into) {
  weir::detail::expect_matches("load_pretrained", into.model, how.rules);
  StorageRules rules = how.rules;
  rules.push_back({"*", how.storage});
  const bool all_trainable = std::all_of(rules.begin(), rules.end(), [](const StorageRule& rule) {
    return rule.storage == Storage::kTrainable;
  });
  weir::detail::StoreByRules<T> store(rules);
  MultiToken<T>* const prediction = into.prediction ? &*into.prediction : nullptr;
  ModelTensors<T> tensors = all_tensors("load_pretrained", into.model, prediction);
  auto layout = published_layout(names, shapes_of(tensors), sizes);
  if (prepare) {
    const auto whole = shapes_of(tensors);
    prepare(into.model);
    tensors = all_tensors("load_pretrained", into.model, prediction);
    leave_out("load_pretrained", whole, shapes_of(tensors), layout);
  }
  const auto reader =
      std::make_shared<PublishedReader<T>>(*source, std::move(tensors), layout, ignored);
  std::optional<StreamBanks<T>> stream;
  if (how.expert_bytes > 0) {
    into.experts = std::make_shared<ExpertStore<T>>(how.expert_bytes);
    stream.emplace(source, reader, into.experts, rules);
    (*stream)("", into.model);
  }
  // Lets the weights of a part be fetched when they are stored.
  const auto postpone = [&](const std::string& prefix, auto& part) {
    if (all_trainable) return;
    for (auto& [name, parameter] : parameters(part)) {
      const auto matrix = reader->find(prefix + name);
      if (!matrix || (prefix.empty() && !name.starts_with("head."))) continue;
      parameter->rows = reader->rows_of(*matrix);
      if (parameter->rows != nullptr) reader->defer(*matrix);
    }
  };
  auto& layers = into.model.layers();
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const std::string name = "layers." + std::to_string(l);
    const std::string prefix = name + ".";
    postpone(prefix, layers[l]);
    reader->read(prefix);
    store(name, layers[l]);
    settle(layers[l]);  // What is no large weight.
    reader->release(prefix);
  }
  postpone("", into.model);
  reader->read("");
  store("", into.model);
  settle(into.model);
  if (prediction != nullptr) store("", *prediction);
  if (stream) stream->link(into.model, k);
}

}  // namespace detail

}  // namespace weir::io
