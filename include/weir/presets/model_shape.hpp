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

/// The sizes that all presets have in common. Kinds (which router, selector, activation) are the
/// business of each preset's `make`.
struct ModelShape {
  Index layers = 0;  ///< Of the decoder.
  Index d_model = 0;
  Index vocab = 0;
  bool tied = false;  ///< The embedding is the output head, too.
  AttentionShape attention = GroupedQueryConfig{};
  std::optional<AttentionShape> other_attention = {};  ///< Of the layers `others` says, if any.
  Interleave others = {};
  Index norms = 2;  ///< In a layer: one before each branch, or, if 4, one behind it as well.

  Interleave interleave = {};  ///< Which layers are mixtures of experts.
  Index experts = 0;
  Index k = 0;               ///< Experts each token visits.
  Index d_hidden = 0;        ///< Width of one expert.
  Index ffn_matrices = 3;    ///< Of experts and dense networks: 3 gated, 2 plain, 4 OpenMoE's code.
  bool expert_bias = false;  ///< Behind each of an expert's matrices.
  bool router_bias = false;
  bool selection_bias = false;  ///< A buffer [experts] in each mixture, moved by BiasBalance.
  Index shared_hidden = 0;      ///< Width of the expert that every token visits; 0: none.
  Index dense_hidden = 0;       ///< Width of the networks in layers that are not sparse.
  Index extra_hidden = 0;       ///< Width of the dense network behind each mixture; 0: none.

  Index encoder_layers = 0;      ///< Not 0: the decoder also attends to an encoder.
  Index position_buckets = 0;    ///< Of T5's relative position bias, one table for each stack.
  Index prediction_modules = 0;  ///< Multi-token prediction; counted apart from the model.

  /// \throws ConfigError  unless there are 1 <= k <= experts experts, and of everything else that
  ///                      is not optional at least one, and of nothing less than none.
  void check() const {
    constexpr auto kWho = "ModelShape";
    expect_at_least<Index>(kWho, "layers", layers, 1);
    expect_at_least<Index>(kWho, "d_model", d_model, 1);
    expect_at_least<Index>(kWho, "vocab", vocab, 1);
    expect_at_least<Index>(kWho, "experts", experts, 1);
    if (k < 1 || k > experts) {
      fail<ConfigError>(kWho, ": k = ", k, ", expected 1 <= k <= experts = ", experts);
    }
    expect_at_least<Index>(kWho, "d_hidden", d_hidden, 1);
    if (norms != 2 && norms != 4) fail<ConfigError>(kWho, ": norms = ", norms, ", expected 2 or 4");
    if (ffn_matrices < 2 || ffn_matrices > 4) {
      fail<ConfigError>(kWho, ": ffn_matrices = ", ffn_matrices, ", expected 2, 3 or 4");
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
    if (interleave.count_sparse(layers) < layers) {
      expect_at_least<Index>(kWho, "dense_hidden", dense_hidden, 1);
    }
  }

  /// The attention of layer `layer`, from 0.
  const AttentionShape& attention_of(Index layer) const {
    return other_attention && others.is_sparse(layer) ? *other_attention : attention;
  }

  /// The decoder half of an encoder-decoder: without encoder, without attention to it, without
  /// position tables. A decoder-only model is its own.
  ModelShape decoder_half() const {
    ModelShape half = *this;
    half.encoder_layers = 0;
    half.position_buckets = 0;
    return half;
  }
};

/// A preset's config: the sizes and, beside them, what only its family has.
template <class Config>
concept Preset = requires(const Config& config) {
  { config.shape } -> std::convertible_to<const ModelShape&>;
};

}  // namespace weir::presets
