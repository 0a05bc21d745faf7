// SPDX-License-Identifier: MIT
// The MoE layer of the Switch Transformer as Hugging Face's transformers had it until 2025: tokens
// beyond the capacity are passed on times the router's probability.
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"
#include "support/routing.hpp"

namespace weir::golden {
namespace {

const std::string kRouter = "router.classifier.weight";

std::string expert_weight(Index expert, const std::string& member) {
  return "experts.expert_" + std::to_string(expert) + "." + member + ".weight";
}

template <Activation Act>
MlpBank<double, Act> read_bank(CaseFile& file, const MoeInputs& in) {
  std::vector<Matrix<double>> wi, wo;
  for (Index e = 0; e < in.experts; ++e) {
    wi.push_back(weight(file, expert_weight(e, "wi"), in.d_ff, in.d_model));
    wo.push_back(weight(file, expert_weight(e, "wo"), in.d_model, in.d_ff));
  }
  return {std::move(wi), std::move(wo)};
}

/// The layer of the file with `bank`, which decides what becomes of dropped tokens.
template <class Bank>
auto read_layer(CaseFile& file, const MoeInputs& in, Bank bank) {
  return MoELayer(
      LinearRouter<double>(weight(file, kRouter, in.experts, in.d_model)),
      Replay(SoftmaxTopK<double>({.k = 1})),
      FixedCapacity({.capacity = file.size("expert_capacity"), .scope = Scope::kSequence}),
      std::move(bank),
      SwitchLoss<double>({.coefficient = file.number_or("aux_coef", 0.0),
                          .fraction = LoadFraction::kOfTokens,
                          .scope = Scope::kSequence}),
      ZLoss<double>({.coefficient = file.number_or("z_coef", 0.0)}));
}

/// The routing that this code's model takes its loss from: it looks for the expert in the mask
/// after the capacity, where a dropped token seems to have chosen expert 0.
Routing<double> as_seen_after_capacity(Routing<double> routing) {
  for (Index a = 0; a < routing.assignments(); ++a) {
    if (routing.kept[a] == 0) routing.expert[a] = 0;
  }
  return routing;
}

template <Activation Act>
void check_with(CaseFile& file, Checker& checker) {
  const MoeInputs in(file);
  auto layer = read_layer(file, in, PassDropped(read_bank<Act>(file, in)));
  settle_ties(checker, file, layer, in, logit_of, "out.argmax");
  typename decltype(layer)::Cache cache;
  const double aux_loss = check_layer(checker, layer, in, cache);
  auto dropping = read_layer(file, in, read_bank<Act>(file, in));
  dropping.selector() = layer.selector();
  checker.reals("out.y_dropped_zero", infer(dropping, in.x, in.pass()));

  const Routing<double>& routing = cache.routing;
  const Routing<double> seen = as_seen_after_capacity(routing);
  std::vector<std::int64_t> mask(static_cast<std::size_t>(routing.tokens() * in.experts), 0);
  for (Index t = 0; t < routing.tokens(); ++t) {
    const Index a = routing.first(t);
    mask[static_cast<std::size_t>(t * in.experts + routing.expert[a])] = routing.kept[a];
  }
  const LayerReport report = layer.report(cache);
  checker.reals("out.router_logits", routing.logits);
  checker.reals("out.router_probs", routing.probabilities);
  checker.integers("out.argmax", {routing.expert.begin(), routing.expert.end()});
  checker.reals("out.gate",
                Eigen::Map<const Matrix<double>>(routing.weight.data(), routing.tokens(), 1));
  checker.integers("out.expert_mask", mask);
  checker.integers("out.expert_index_after_capacity", {seen.expert.begin(), seen.expert.end()});
  checker.integers("out.tokens_per_expert_kept", {report.kept.begin(), report.kept.end()});
  checker.integers("out.tokens_per_expert_requested", {report.load.begin(), report.load.end()});

  // The file has the single losses unscaled, and their sum scaled.
  const SwitchLoss<double> balance(
      {.coefficient = 1.0, .fraction = LoadFraction::kOfTokens, .scope = Scope::kSequence});
  checker.scalar("out.aux_loss", aux_loss);
  checker.scalar("out.aux_loss_precap", test::loss_of(balance, routing));
  checker.scalar("out.aux_loss_hf", test::loss_of(balance, seen));
  checker.scalar("out.z_loss", test::loss_of(ZLoss<double>({.coefficient = 1.0}), routing));

  Gradients gradients(layer);
  gradients.check(checker, "router.weight", kRouter);
  for (Index e = 0; e < in.experts; ++e) {
    const std::string prefix = "experts." + std::to_string(e) + ".";
    gradients.check(checker, prefix + "in", expert_weight(e, "wi"));
    gradients.check(checker, prefix + "out", expert_weight(e, "wo"));
  }
  gradients.finish(checker);
}

}  // namespace

void check_switch_top1(CaseFile& file, Checker& checker) {
  with_activation(file, "relu", [&]<Activation Act>() { check_with<Act>(file, checker); });
}

}  // namespace weir::golden
