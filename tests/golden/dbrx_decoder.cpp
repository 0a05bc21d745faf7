// SPDX-License-Identifier: MIT
// A small DBRX as Hugging Face's transformers have it.
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/block.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/layer_norm.hpp>

#include "golden/decoder_case.hpp"
#include "golden/double_softmax_loss.hpp"
#include "golden/families.hpp"

namespace weir::golden {
namespace {

using Moe = MoELayer<LinearRouter<double>, SoftmaxTopK<double>, Dropless, GluBank<double>,
                     DoubleSoftmaxLoss<GlobalBatchLoss<double>>>;

/// Where a parameter is in the file: some rows of a tensor, or what they are transposed.
struct Place {
  std::string tensor;
  std::vector<Index> shape;
  Index begin = 0;
  bool transposed = false;
};

/// Where the parameter `ours` is, such as "layers.0.moe.experts.2.down".
Place place_of(const std::string& ours, const DecoderInputs& in) {
  const Index d = in.d_model;
  if (ours == "embedding.weight") return {"transformer.wte.weight", {in.vocab, d}};
  if (ours == "head.weight") return {"lm_head.weight", {in.vocab, d}};
  if (ours == "norm.weight") return {"transformer.norm_f.weight", {d}};
  const std::size_t after_number = ours.find('.', std::string("layers.").size());
  const std::string part = ours.substr(after_number + 1);
  const std::string block = "transformer.blocks." + ours.substr(7, after_number - 7) + ".";
  const std::string attention = block + "norm_attn_norm.";
  const Index q = d;
  const Index kv = d / in.heads * in.kv_heads;
  if (part == "attention_norm.weight") return {attention + "norm_1.weight", {d}};
  if (part == "moe_norm.weight") return {attention + "norm_2.weight", {d}};
  if (part == "attention.output") return {attention + "attn.out_proj.weight", {d, q}};
  if (part == "moe.router.weight") return {block + "ffn.router.layer.weight", {in.experts, d}};
  Place fused = {attention + "attn.Wqkv.weight", {q + 2 * kv, d}};
  if (part == "attention.query") return fused;
  if (part == "attention.key") return {fused.tensor, fused.shape, q};
  if (part == "attention.value") return {fused.tensor, fused.shape, q + kv};
  // moe.experts.E.gate
  const std::string expert = part.substr(std::string("moe.experts.").size());
  const std::string member = expert.substr(expert.find('.') + 1);
  const Index begin = std::stol(expert) * in.d_ff;
  return {block + "ffn.experts.mlp." +
              (member == "gate" ? "w1"
               : member == "up" ? "v1"
                                : "w2"),
          {in.experts * in.d_ff, d},
          begin,
          member == "down"};
}

Decoder<double> read_decoder(CaseFile& file, const DecoderInputs& in, double coefficient,
                             const Loads& loads) {
  Rng rng(0);
  const LayerNorm<double> norm(in.d_model,
                               {.epsilon = file.number_or("layernorm_eps", 1e-5), .bias = false});
  const double weight_norm = file.number_or("moe_normalize_expert_weights", 0.0);
  const SoftmaxTopKConfig selection{
      .k = in.k, .renormalise = weight_norm > 0.0, .norm = weight_norm > 0.0 ? weight_norm : 1.0};
  std::vector<Block<double>> layers;
  for (Index l = 0; l < in.layers; ++l) {
    // As in Mixtral's: f_e that sum to k, and the mean over the layers.
    GlobalBatchLoss<double> balance(
        {.coefficient = coefficient * static_cast<double>(in.k) / static_cast<double>(in.layers)});
    const RowVector<double> elsewhere = load_elsewhere(loads, l);
    if (elsewhere.size() > 0) balance.add_load(elsewhere);
    layers.push_back(pre_norm_block<double>(
        norm,
        GroupedQueryAttention<double>(rng, {.d_model = in.d_model,
                                            .heads = in.heads,
                                            .kv_heads = in.kv_heads,
                                            .rope_theta = file.number_or("rope_theta", 1e4),
                                            .clip_qkv = file.number_or("clip_qkv", 0.0)}),
        norm,
        Moe(LinearRouter<double>(in.d_model, in.experts, rng), SoftmaxTopK<double>(selection),
            Dropless(), GluBank<double>(in.d_model, in.experts, in.d_ff, rng),
            DoubleSoftmaxLoss(balance)),
        "moe"));
  }
  Decoder<double> decoder(
      Embedding<double>(in.vocab, in.d_model, rng), std::move(layers), norm,
      in.tied ? std::nullopt : std::optional(Linear<double>(in.d_model, in.vocab, rng)));
  for (auto& [name, parameter] : parameters(decoder)) {
    const Place place = place_of(name, in);
    Matrix<double>& value = parameter->value;
    const Matrix<double> all = file.matrix("w." + place.tensor, place.shape);
    const Index rows = place.transposed ? value.cols() : value.rows();
    value = place.transposed ? Matrix<double>(all.middleRows(place.begin, rows).transpose())
                             : Matrix<double>(all.middleRows(place.begin, rows));
  }
  return decoder;
}

}  // namespace

void check_dbrx_decoder(CaseFile& file, Checker& checker) {
  const DecoderInputs in(file);
  const bool balances = file.flag_or("output_router_logits", true);
  const double coefficient =
      balances ? file.number_or("effective_aux_coef", file.number_or("router_aux_loss_coef", 0.0))
               : 0.0;
  Decoder<double> decoder = check_decoder<Moe>(
      file, checker, in, coefficient,
      [&](double scale, const Loads& loads) { return read_decoder(file, in, scale, loads); });
  if (in.tied) check_tied(checker, "lm_head.weight", decoder);

  std::map<std::string, Matrix<double>> gradients;
  for (const auto& [name, parameter] : parameters(decoder)) {
    const Place place = place_of(name, in);
    Matrix<double>& all = gradients[place.tensor];
    const bool is_row = place.shape.size() == 1;
    if (all.size() == 0) all.setZero(is_row ? 1 : place.shape[0], place.shape.back());
    Matrix<double> own = parameter->gradient();
    if (place.transposed) own.transposeInPlace();
    all.middleRows(place.begin, own.rows()) = own;
  }
  for (const auto& [name, gradient] : gradients) checker.reals("g." + name, gradient);
  check_decoding(file, checker, decoder, in);
}

}  // namespace weir::golden
