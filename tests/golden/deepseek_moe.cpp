// SPDX-License-Identifier: MIT
// The MoE layers of DeepSeek-V2, as its remote code for Hugging Face has it, and of DeepSeek-V3, as
// DeepSeek's own inference code has it: group-limited routing beside shared experts.
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"

namespace weir::golden {
namespace {

struct GluNames {
  std::string gate, up, down;
};

const GluNames kV2Names = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"};
const GluNames kV3Names = {"w1.weight", "w3.weight", "w2.weight"};
const std::string kShared = "shared_experts.";

std::string expert_prefix(Index expert) {
  return "experts." + std::to_string(expert) + ".";
}

GluBank<double> read_bank(CaseFile& file, const MoeInputs& in, const GluNames& names) {
  std::vector<Matrix<double>> gate, up, down;
  for (Index e = 0; e < in.experts; ++e) {
    const std::string prefix = expert_prefix(e);
    gate.push_back(weight(file, prefix + names.gate, in.d_ff, in.d_model));
    up.push_back(weight(file, prefix + names.up, in.d_ff, in.d_model));
    down.push_back(weight(file, prefix + names.down, in.d_model, in.d_ff));
  }
  return {std::move(gate), std::move(up), std::move(down)};
}

/// All but the routing's details, which `check_routing_of` compares.
template <class S, class Check, class... L>
void check_deepseek(CaseFile& file, Checker& checker, const MoeInputs& in, const GluNames& names,
                    const S& selector, Check&& check_routing_of, const L&... balancers) {
  MoELayer moe(LinearRouter<double>(weight(file, "gate.weight", in.experts, in.d_model)), selector,
               Dropless(), read_bank(file, in, names), balancers...);
  const Index d_ff = file.size("shared_d_ff");
  if (d_ff != file.size("n_shared_experts") * in.d_ff) {
    checker.failure("cfg.shared_d_ff", "is not that of the shared experts together");
  }
  Glu<double> shared(weight(file, kShared + names.gate, d_ff, in.d_model),
                     weight(file, kShared + names.up, d_ff, in.d_model),
                     weight(file, kShared + names.down, in.d_model, d_ff));
  SharedExperts layer(std::move(moe), std::move(shared));
  typename decltype(layer)::Cache cache;
  const double aux_loss = check_layer(checker, layer, in, cache);

  const Routing<double>& routing = cache.moe.routing;
  checker.reals("out.router_logits", routing.logits);
  check_top_k(checker, file, routing);
  checker.reals("out.combine_dense", dense_weights(routing));
  const LayerReport report = report_of(routing);
  checker.integers("out.tokens_per_expert", {report.load.begin(), report.load.end()});
  check_routing_of(routing, aux_loss);

  Gradients gradients(layer);
  gradients.check(checker, "router.weight", "gate.weight");
  for (Index e = 0; e < in.experts; ++e) {
    const std::string prefix = expert_prefix(e);
    gradients.check(checker, prefix + "gate", prefix + names.gate);
    gradients.check(checker, prefix + "up", prefix + names.up);
    gradients.check(checker, prefix + "down", prefix + names.down);
  }
  gradients.check(checker, "shared.gate", kShared + names.gate);
  gradients.check(checker, "shared.up", kShared + names.up);
  gradients.check(checker, "shared.down", kShared + names.down);
  gradients.finish(checker);
}

GroupLimit read_groups(CaseFile& file, Index summed) {
  return {.count = file.size("n_group"), .allowed = file.size("topk_group"), .summed = summed};
}

void expect_text(CaseFile& file, const std::string& key, const std::string& known) {
  const std::string value = file.text(key);
  if (value != known) {
    throw_error<UnknownCase>(file.path(), ": cfg.", key, " = ", value, ", only ", known,
                             " is known here");
  }
}

}  // namespace

void check_deepseek_v2_moe(CaseFile& file, Checker& checker) {
  file.expect_activation("silu");
  expect_text(file, "topk_method", "group_limited_greedy");
  expect_text(file, "scoring_func", "softmax");
  expect_text(file, "seq_aux", "True");
  expect_text(file, "norm_topk_prob", "False");
  const MoeInputs in(file);
  // Groups that are not allowed have the score 0 there, below every probability.
  const SoftmaxTopK<double> selector({.k = file.size("top_k"),
                                      .scale = file.number("routed_scaling_factor"),
                                      .groups = read_groups(file, 1)});
  const SwitchLoss<double> balance(
      {.coefficient = file.number("aux_loss_alpha"), .scope = Scope::kSequence});
  const auto check = [&](const Routing<double>& routing, double aux_loss) {
    checker.reals("out.router_scores", routing.probabilities);
    checker.scalar("out.aux_loss", aux_loss);
  };
  check_deepseek(file, checker, in, kV2Names, selector, check, balance);
}

void check_deepseek_v3_moe(CaseFile& file, Checker& checker) {
  file.expect_activation("silu:");
  expect_text(file, "score_func", "sigmoid");
  expect_text(file, "correction_bias", "True");
  const MoeInputs in(file);
  SigmoidTopK<double> selector(in.experts, {.k = file.size("top_k"),
                                            .scale = file.number("route_scale"),
                                            .groups = read_groups(file, 2)});
  const Matrix<double> bias = file.matrix("w.gate.bias", {in.experts});
  selector.selection_bias().value = bias;
  const auto check = [&](const Routing<double>& routing, double) {
    const Matrix<double> scores = 1.0 / (1.0 + (-routing.logits.array()).exp());
    checker.reals("out.router_scores", scores);
    checker.reals("out.biased_scores", scores.rowwise() + bias.row(0));
    checker.reals("g.gate.bias", Matrix<double>::Zero(1, in.experts));  // It is a buffer.
  };
  check_deepseek(file, checker, in, kV3Names, selector, check);
}

}  // namespace weir::golden
