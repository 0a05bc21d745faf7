// SPDX-License-Identifier: MIT
/// \file
/// A decoder over bytes, composed of parts that are chosen at run time.
#pragma once

#include <iomanip>
#include <limits>
#include <map>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/interleave.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>

#include "bytes.hpp"
#include "rank_job.hpp"

struct ByteDecoderConfig {
  weir::Index layers = 4;
  weir::Index d_model = 128;
  weir::Index heads = 4;
  weir::Index kv_heads = 2;
  std::string attention = "grouped-query";  ///< Or "latent".
  weir::Index d_hidden = 256;  ///< Of one expert; a dense layer is as wide as all that are visited.
  bool tied = false;           ///< Whether the embedding is the output head, too.

  bool dense = false;  ///< Whether there are no experts at all.
  weir::Index experts = 8;
  weir::Index k = 2;
  weir::Index shared = 0;  ///< Experts that every token visits besides.
  weir::Interleave interleave = {.stride = 2};
  std::string selector = "top-k-softmax";  ///< Or "softmax-top-k" or "sigmoid-top-k".
  double capacity_factor = 0.0;            ///< While training; twice that afterwards; 0: none.
  double balance = 0.01;                   ///< Coefficient of SwitchLoss.
  double z_loss = 0.001;                   ///< Coefficient of ZLoss.
  double bias_rate = 0.001;                ///< Rate of BiasBalance, for "sigmoid-top-k".
  double jitter = 0.0;
  weir::Index vocab = kBytes;  ///< More than bytes for a model that knows other tokens, too.
};

/// Calls `visit(name, setting)` for each setting that decides which parameters a model has, or what
/// it computes from them. The names are those of train_lm's options.
template <class Config, class Visit>
void for_each_setting(Config& config, Visit&& visit) {
  visit("layers", config.layers);
  visit("d-model", config.d_model);
  visit("heads", config.heads);
  visit("kv-heads", config.kv_heads);
  visit("attention", config.attention);
  visit("d-hidden", config.d_hidden);
  visit("tied", config.tied);
  visit("dense", config.dense);
  visit("experts", config.experts);
  visit("top-k", config.k);
  visit("shared", config.shared);
  visit("stride", config.interleave.stride);
  visit("first-dense", config.interleave.first_dense);
  visit("phase", config.interleave.phase);
  visit("selector", config.selector);
  visit("capacity-factor", config.capacity_factor);
}

using Notes = std::map<std::string, std::string>;

/// Notes to a checkpoint, from which `config_of` makes the config again.
inline Notes notes_of(const ByteDecoderConfig& config) {
  Notes notes;
  for_each_setting(config, [&](const std::string& name, const auto& setting) {
    std::ostringstream text;
    text << std::setprecision(std::numeric_limits<double>::max_digits10) << setting;
    notes[name] = text.str();
  });
  return notes;
}

/// \throws std::runtime_error  if the notes are not those of such a model.
inline ByteDecoderConfig config_of(Notes notes) {
  ByteDecoderConfig config;
  notes.try_emplace("attention", config.attention);  // Of a train_lm that had no other.
  for_each_setting(config, [&](const std::string& name, auto& setting) {
    const auto found = notes.find(name);
    std::istringstream text(found == notes.end() ? "" : found->second);
    if (!(text >> setting)) {
      throw std::runtime_error("the checkpoint does not say what --" + name +
                               " was: it is not one of train_lm");
    }
  });
  return config;
}

