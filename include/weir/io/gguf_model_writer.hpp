// SPDX-License-Identifier: MIT
/// \file
/// What GGUF files say of a model, and the writing of its tensors.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/types.hpp>
#include <weir/io/gguf.hpp>
#include <weir/io/gguf_families/gguf_family.hpp>
#include <weir/io/gguf_families/gguf_rope.hpp>
#include <weir/io/gguf_metadata.hpp>
#include <weir/io/gguf_settings.hpp>
#include <weir/io/gguf_type.hpp>
#include <weir/io/gguf_writer.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/ops/rope_scaling.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::io {

/// Settings of `save_gguf`.
struct SaveGgufConfig {
  /// How weights are stored: F32, F16, BF16 or Q8_0. Vectors, biases and routers are always F32, as
  /// llama.cpp wants them; a matrix whose rows Q8_0 does not divide into blocks of 32 is F16.
  GgufType dtype = GgufType::kF32;

  /// A file whose tokenizer becomes that of the new one, to the byte. Without, the new file has a
  /// vocabulary without texts: llama.cpp computes with it, but knows numbers of tokens alone.
  const Gguf* tokenizer = nullptr;

  /// How long the texts of the training were. The format wants it; it changes no result.
  Index context_length = 4096;
};

/// The divisors of frequencies that the tensor rope_freqs.weight holds; none without Llama 3's
/// scaling.
inline std::vector<float> rope_divisors_of(const presets::ModelShape& shape) {
  const auto* const attention = std::get_if<GroupedQueryConfig>(&shape.attention);
  if (attention == nullptr) return {};
  const auto* const scaling = std::get_if<Llama3Scaling>(&attention->rope_scaling);
  if (scaling == nullptr) return {};
  const Index head_dim =
      attention->head_dim > 0 ? attention->head_dim : shape.d_model / attention->heads;
  return rope_divisors(*scaling, head_dim, attention->rope_theta);
}

