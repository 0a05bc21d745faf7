// SPDX-License-Identifier: MIT
// A small decoder of DeepSeek-V3 as its own inference code has it: latent attention, then a dense
// network in the first layers, and shared and routed experts in the others.
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/attention/latent.hpp>
#include <weir/model/block.hpp>
#include <weir/model/decoder.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/nn/embedding.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/rms_norm.hpp>

#include "golden/deepseek_gate.hpp"
#include "golden/families.hpp"
#include "golden/latent_case.hpp"
#include "golden/moe_case.hpp"

namespace weir::golden {
namespace {

using Moe = SharedExperts<MoELayer<LinearRouter<double>, DeepSeekGate, Dropless, GluBank<double>>,
                          Glu<double>>;

/// One layer; `dense` in the first ones, `moe` in the others.
struct Parts {
  RmsNorm<double> attention_norm;
  LatentAttention<double> attention;
  RmsNorm<double> feed_forward_norm;
  std::optional<Glu<double>> dense;
  std::optional<Moe> moe;
};

struct Shape {
  explicit Shape(CaseFile& file)
      : latent(read_latent_config(file)),
        layers(file.size("n_layers")),
        dense_layers(static_cast<Index>(file.number_or("n_dense_layers", 0.0))),
        experts(file.size("n_experts")),
        shared(file.size("n_shared_experts")),
        d_ff(file.size("moe_d_ff")),
        dense_d_ff(file.size_or("dense_d_ff", 1)) {
    read_yarn(file, latent);
  }

