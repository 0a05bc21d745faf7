// SPDX-License-Identifier: MIT
/// \file
/// What the presets' `make` functions share: a decoder from sizes and parts.
#pragma once

#include <cmath>
#include <concepts>
#include <functional>
#include <optional>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/model/block.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/ops/activation.hpp>
#include <weir/presets/model_shape.hpp>
#include <weir/presets/openmoe_network.hpp>

namespace weir::presets {

/// The kinds of layers that a family uses. Each function makes one layer whenever it is called.
template <std::floating_point T>
struct Parts {
  std::function<AnyLayer<T>()> norm;
  std::function<AnyLayer<T>()> mixture;
  std::function<AnyLayer<T>(Index d_hidden)> dense;
  bool parallel = false;  ///< Whether the dense network is beside its mixture, not behind it.
  EmbeddingConfig embedding = {};
  double residual_multiplier = 1.0;  ///< Of what each branch adds.
};

/// The attention of layer `layer`.
template <std::floating_point T>
AnyLayer<T> make_attention(const ModelShape& shape, Index layer, Rng& rng) {
  const auto make = [&](auto config) -> AnyLayer<T> {
    config.d_model = shape.d_model;
    if constexpr (std::is_same_v<decltype(config), LatentConfig>) {
      return LatentAttention<T>(rng, config);
    } else {
      return GroupedQueryAttention<T>(rng, config);
    }
  };
  return std::visit(make, shape.attention_of(layer));
}

/// Layer `layer`, with a norm before each branch. The first branch is the attention; the second is
/// the mixture, under the name "moe", where the layer is sparse, else a dense network under the
/// name "mlp". If the shape says so, a dense network follows each mixture, and each branch has a
/// norm behind it as well.
template <std::floating_point T>
Block<T> make_layer(const ModelShape& shape, Index layer, const Parts<T>& parts, Rng& rng) {
  std::vector<Branch<T>> branches;
  branches.push_back({"attention", parts.norm(), make_attention<T>(shape, layer, rng)});
  if (shape.is_sparse(layer)) {
    branches.push_back({"moe", parts.norm(), parts.mixture()});
    if (shape.extra_hidden > 0) {
      branches.push_back({"mlp", parts.norm(), parts.dense(shape.extra_hidden)});
      branches.back().parallel = parts.parallel;
    }
  } else {
    branches.push_back({"mlp", parts.norm(), parts.dense(shape.dense_hidden)});
  }
  for (Branch<T>& branch : branches) {
    branch.multiplier = parts.residual_multiplier;
    if (shape.post_norms) branch.post_norm = parts.norm();
  }
  return Block<T>(std::move(branches));
}

/// A decoder made of such layers.
/// \throws ConfigError  as ModelShape::check, and if the shape is of an encoder-decoder.
template <std::floating_point T>
Decoder<T> compose(const ModelShape& shape, const Parts<T>& parts, Rng& rng,
                   const DecoderConfig& config = {}) {
  shape.check();
  if (shape.encoder_layers > 0) {
    throw_error<ConfigError>("compose: encoder_layers = ", shape.encoder_layers,
                             ", expected 0; see ModelShape::decoder_half");
  }
  Embedding<T> embedding(shape.vocab, shape.d_model, rng, parts.embedding);
  std::vector<Block<T>> layers;
  for (Index l = 0; l < shape.layers; ++l) layers.push_back(make_layer(shape, l, parts, rng));
  std::optional<Linear<T>> head;
  if (!shape.tied) {
    head.emplace(shape.d_model, shape.vocab, rng, LinearConfig{.bias = shape.head_bias});
  }
  return {std::move(embedding), std::move(layers), parts.norm(), std::move(head), config};
}

/// The attention of T5 and its successors: each head has keys and values of its own, and scores are
/// products of query and key without a factor, for which the weights of queries begin smaller.
/// (Mesh TensorFlow and Flaxformer; ColossalAI's OpenMoE has a softmax_scale of 1.)
inline GroupedQueryConfig t5_attention(Index heads, Index head_dim) {
  return {.heads = heads,
          .kv_heads = heads,
          .head_dim = head_dim,
          .scale = 1.0,
          .init_scale = 0.1,
          .fold_scale = true};
}

/// T5's embedding begins with a variance of 1.
inline constexpr EmbeddingConfig kT5Embedding{.stddev = 1.0};

/// T5's head: where it is the embedding, logits are divided by sqrt(d_model). (Mesh TensorFlow and
/// Flaxformer, `logits_via_embedding`.)
inline DecoderConfig t5_head(const ModelShape& shape) {
  DecoderConfig config;
  if (shape.tied) config.logit_multiplier = 1.0 / std::sqrt(static_cast<double>(shape.d_model));
  return config;
}

/// A dense network of the kind `shape.network`; Act is the activation of a gated one.
template <std::floating_point T, Activation Act = Silu>
AnyLayer<T> make_dense(const ModelShape& shape, Index d_hidden, Rng& rng, double init_scale = 1.0) {
  if (shape.network == Network::kPlain) {
    return Mlp<T, Relu>(shape.d_model, d_hidden, rng, {.init_scale = init_scale});
  }
  if (shape.network == Network::kGated) {
    return Glu<T, Act>(shape.d_model, d_hidden, rng, {.init_scale = init_scale});
  }
  return OpenMoENetwork<T>(shape.d_model, d_hidden, rng, {.init_scale = init_scale});
}

/// RMS norms and dense networks from `make_dense`, as most families have them. The caller sets the
/// mixture. `rng` has to live as long as the parts.
template <std::floating_point T, Activation Act = Silu>
Parts<T> usual_parts(const ModelShape& shape, double norm_epsilon, Rng& rng,
                     double init_scale = 1.0) {
  Parts<T> parts;
  parts.norm = [=] { return RmsNorm<T>(shape.d_model, {.epsilon = norm_epsilon}); };
  parts.dense = [=, &rng](Index d_hidden) {
    return make_dense<T, Act>(shape, d_hidden, rng, init_scale);
  };
  return parts;
}

/// `moe` with the shared expert beside it, if the shape has one, and with its gate.
template <class Moe, class T = typename Moe::Scalar>
AnyLayer<T> with_shared(const ModelShape& shape, Moe moe, Rng& rng) {
  if (shape.shared_hidden == 0) return moe;
  Glu<T> shared(shape.d_model, shape.shared_hidden, rng);
  if (!shape.shared_gate) return SharedExperts(std::move(moe), std::move(shared));
  return SharedExperts(std::move(moe), std::move(shared), Linear<T>(shape.d_model, 1, rng));
}

/// The experts of a family whose networks are all gated.
/// \throws ConfigError  unless shape.network is kGated.
template <std::floating_point T, Activation Act = Silu>
GluBank<T, Act> gated_experts(const ModelShape& shape, Rng& rng, double init_scale = 1.0) {
  if (shape.network != Network::kGated) {
    throw_error<ConfigError>(
        "gated_experts: network = ", shape.network == Network::kPlain ? "kPlain" : "kOpenMoE",
        ", expected kGated");
  }
  return GluBank<T, Act>(shape.d_model, shape.experts, shape.d_hidden, rng,
                         {.init_scale = init_scale});
}

/// The mixture `with(bank)` of a family whose models have different kinds of networks: the bank's
/// experts are like the networks of `make_dense`.
template <std::floating_point T, Activation Act = Silu, class With>
AnyLayer<T> with_experts(const ModelShape& shape, Rng& rng, double init_scale, With&& with) {
  if (shape.network == Network::kPlain) {
    return with(MlpBank<T, Relu>(shape.d_model, shape.experts, shape.d_hidden, rng,
                                 {.init_scale = init_scale}));
  }
  if (shape.network == Network::kGated) return with(gated_experts<T, Act>(shape, rng, init_scale));
  const OpenMoENetworkConfig config = {.init_scale = init_scale};
  std::vector<OpenMoENetwork<T>> experts;
  for (Index e = 0; e < shape.experts; ++e) {
    experts.emplace_back(shape.d_model, shape.d_hidden, rng, config);
  }
  return with(AnyBank(std::move(experts), shape.d_model, shape.d_model));
}

/// The coefficient of one layer's loss, where `coefficient` is meant for the mean of the losses of
/// all sparse layers. (Hugging Face's ports of Mixtral, OLMoE, Qwen3 and DBRX compute one loss over
/// the tokens of all layers laid end to end instead, which couples the layers. GlobalBatchLoss with
/// the loads of the other layers added computes the same.)
inline double per_layer(double coefficient, const ModelShape& shape) {
  return coefficient / static_cast<double>(shape.count_sparse(shape.layers));
}

}  // namespace weir::presets

#ifdef WEIR_COMPILED
extern template weir::Decoder<float> weir::presets::compose<float>(
    const weir::presets::ModelShape&, const weir::presets::Parts<float>&, weir::Rng&,
    const weir::DecoderConfig&);
extern template weir::Decoder<double> weir::presets::compose<double>(
    const weir::presets::ModelShape&, const weir::presets::Parts<double>&, weir::Rng&,
    const weir::DecoderConfig&);
#endif