namespace detail {

/// `file` is meant to be read as a `Config`.
template <class Config>
Config read_gguf_config(const Gguf& file) {
  constexpr auto kEmbedding = "token_embd.weight";
  GgufSettings settings(file);
  Config config = GgufFamily<Config>::read(settings);
  settings.finish();
  const std::vector<Index>& table = file.tensor(kEmbedding).shape;
  config.shape.vocab = table.empty() ? 0 : table[0];
  config.shape.tied = GgufFamily<Config>::kMayBeTied && !file.has_tensor("output.weight");
  return config;
}

/// Takes over numbers that differ by no more than rounding to 32 bits.
inline void adopt(double& to, double from) {
  constexpr double kRounding = 1e-6;
  if (std::abs(to - from) <= kRounding * std::abs(from)) to = from;
}

inline void adopt(RopeScaling& to, const RopeScaling& from) {
  if (to.index() != from.index()) return;
  if (auto* const linear = std::get_if<LinearScaling>(&to)) {
    adopt(linear->factor, std::get<LinearScaling>(from).factor);
  } else if (auto* const llama = std::get_if<Llama3Scaling>(&to)) {
    adopt(llama->factor, std::get<Llama3Scaling>(from).factor);
  } else if (auto* const yarn = std::get_if<Yarn>(&to)) {
    const Yarn& own = std::get<Yarn>(from);
    adopt(yarn->factor, own.factor);
    adopt(yarn->mscale, own.mscale);
    adopt(yarn->mscale_all_dim, own.mscale_all_dim);
  }
}

inline void adopt(GroupedQueryConfig& to, const GroupedQueryConfig& from) {
  adopt(to.rope_theta, from.rope_theta);
  adopt(to.rope_scaling, from.rope_scaling);
  adopt(to.scale, from.scale);
  adopt(to.softcap, from.softcap);
  adopt(to.clip_qkv, from.clip_qkv);
  adopt(to.qk_norm_epsilon, from.qk_norm_epsilon);
}

inline void adopt(LatentConfig& to, const LatentConfig& from) {
  adopt(to.rope_theta, from.rope_theta);
  adopt(to.rope_scaling, from.rope_scaling);
  adopt(to.norm_epsilon, from.norm_epsilon);
}

inline void adopt(presets::AttentionShape& to, const presets::AttentionShape& from) {
  if (auto* const grouped = std::get_if<GroupedQueryConfig>(&to)) {
    if (const auto* const own = std::get_if<GroupedQueryConfig>(&from)) adopt(*grouped, *own);
  } else if (const auto* const own = std::get_if<LatentConfig>(&from)) {
    adopt(std::get<LatentConfig>(to), *own);
  }
}

/// Whether both are the same to the rounding of their settings.
inline bool are_same(presets::ModelShape a, presets::ModelShape b) {
  a = presets::settled(a);
  b = presets::settled(b);
  adopt(a.attention, b.attention);
  if (a.other_attention && b.other_attention) adopt(*a.other_attention, *b.other_attention);
  // Of Llama 3's scaling, files have what it does to the pairs that there are.
  const std::vector<float> divisors = rope_divisors_of(b);
  if (!divisors.empty() && rope_divisors_of(a) == divisors) {
    std::get<GroupedQueryConfig>(a.attention).rope_scaling =
        std::get<GroupedQueryConfig>(b.attention).rope_scaling;
  }
  return a == b;
}

/// Copies the tokenizer of another file.
inline void add_tokenizer(const Gguf& from, Index vocab, GgufMetadata& metadata) {
  constexpr std::string_view kTokens = "tokenizer.ggml.tokens";
  if (from.has(kTokens) && static_cast<Index>(from.texts(kTokens).size()) != vocab) {
    throw_error<ConfigError>("save_gguf: the tokenizer of ", from.path(), " has ",
                             from.texts(kTokens).size(), " tokens, expected vocab = ", vocab);
  }
  for (const auto& [key, value] : from.metadata()) {
    if (key.starts_with("tokenizer.")) metadata.add_copy(key, value);
  }
}

/// The format's own number for the kind of most tensors, `general.file_type`.
inline std::uint32_t gguf_file_type(GgufType type) {
  switch (type) {
    case GgufType::kF16:
      return 1;
    case GgufType::kQ8_0:
      return 7;
    case GgufType::kBF16:
      return 32;
    default:
      return 0;
  }
}

/// The kind in which a tensor is stored where matrices are of the kind `type`.
inline GgufType stored_type(const PublishedTensor& tensor, GgufType type) {
  const bool is_small = tensor.shape.size() == 1 || tensor.name.ends_with(".bias") ||
                        tensor.name.find("ffn_gate_inp") != std::string::npos;
  if (is_small) return GgufType::kF32;
  return tensor.shape.back() % block_length(type) == 0 ? type : GgufType::kF16;
}

/// A vector of numbers, which have to stay until it is written.
template <class T>
GgufSource<T> vector_source(std::string name, const std::vector<float>& numbers) {
  return {std::move(name),
          {static_cast<Index>(numbers.size())},
          GgufType::kF32,
          [&numbers](Index /*first*/, Index /*count*/, T* to) {
            for (const float number : numbers) *to++ = static_cast<T>(number);
          }};
}

/// \throws ConfigError  unless the settings are read as those of `config`.
template <class Config>
void expect_read_back(const GgufMetadata& metadata, const Config& config) {
  const std::vector<float> divisors = rope_divisors_of(config.shape);
  const std::vector<float> one = {0.0F};
  std::vector<GgufSource<float>> sources;
  if (!divisors.empty()) sources.push_back(vector_source<float>(kGgufRopeDivisors, divisors));
  const auto* const attention = std::get_if<GroupedQueryConfig>(&config.shape.attention);
  const auto add_mark = [&](bool is_there, const char* name) {
    if (is_there) sources.push_back(vector_source<float>(name, one));
  };
  if (attention != nullptr) {
    add_mark(attention->qkv_bias, "blk.0.attn_q.bias");
    add_mark(attention->output_bias, "blk.0.attn_output.bias");
    add_mark(attention->qk_norm != QkNorm::kNone, "blk.0.attn_q_norm.weight");
  }
  std::string bytes = gguf_start(metadata, sources);
  for (const GgufSource<float>& source : sources) {
    std::vector<float> numbers(static_cast<std::size_t>(source.shape[0]));
    source.write_rows(0, 1, numbers.data());
    bytes.append(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(float));
    bytes.resize(padded_to_gguf(bytes.size()));
  }
  const Gguf written("save_gguf: the settings", bytes);
  GgufSettings settings(written);
  Config read = GgufFamily<Config>::read(settings);
  settings.finish();
  read.shape.vocab = config.shape.vocab;
  read.shape.tied = config.shape.tied;
  read.shape.prediction_modules = config.shape.prediction_modules;  // Are left out.
  if (!are_same(read.shape, config.shape)) {
    throw_error<ConfigError>("save_gguf: the model has sizes or options that the architecture '",
                             settings.architecture(), "' does not have");
  }
}

}  // namespace detail