namespace byte_decoder {

using Config = ByteDecoderConfig;
using Layer = weir::AnyLayer<float>;

/// Router, experts and balancing around a selector and a capacity policy.
template <class Selector, class Capacity, class... Rules>
Layer mixture(const Config& config, Selector selector, Capacity capacity, weir::Rng& rng,
              Rules... rules) {
  weir::JitterRouter router(weir::LinearRouter<float>(config.d_model, config.experts, rng),
                            {.epsilon = config.jitter});
  weir::GluBank<float> all(config.d_model, config.experts, config.d_hidden, rng);
  return with_experts(std::move(all), [&](auto experts) -> Layer {
    weir::MoELayer moe(std::move(router), std::move(selector), capacity, std::move(experts),
                       weir::SwitchLoss<float>({.coefficient = config.balance}),
                       weir::ZLoss<float>({.coefficient = config.z_loss}), rules...);
    if (config.shared == 0) return moe;
    weir::Glu<float> shared(config.d_model, config.shared * config.d_hidden, rng);
    return weir::SharedExperts(std::move(moe), std::move(shared));
  });
}

template <class Capacity>
Layer mixture(const Config& config, Capacity capacity, weir::Rng& rng) {
  if (config.selector == "sigmoid-top-k") {
    return mixture(config, weir::SigmoidTopK<float>(config.experts, {.k = config.k}), capacity, rng,
                   weir::BiasBalance<float>({.rate = config.bias_rate}));
  }
  if (config.selector == "top-k-softmax") {
    return mixture(config, weir::TopKSoftmax<float>({.k = config.k}), capacity, rng);
  }
  return mixture(config, weir::SoftmaxTopK<float>({.k = config.k}), capacity, rng);
}

inline Layer mixture(const Config& config, weir::Rng& rng) {
  const double factor = config.capacity_factor;
  if (factor == 0.0) return mixture(config, weir::Dropless(), rng);
  return mixture(config, weir::CapacityFactor({.train = factor, .evaluate = 2.0 * factor}), rng);
}

/// Latent attention has the proportions of DeepSeek-V2: for heads of d numbers, latents of 4 d and
/// rotated keys of d / 2. (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1.4.)
inline Layer attention(const Config& config, weir::Rng& rng) {
  if (config.attention == "latent") {
    const weir::Index dim = config.d_model / config.heads;
    return weir::LatentAttention<float>(rng, {.d_model = config.d_model,
                                              .heads = config.heads,
                                              .kv_rank = 4 * dim,
                                              .nope_dim = dim,
                                              .rope_dim = dim / 2,
                                              .value_dim = dim});
  }
  return weir::GroupedQueryAttention<float>(
      rng, {.d_model = config.d_model, .heads = config.heads, .kv_heads = config.kv_heads});
}

}  // namespace byte_decoder

/// \param mixture  `mixture(config, rng)` makes a layer with experts.
template <class Mixture>
weir::Decoder<float> make_byte_decoder(const ByteDecoderConfig& config, weir::Rng& rng,
                                       Mixture&& mixture) {
  weir::Embedding<float> embedding(config.vocab, config.d_model, rng);
  std::vector<weir::Block<float>> layers;
  for (weir::Index l = 0; l < config.layers; ++l) {
    const bool sparse = !config.dense && config.interleave.is_sparse(l);
    const auto feed_forward = [&]() -> byte_decoder::Layer {
      if (sparse) return mixture(config, rng);
      const weir::Index width = (config.k + config.shared) * config.d_hidden;
      return weir::Glu<float>(config.d_model, width, rng);
    };
    byte_decoder::Layer attention = byte_decoder::attention(config, rng);
    layers.push_back(weir::pre_norm_block<float>(
        weir::RmsNorm<float>(config.d_model), std::move(attention),
        weir::RmsNorm<float>(config.d_model), feed_forward(), sparse ? "moe" : "mlp"));
  }
  std::optional<weir::Linear<float>> head;
  if (!config.tied) head = weir::Linear<float>(config.d_model, config.vocab, rng);
  return {std::move(embedding), std::move(layers), weir::RmsNorm<float>(config.d_model),
          std::move(head)};
}

inline weir::Decoder<float> make_byte_decoder(const ByteDecoderConfig& config, weir::Rng& rng) {
  return make_byte_decoder(config, rng, [](const ByteDecoderConfig& c, weir::Rng& draws) {
    return byte_decoder::mixture(c, draws);
  });
}

/// Total parameters, and those that one token meets.
/// \param sum      `sum(count)` adds up a count of all ranks, each of which has some of the
/// experts.
template <class Sum>
std::pair<weir::Index, weir::Index> count_parameters(weir::Decoder<float>& model,
                                                     const ByteDecoderConfig& config, Sum&& sum) {
  weir::Index dense = 0;
  weir::Index in_experts = 0;
  for (const auto& [name, parameter] : weir::parameters(model)) {
    const bool of_expert = weir::matches_pattern("*.experts.*", name);
    (of_expert ? in_experts : dense) += parameter->value.size();
  }
  in_experts = sum(in_experts);
  return {dense + in_experts, dense + in_experts * config.k / config.experts};
}
inline std::pair<weir::Index, weir::Index> count_parameters(weir::Decoder<float>& model,
                                                            const ByteDecoderConfig& config) {
  return count_parameters(model, config, [](weir::Index of_rank) { return of_rank; });
}