  LatentConfig latent;
  Index layers, dense_layers, experts, shared, d_ff, dense_d_ff;
};

/// "gate" to "w1.weight".
std::string glu_name(std::string_view parameter) {
  return parameter == "gate" ? "w1.weight" : parameter == "up" ? "w3.weight" : "w2.weight";
}

/// What the file calls a parameter of a mixture.
std::string moe_name(const std::string& parameter) {
  if (parameter == "router.weight") return "gate.weight";
  const std::size_t last = parameter.rfind('.') + 1;
  std::string prefix = parameter.substr(0, last);
  if (prefix == "shared.") prefix = "shared_experts.";
  return prefix + glu_name(parameter.substr(last));
}

/// Reads all parameters of `layer` from the tensors w.`prefix``name_of(parameter)`.
template <class Layer, class NameOf>
void load(CaseFile& file, Layer& layer, const std::string& prefix, NameOf&& name_of) {
  for (auto& [name, parameter] : parameters(layer)) {
    Matrix<double>& value = parameter->value;
    value = file.matrix("w." + prefix + name_of(name), {value.rows(), value.cols()});
  }
}

RmsNorm<double> read_norm(CaseFile& file, const std::string& name, const LatentConfig& config) {
  RmsNorm<double> norm(config.d_model, {.epsilon = config.norm_epsilon});
  norm.weight().value = file.matrix("w." + name + ".weight", {config.d_model});
  return norm;
}

Moe read_moe(CaseFile& file, const Shape& shape, const std::string& prefix) {
  Rng rng(0);
  const Index d_model = shape.latent.d_model;
  Moe moe(MoELayer(LinearRouter<double>(d_model, shape.experts, rng),
                   read_v3_gate(file, shape.experts, prefix), Dropless(),
                   GluBank<double>(d_model, shape.experts, shape.d_ff, rng)),
          Glu<double>(d_model, shape.shared * shape.d_ff, rng));
  load(file, moe, prefix, moe_name);
  return moe;
}

Parts read_layer(CaseFile& file, const Shape& shape, Index l) {
  Rng rng(0);
  const std::string prefix = "layers." + std::to_string(l) + ".";
  Parts parts{read_norm(file, prefix + "attn_norm", shape.latent),
              LatentAttention<double>(rng, shape.latent),
              read_norm(file, prefix + "ffn_norm", shape.latent), std::nullopt, std::nullopt};
  for (auto& [name, parameter] : parameters(parts.attention)) {
    parameter->value =
        latent_weight(file, shape.latent, "w." + prefix + "attn.", name, parameter->value);
  }
  if (l < shape.dense_layers) {
    parts.dense.emplace(shape.latent.d_model, shape.dense_d_ff, rng);
    load(file, *parts.dense, prefix + "ffn.", glu_name);
  } else {
    parts.moe = read_moe(file, shape, prefix + "ffn.");
  }
  return parts;
}

Decoder<double> compose(const Embedding<double>& embedding, const std::vector<Parts>& layers,
                        const RmsNorm<double>& norm, const std::optional<Linear<double>>& head) {
  std::vector<Block<double>> blocks;
  for (const Parts& parts : layers) {
    blocks.push_back(pre_norm_block<double>(
        parts.attention_norm, parts.attention, parts.feed_forward_norm,
        parts.moe ? AnyLayer<double>(*parts.moe) : AnyLayer<double>(*parts.dense),
        parts.moe ? "moe" : "mlp"));
  }
  return {embedding, std::move(blocks), norm, head};
}

/// Runs the layers one by one, as the decoder does, to see what their routers decide.
void check_routing_of(CaseFile& file, Checker& checker, const std::vector<Parts>& layers,
                      Matrix<double> x, const Pass& pass) {
  for (std::size_t l = 0; l < layers.size(); ++l) {
    const Parts& parts = layers[l];
    LatentAttention<double>::Cache attention;
    x += parts.attention.forward(infer(parts.attention_norm, x), pass, attention);
    const Matrix<double> normed = infer(parts.feed_forward_norm, x);
    if (parts.dense) {
      x += infer(*parts.dense, normed);
      continue;
    }
    Moe::Cache cache;
    x += parts.moe->forward(normed, pass, cache);
    check_top_k(checker, file, cache.moe.routing, "out.layers." + std::to_string(l) + ".");
    checker.reals("out.layers." + std::to_string(l) + ".combine_dense",
                  dense_weights(cache.moe.routing));
  }
}

void check_gradients(Checker& checker, Decoder<double>& decoder, const Shape& shape) {
  Gradients gradients(decoder);
  gradients.check(checker, "embedding.weight", "embed.weight");
  for (Index l = 0; l < shape.layers; ++l) {
    const std::string prefix = "layers." + std::to_string(l) + ".";
    const std::string ours = prefix + (l < shape.dense_layers ? "mlp" : "moe");
    gradients.check(checker, prefix + "attention_norm.weight", prefix + "attn_norm.weight");
    check_latent_gradients(checker, gradients, shape.latent, prefix + "attention.",
                           prefix + "attn.");
    gradients.check(checker, ours + "_norm.weight", prefix + "ffn_norm.weight");
    if (l < shape.dense_layers) {
      for (const std::string name : {"gate", "up", "down"}) {
        gradients.check(checker, ours + "." + name, prefix + "ffn." + glu_name(name));
      }
      continue;
    }
    std::vector<std::string> names = {"router.weight"};
    for (const std::string name : {"gate", "up", "down"}) {
      names.push_back("shared." + name);
      for (Index e = 0; e < shape.experts; ++e) {
        names.push_back("experts." + std::to_string(e) + "." + name);
      }
    }
    for (const std::string& name : names) {
      gradients.check(checker, ours + "." + name, prefix + "ffn." + moe_name(name));
    }
    checker.reals("g." + prefix + "ffn.gate.bias", Matrix<double>::Zero(1, shape.experts));
  }
  gradients.check(checker, "norm.weight", "norm.weight");
  if (!decoder.tied()) gradients.check(checker, "head.weight", "head.weight");
  gradients.finish(checker);
}

}  // namespace

void check_deepseek_v3_decoder(CaseFile& file, Checker& checker) {
  const Shape shape(file);
  const Index vocab = file.size("vocab");
  const Index d_model = shape.latent.d_model;
  const Embedding<double> embedding(file.matrix("w.embed.weight", {vocab, d_model}));
  std::vector<Parts> layers;
  for (Index l = 0; l < shape.layers; ++l) layers.push_back(read_layer(file, shape, l));
  const RmsNorm<double> norm = read_norm(file, "norm", shape.latent);
  std::optional<Linear<double>> head;
  if (!file.flag_or("tied_embedding", false)) {
    head.emplace(file.matrix("w.head.weight", {vocab, d_model}));
  }
  Decoder<double> decoder = compose(embedding, layers, norm, head);

  const Index batch = file.size("batch");
  const Index seq = file.size("seq");
  const std::vector<std::int64_t> tokens = file.integers("in.tokens", {batch, seq});
  const std::vector<Index> ids(tokens.begin(), tokens.end());
  std::vector<Index> targets(ids.begin() + 1, ids.end());
  targets.push_back(0);
  const CrossEntropy<double> objective;
  for (std::size_t t = 0; t < targets.size(); ++t) {
    if ((static_cast<Index>(t) + 1) % seq == 0) targets[t] = objective.config().ignore_index;
  }
  const Sequences sequences = Sequences::uniform(batch, seq);
  const Pass pass{.training = true, .sequences = &sequences};

  Decoder<double>::Cache cache;
  CrossEntropy<double>::Cache loss;
  const Matrix<double> logits = decoder.forward(ids, pass, cache);
  checker.reals("out.logits", logits);
  const double mean = objective.forward(logits, targets, loss);
  if (loss.tokens > 0) {
    checker.scalar("out.loss", mean);
  } else {
    for (const char* name : {"out.loss", "g."}) checker.leave(name, "there is nothing to predict");
  }
  decoder.backward(objective.backward(loss), cache);
  check_gradients(checker, decoder, shape);
  if (decoder.tied()) {  // The file may have the head under its own name, too.
    checker.reals("w.head.weight", embedding.weight().value);
    checker.reals("g.head.weight", parameters(decoder).front().parameter->gradient());
  }
  Embedding<double>::Cache embedded;
  check_routing_of(file, checker, layers, embedding.forward(ids, pass, embedded), pass);

  checker.section("decoding token by token");
  Matrix<double> decoded(logits.rows(), logits.cols());
  for (Index b = 0; b < batch; ++b) {
    Decoder<double>::State state;
    for (Index t = b * seq; t < (b + 1) * seq; ++t) {
      const std::span<const Index> id(&ids[static_cast<std::size_t>(t)], 1);
      decoded.row(t) = decode(decoder, id, state, cache);
    }
  }
  checker.reals("out.logits", decoded);
}

}  // namespace weir::golden
