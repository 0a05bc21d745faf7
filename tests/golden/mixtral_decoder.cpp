// SPDX-License-Identifier: MIT
// A small Mixtral as Hugging Face's transformers have it.
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/model/block.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/ops/activation.hpp>

#include "golden/decoder_case.hpp"
#include "golden/families.hpp"

namespace weir::golden {
namespace {

template <Activation Act>
using Moe = MoELayer<LinearRouter<double>, SoftmaxTopK<double>, Dropless, GluBank<double, Act>,
                     GlobalBatchLoss<double>>;

/// What the file calls a parameter of the decoder.
std::string name_of(const std::string& ours) {
  static const std::vector<std::pair<std::string, std::string>> parts = {
      {"embedding.weight", "model.embed_tokens.weight"},
      {"head.weight", "lm_head.weight"},
      {"layers.", "model.layers."},
      {"attention_norm.", "input_layernorm."},
      {"moe_norm.", "post_attention_layernorm."},
      {"attention.query", "self_attn.q_proj.weight"},
      {"attention.key", "self_attn.k_proj.weight"},
      {"attention.value", "self_attn.v_proj.weight"},
      {"attention.output", "self_attn.o_proj.weight"},
      {"moe.router.", "block_sparse_moe.gate."},
      {"moe.experts.", "block_sparse_moe.experts."},
  };
  if (ours == "norm.weight") return "model.norm.weight";
  std::string name = ours;
  for (const auto& [from, to] : parts) {
    const std::size_t at = name.find(from);
    if (at != std::string::npos) name.replace(at, from.size(), to);
  }
  if (ours.find(".experts.") == std::string::npos) return name;
  const std::size_t last = name.rfind('.') + 1;
  const std::string member = name.substr(last);
  return name.substr(0, last) + (member == "gate" ? "w1.weight"
                                 : member == "up" ? "w3.weight"
                                                  : "w2.weight");
}

template <class Moe, class Bank>
Decoder<double> read_decoder(CaseFile& file, const DecoderInputs& in, double coefficient,
                             const Loads& loads) {
  Rng rng(0);
  const RmsNorm<double> norm(in.d_model, {.epsilon = file.number_or("rms_eps", 1e-5)});
  std::vector<Block<double>> layers;
  for (Index l = 0; l < in.layers; ++l) {
    // f_e that sum to k instead of 1, and the mean over the layers instead of the sum.
    GlobalBatchLoss<double> balance(
        {.coefficient = coefficient * static_cast<double>(in.k) / static_cast<double>(in.layers)});
    const RowVector<double> elsewhere = load_elsewhere(loads, l);
    if (elsewhere.size() > 0) balance.add_load(elsewhere);
    layers.push_back(pre_norm_block<double>(
        norm,
        GroupedQueryAttention<double>(
            rng, {.d_model = in.d_model,
                  .heads = in.heads,
                  .kv_heads = in.kv_heads,
                  .rope_theta = file.number_or("rope_theta", 1e4),
                  .window = static_cast<Index>(file.number_or("sliding_window", 0.0))}),
        norm,
        Moe(LinearRouter<double>(in.d_model, in.experts, rng),
            SoftmaxTopK<double>({.k = in.k, .renormalise = true}), Dropless(),
            Bank(in.d_model, in.experts, in.d_ff, rng), balance),
        "moe"));
  }
  Decoder<double> decoder(
      Embedding<double>(in.vocab, in.d_model, rng), std::move(layers), norm,
      in.tied ? std::nullopt : std::optional(Linear<double>(in.d_model, in.vocab, rng)));
  for (auto& [name, parameter] : parameters(decoder)) {
    Matrix<double>& value = parameter->value;
    const bool is_norm = name.find("norm.") != std::string::npos;
    value =
        file.matrix("w." + name_of(name), is_norm ? std::vector<Index>{value.cols()}
                                                  : std::vector<Index>{value.rows(), value.cols()});
  }
  return decoder;
}

template <Activation Act>
void check_with(CaseFile& file, Checker& checker) {
  const DecoderInputs in(file);
  // Without router logits in its output, the reference has no balancing loss.
  const double coefficient = file.flag_or("output_router_logits", true)
                                 ? file.number_or("router_aux_loss_coef", 0.0)
                                 : 0.0;
  Decoder<double> decoder = check_decoder<Moe<Act>>(
      file, checker, in, coefficient, [&](double scale, const Loads& loads) {
        return read_decoder<Moe<Act>, GluBank<double, Act>>(file, in, scale, loads);
      });
  if (in.tied) check_tied(checker, "lm_head.weight", decoder);
  Gradients gradients(decoder);
  for (const auto& [name, parameter] : parameters(decoder)) {
    gradients.check(checker, name, name_of(name));
  }
  gradients.finish(checker);
  check_decoding(file, checker, decoder, in);
}

}  // namespace

void check_mixtral_decoder(CaseFile& file, Checker& checker) {
  with_activation(file, "silu", [&]<Activation Act>() { check_with<Act>(file, checker); });
}

}  // namespace weir::golden
