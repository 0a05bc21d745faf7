// SPDX-License-Identifier: MIT
/// \file
/// The sizes of a model: what its parameters, caches and multiplications are counted from.
#pragma once

#include <concepts>
#include <optional>
#include <string_view>
#include <variant>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/model/interleave.hpp>

namespace weir::presets {

/// Which attention, and its numbers; d_model is filled in by `make`.
using AttentionShape = std::variant<GroupedQueryConfig, LatentConfig>;

/// The network that experts and dense layers are made of.
enum class Network {
  kPlain,    ///< Two matrices with ReLU between them, see Mlp.
  kGated,    ///< Three matrices, one of them a gate, see Glu.
  kOpenMoE,  ///< Four matrices, as in OpenMoE's released code, see OpenMoENetwork.
};

/// How many matrices such a network has.
constexpr Index matrices_of(Network network) {
  if (network == Network::kPlain) return 2;
  return network == Network::kGated ? 3 : 4;
}

/// The sizes that all presets have in common. The kinds of parts (router, selector, activation) are
/// chosen by each preset's `make`.
struct ModelShape {
  Index layers = 0;  ///< Layers of the decoder.
  Index d_model = 0;
  Index vocab = 0;
  bool tied = false;  ///< Whether the embedding is the output head too.
  AttentionShape attention = GroupedQueryConfig{};
  std::optional<AttentionShape> other_attention = {};  ///< If set, some layers have this instead.
  Interleave others = {};   ///< The layers that it calls sparse have `other_attention`.
  bool post_norms = false;  ///< Whether each branch has a norm behind it, and not only before it.
  bool norm_bias = false;   ///< Whether norms have a bias.
  bool head_bias = false;   ///< Whether the output head has a bias, where it is one of its own.

  Interleave interleave = {};  ///< Which layers are mixtures of experts, if there are experts.
  Index experts = 0;           ///< 0: the model is dense.
  Index k = 0;                 ///< How many experts each token visits.
  Index d_hidden = 0;          ///< Width of one expert.
  Network network = Network::kGated;  ///< What experts and dense networks are.
  bool expert_bias = false;           ///< Whether an expert's matrices have biases.
  bool router_bias = false;           ///< Whether the router has a bias.
  bool selection_bias = false;        ///< Whether mixtures have a buffer [experts] for BiasBalance.
  Index shared_hidden = 0;            ///< Width of the expert that every token visits; 0: none.
  bool shared_gate = false;           ///< Whether that expert has a gate of one logit.
  Index dense_hidden = 0;             ///< Width of the networks in layers that are not sparse.
  Index extra_hidden = 0;             ///< Width of the dense network behind each mixture; 0: none.

  Index encoder_layers = 0;      ///< Not 0: the decoder also attends to an encoder.
  Index position_buckets = 0;    ///< Rows of T5's position bias; each stack has one such table.
  Index prediction_modules = 0;  ///< Modules of multi-token prediction, counted apart.

  bool operator==(const ModelShape&) const = default;

  /// Whether layer `layer`, counted from 0, is a mixture of experts.
  bool is_sparse(Index layer) const { return experts > 0 && interleave.is_sparse(layer); }

  /// How many of the first `count` layers are mixtures of experts.
  Index count_sparse(Index count) const { return experts > 0 ? interleave.count_sparse(count) : 0; }

  /// \throws ConfigError  unless 1 <= k <= experts, or k and d_hidden are 0 without experts;
  ///                      required sizes are >= 1 and optional ones >= 0.
  void check() const {
    constexpr auto kWho = "ModelShape";
    expect_at_least<Index>(kWho, "layers", layers, 1);
    expect_at_least<Index>(kWho, "d_model", d_model, 1);
    expect_at_least<Index>(kWho, "vocab", vocab, 1);
    expect_at_least<Index>(kWho, "experts", experts, 0);
    if (experts == 0) {
      expect_none("k", k);
      expect_none("d_hidden", d_hidden);
    } else if (k < 1 || k > experts) {
      throw_error<ConfigError>(kWho, ": k = ", k, ", expected 1 <= k <= experts = ", experts);
    } else {
      expect_at_least<Index>(kWho, "d_hidden", d_hidden, 1);
    }
    const auto expect_count = [](std::string_view name, Index count) {
      expect_at_least<Index>(kWho, name, count, 0);
    };
    expect_count("shared_hidden", shared_hidden);
    expect_count("dense_hidden", dense_hidden);
    expect_count("extra_hidden", extra_hidden);
    expect_count("encoder_layers", encoder_layers);
    expect_count("position_buckets", position_buckets);
    expect_count("prediction_modules", prediction_modules);
    if (count_sparse(layers) < layers) {
      expect_at_least<Index>(kWho, "dense_hidden", dense_hidden, 1);
    }
  }

  /// The attention of layer `layer`, counted from 0.
  const AttentionShape& attention_of(Index layer) const {
    return other_attention && others.is_sparse(layer) ? *other_attention : attention;
  }

  /// The decoder half of an encoder-decoder: it has no encoder, no attention to one and no position
  /// tables. A decoder-only model is its own decoder half.
  ModelShape decoder_half() const {
    ModelShape half = *this;
    half.encoder_layers = 0;
    half.position_buckets = 0;
    return half;
  }

 private:
  static void expect_none(std::string_view name, Index size) {
    if (size != 0) {
      throw_error<ConfigError>("ModelShape: ", name, " = ", size, ", expected 0 without experts");
    }
  }
};

namespace detail {

/// Fills in what may be left to others, and forgets options that have no effect.
inline void settle(GroupedQueryConfig& a, Index d_model) {
  const GroupedQueryConfig defaults;
  a.d_model = d_model;
  a = a.checked();
  a.init_scale = defaults.init_scale;
  a.scale = a.shape().scale;
  if (a.rotary_dim == a.head_dim) a.rotary_dim = 0;
  if (a.temperature_scale == 0.0) a.temperature_floor = defaults.temperature_floor;
  if (a.qk_norm == QkNorm::kNone) a.qk_norm_epsilon = defaults.qk_norm_epsilon;
  if (!a.rope) a.rope_theta = defaults.rope_theta;
}

inline void settle(LatentConfig& a, Index d_model) {
  a.d_model = d_model;
  a.decoding = LatentConfig{}.decoding;
  a.init_scale = LatentConfig{}.init_scale;
}

}  // namespace detail

/// The same model with everything filled in that its attention may leave to others, and without
/// options that do not matter once its weights are there: what has to be equal for two models to
/// compute the same.
inline ModelShape settled(ModelShape shape) {
  const auto settle = [&](AttentionShape& attention) {
    std::visit([&](auto& own) { detail::settle(own, shape.d_model); }, attention);
  };
  settle(shape.attention);
  if (shape.other_attention) settle(*shape.other_attention);
  if (shape.experts == 0) shape.interleave = {};
  if (shape.interleave.phase == shape.interleave.stride - 1) shape.interleave.phase = -1;
  return shape;
}

/// A preset's config: the sizes and, beside them, what only its family has.
template <class Config>
concept Preset = requires(const Config& config) {
  { config.shape } -> std::convertible_to<const ModelShape&>;
};

}  // namespace weir::presets