/// What a file says of a model of `model_config`.
/// \throws ConfigError  as `save_gguf`.
template <class Config>
GgufMetadata gguf_metadata(const Config& model_config, const SaveGgufConfig& config) {
  using Own = GgufFamily<Config>;
  if (!is_writable(config.dtype)) {
    throw_error<ConfigError>("save_gguf: dtype = ", name_of(config.dtype),
                             ", expected F32, F16, BF16 or Q8_0");
  }
  expect_at_least<Index>("save_gguf", "context_length", config.context_length, 1);
  if (model_config.shape.tied && !Own::kMayBeTied) {
    throw_error<ConfigError>(
        "save_gguf: tied = true, expected false, as llama.cpp has it in this "
        "family");
  }
  GgufMetadata metadata;
  GgufSettingsWriter settings(metadata, Own::architecture(model_config));
  settings.count("context_length", config.context_length);
  Own::write(model_config, settings);
  metadata.add_u32("general.file_type", detail::gguf_file_type(config.dtype));
  if (config.dtype == GgufType::kQ8_0) metadata.add_u32("general.quantization_version", 2);
  detail::expect_read_back(metadata, model_config);
  if (config.tokenizer != nullptr) {
    detail::add_tokenizer(*config.tokenizer, model_config.shape.vocab, metadata);
  } else {
    metadata.add_text("tokenizer.ggml.model", "no_vocab");
  }
  return metadata;
}

/// Writes the tensors of `layout`, made for GGUF names, to a file.
/// \param divisors   See `rope_divisors_of`.
/// \param dtype      See SaveGgufConfig.
/// \param numbers_of `numbers_of(tensor, numbers)` gives the numbers of one tensor; they are called
///                   for one after the other.
template <class T>
void write_gguf_model(const std::filesystem::path& path, const GgufMetadata& metadata,
                      const std::vector<PublishedTensor>& layout,
                      const std::vector<float>& divisors, GgufType dtype,
                      FunctionRef<void(const PublishedTensor&, std::vector<T>&)> numbers_of) {
  std::vector<GgufSource<T>> sources;
  if (!divisors.empty()) sources.push_back(detail::vector_source<T>(kGgufRopeDivisors, divisors));
  std::vector<T> numbers;  // Of the tensor that is being written.
  for (const PublishedTensor& tensor : layout) {
    const Index cols = tensor.shape.back();
    sources.push_back({tensor.name, tensor.shape, detail::stored_type(tensor, dtype),
                       [&, cols](Index first, Index count, T* to) {
                         if (first == 0) numbers_of(tensor, numbers);
                         std::copy_n(numbers.data() + first * cols, count * cols, to);
                       }});
  }
  write_gguf<T>(path, metadata, sources);
}

}  // namespace weir::io
