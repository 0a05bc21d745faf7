// SPDX-License-Identifier: MIT
// The MoE layers of Mixtral, OLMoE and Qwen2-MoE as Hugging Face's transformers have them: they
// differ in the names of the weights, in whether weights are renormalised, and in the shared
// expert.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/routing_trace.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"
#include "support/routing.hpp"

namespace weir::golden {
namespace {

const std::string kSharedExpert = "shared_expert.";

struct GluNames {
  std::string gate, up, down;
};

const GluNames kProjections = {"gate_proj.weight", "up_proj.weight", "down_proj.weight"};

GluNames expert_names(const CaseFile& file) {
  if (file.has("w.experts.0.w1.weight")) return {"w1.weight", "w3.weight", "w2.weight"};
  return kProjections;
}

std::string expert_prefix(Index expert) {
  return "experts." + std::to_string(expert) + ".";
}

template <Activation Act>
GluBank<double, Act> read_bank(CaseFile& file, const MoeInputs& in) {
  const GluNames names = expert_names(file);
  std::vector<Matrix<double>> gate, up, down;
  for (Index e = 0; e < in.experts; ++e) {
    const std::string prefix = expert_prefix(e);
    gate.push_back(weight(file, prefix + names.gate, in.d_ff, in.d_model));
    up.push_back(weight(file, prefix + names.up, in.d_ff, in.d_model));
    down.push_back(weight(file, prefix + names.down, in.d_model, in.d_ff));
  }
  return {std::move(gate), std::move(up), std::move(down)};
}

/// The loss of `routing` without the tokens that in.attention_mask makes padding. They are routed
/// all the same.
template <class S>
double masked_loss(CaseFile& file, const MoeInputs& in, const Replay<S>& selector,
                   const SwitchLoss<double>& loss, const Routing<double>& routing) {
  std::vector<std::uint8_t> mask;
  for (const std::int64_t real : file.integers("in.attention_mask", {in.batch, in.seq})) {
    mask.push_back(real != 0 ? 1 : 0);
  }
  Replay<S> masked = selector;
  if (masked.imposing()) {  // On real tokens alone.
    List<Index> offsets = {0}, experts;
    for (Index t = 0; t < routing.tokens(); ++t) {
      for (const Index e : routing.experts_of(t)) {
        if (mask[static_cast<std::size_t>(t)] != 0) experts.push_back(e);
      }
      offsets.push_back(experts.count());
    }
    masked.impose(RoutingTrace(routing.experts(), std::move(offsets), std::move(experts)));
  }
  return test::loss_of(loss, test::route(masked, routing.logits, {.mask = mask}));
}

template <Activation Act, class S>
void check_with(CaseFile& file, Checker& checker, const S& selector) {
  const MoeInputs in(file);
  const SwitchLoss<double> balance(
      {.coefficient = file.number_or("aux_coef", 0.0), .fraction = LoadFraction::kOfTokens});
  MoELayer moe(LinearRouter<double>(weight(file, "gate.weight", in.experts, in.d_model)),
               Replay(selector), Dropless(), read_bank<Act>(file, in), balance);
  settle_ties(checker, file, moe, in, logit_of);
  const Replay<S> settled = moe.selector();
  const bool shared = file.has_config("shared_d_ff");

  const auto check = [&](auto& layer, auto& cache, const Routing<double>& routing) {
    check_layer(checker, layer, in, cache);
    check_routing(checker, file, routing);
    // The file has this loss unscaled.
    const SwitchLoss<double> unscaled({.coefficient = 1.0, .fraction = LoadFraction::kOfTokens});
    checker.scalar("out.aux_loss", test::loss_of(unscaled, routing));
    if (file.has("in.attention_mask")) {
      checker.scalar("out.aux_loss_masked", masked_loss(file, in, settled, unscaled, routing));
    }

    Gradients gradients(layer);
    gradients.check(checker, "router.weight", "gate.weight");
    const GluNames names = expert_names(file);
    for (Index e = 0; e < in.experts; ++e) {
      const std::string prefix = expert_prefix(e);
      gradients.check(checker, prefix + "gate", prefix + names.gate);
      gradients.check(checker, prefix + "up", prefix + names.up);
      gradients.check(checker, prefix + "down", prefix + names.down);
    }
    if (shared) {
      gradients.check(checker, "shared.gate", kSharedExpert + kProjections.gate);
      gradients.check(checker, "shared.up", kSharedExpert + kProjections.up);
      gradients.check(checker, "shared.down", kSharedExpert + kProjections.down);
      gradients.check(checker, "shared_gate.weight", "shared_expert_gate.weight");
    }
    gradients.finish(checker);
  };

  if (shared) {
    const Index d_ff = file.size("shared_d_ff");
    Glu<double, Act> expert(weight(file, kSharedExpert + kProjections.gate, d_ff, in.d_model),
                            weight(file, kSharedExpert + kProjections.up, d_ff, in.d_model),
                            weight(file, kSharedExpert + kProjections.down, in.d_model, d_ff));
    Linear<double> gate(weight(file, "shared_expert_gate.weight", 1, in.d_model));
    SharedExperts layer(std::move(moe), std::move(expert), std::move(gate));
    typename decltype(layer)::Cache cache;
    check(layer, cache, cache.moe.routing);
  } else {
    typename decltype(moe)::Cache cache;
    check(moe, cache, cache.routing);
  }
}

}  // namespace

void check_mixtral_block(CaseFile& file, Checker& checker) {
  const Index k = file.size("top_k");
  const bool renormalise = file.flag("norm_topk_prob");
  with_activation(file, "silu", [&]<Activation Act>() {
    if (!renormalise) return check_with<Act>(file, checker, SoftmaxTopK<double>({.k = k}));
    checker.section("TopKSoftmax");
    check_with<Act>(file, checker, TopKSoftmax<double>({.k = k}));
    checker.section("SoftmaxTopK, renormalised, which is the same");
    check_with<Act>(file, checker, SoftmaxTopK<double>({.k = k, .renormalise = true}));
  });
}

}  // namespace weir::golden
