// SPDX-License-Identifier: MIT
// One layer of Grok-1: norms before and behind attention and mixture, soft-capped scores, and
// weights that are not renormalised.
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/block.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/ops/activation.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"

namespace weir::golden {
namespace {

using Moe =
    MoELayer<LinearRouter<double>, SoftmaxTopK<double>, Dropless, GluBank<double, GeluTanh>>;

/// What the file calls a parameter of the block that is not an expert's. Its matrices are [in,
/// out].
const std::vector<std::pair<std::string, std::string>> kNames = {
    {"attention_norm.weight", "rms_norm.scale"},
    {"attention.query", "query.w"},
    {"attention.key", "key.w"},
    {"attention.value", "value.w"},
    {"attention.output", "attn_linear.w"},
    {"attention_post_norm.weight", "rms_norm_1.scale"},
    {"moe_norm.weight", "rms_norm_2.scale"},
    {"moe.router.weight", "router.w"},
    {"moe_post_norm.weight", "rms_norm_3.scale"},
};

/// And the experts' matrices, [experts, in, out].
const std::vector<std::pair<std::string, std::string>> kExpertNames = {
    {"gate", "moe.linear.w"}, {"up", "moe.linear_v.w"}, {"down", "moe.linear_1.w"}};

std::string expert_name(Index expert, const std::string& member) {
  return "moe.experts." + std::to_string(expert) + "." + member;
}

void read_weights(CaseFile& file, Block<double>& block, Index experts) {
  std::map<std::string, Parameter<double>*> ours;
  for (auto& [name, parameter] : parameters(block)) ours[name] = parameter;
  for (const auto& [name, theirs] : kNames) {
    Matrix<double>& value = ours.at(name)->value;
    if (name.ends_with("norm.weight")) {
      value = file.matrix("w." + theirs, {value.cols()});
    } else {
      value = weight(file, theirs, value.cols(), value.rows()).transpose().eval();
    }
  }
  for (const auto& [member, theirs] : kExpertNames) {
    const Matrix<double>& first = ours.at(expert_name(0, member))->value;
    const Index in = first.cols();
    const Matrix<double> all = file.matrix("w." + theirs, {experts, in, first.rows()});
    for (Index e = 0; e < experts; ++e) {
      ours.at(expert_name(e, member))->value = all.middleRows(e * in, in).transpose();
    }
  }
}

}  // namespace

void check_grok1_layer(CaseFile& file, Checker& checker) {
  const MoeInputs in(file);
  Rng rng(0);
  const GroupedQueryConfig config = {.d_model = in.d_model,
                                     .heads = file.size("n_heads"),
                                     .kv_heads = file.size("n_kv_heads"),
                                     .head_dim = file.size("head_dim"),
                                     .rope_theta = file.number_or("rope_theta", 1e4),
                                     .scale = file.number_or("attn_output_multiplier", 0.0),
                                     .softcap = file.number_or("max_attn_val", 0.0)};
  const RmsNorm<double> norm(in.d_model, {.epsilon = file.number_or("rms_eps", 1e-5)});
  Block<double> block({{"attention", norm, GroupedQueryAttention<double>(rng, config), norm},
                       {"moe", norm,
                        Moe(LinearRouter<double>(in.d_model, in.experts, rng),
                            SoftmaxTopK<double>({.k = file.size("top_k")}), Dropless(),
                            GluBank<double, GeluTanh>(in.d_model, in.experts, in.d_ff, rng)),
                        norm}});
  read_weights(file, block, in.experts);

  Block<double>::Cache cache;
  check_layer(checker, block, in, cache);
  // The branches one by one, as the block runs them.
  const Branch<double>& attention = block.branches()[0];
  AnyLayer<double>::Cache attention_cache;
  checker.reals("out.attn_out",
                attention.layer.forward(infer(attention.norm, in.x), in.pass(), attention_cache));
  const Branch<double>& moe = block.branches()[1];
  Moe::Cache moe_cache;
  checker.reals("out.moe_out", moe.layer.get<Moe>()->forward(infer(moe.norm, cache.branches[0].out),
                                                             in.pass(), moe_cache));
  checker.reals("out.router_logits", moe_cache.routing.logits);
  checker.reals("out.router_probs", moe_cache.routing.probabilities);
  check_top_k(checker, file, moe_cache.routing);
  checker.reals("out.combine_dense", dense_weights(moe_cache.routing));

  Gradients gradients(block);
  for (const auto& [name, theirs] : kNames) {
    Matrix<double> gradient = gradients.take(name);
    if (!name.ends_with("norm.weight")) gradient.transposeInPlace();
    checker.reals("g." + theirs, gradient);
  }
  for (const auto& [member, theirs] : kExpertNames) {
    Matrix<double> all;
    for (Index e = 0; e < in.experts; ++e) {
      const Matrix<double> one = gradients.take(expert_name(e, member)).transpose();
      if (e == 0) all.resize(in.experts * one.rows(), one.cols());
      all.middleRows(e * one.rows(), one.rows()) = one;
    }
    checker.reals("g." + theirs, all);
  }
  gradients.finish(checker);

  // Token by token, the sequences together.
  const Sequences one_each = Sequences::uniform(in.batch, 1);
  std::vector<Block<double>::State> states(static_cast<std::size_t>(in.batch));
  std::vector<Block<double>::State*> pointers;
  pointers.reserve(states.size());
  for (Block<double>::State& state : states) pointers.push_back(&state);
  Matrix<double> y(in.x.rows(), in.d_model);
  for (Index t = 0; t < in.seq; ++t) {
    Matrix<double> x(in.batch, in.d_model);
    for (Index b = 0; b < in.batch; ++b) x.row(b) = in.x.row(b * in.seq + t);
    const Matrix<double>& next = block.decode(x, {.sequences = &one_each}, pointers, cache);
    for (Index b = 0; b < in.batch; ++b) y.row(b * in.seq + t) = next.row(b);
  }
  checker.section("Decoding all sequences together, token by token");
  checker.reals("out.y", y);
}

}  // namespace weir::golden
