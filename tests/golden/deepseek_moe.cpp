// SPDX-License-Identifier: MIT
// The MoE layers of DeepSeek-V2, as its remote code for Hugging Face has it, and of DeepSeek-V3, as
// DeepSeek's own inference code has it: group-limited routing beside shared experts.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/nn/glu.hpp>

#include "golden/deepseek_gate.hpp"
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

template <Activation Act>
GluBank<double, Act> read_bank(CaseFile& file, const MoeInputs& in, const GluNames& names) {
  std::vector<Matrix<double>> gate, up, down;
  for (Index e = 0; e < in.experts; ++e) {
    const std::string prefix = expert_prefix(e);
    gate.push_back(weight(file, prefix + names.gate, in.d_ff, in.d_model));
    up.push_back(weight(file, prefix + names.up, in.d_ff, in.d_model));
    down.push_back(weight(file, prefix + names.down, in.d_model, in.d_ff));
  }
  return {std::move(gate), std::move(up), std::move(down)};
}

/// A SwitchLoss that averages the gate's scores as they are: sigmoids are not divided by their sum.
class ScoreLoss : public BalancerBase {
 public:
  struct Cache {
    SwitchLoss<double>::Cache inner;
    Routing<double> scored;
  };

  ScoreLoss(const SwitchLoss<double>& balance, const DeepSeekGate& gate)
      : balance_(balance), gate_(gate) {}

  double forward(const Routing<double>& routing, Cache& cache) const {
    cache.scored = routing;
    cache.scored.probabilities = gate_.scores(routing.logits);
    return balance_.forward(cache.scored, cache.inner);
  }

  void backward(const Routing<double>& /*routing*/, double scale, RoutingGradient<double>& gradient,
                Cache& cache) const {
    RoutingGradient<double> inner;
    inner.reset(cache.scored);
    balance_.backward(cache.scored, scale, inner, cache.inner);
    if (!gate_.config().sigmoid) {
      gradient.probabilities += inner.probabilities;
      return;
    }
    const auto s = cache.scored.probabilities.array();
    gradient.logits.array() += inner.probabilities.array() * s * (1.0 - s);
  }

 private:
  SwitchLoss<double> balance_;
  DeepSeekGate gate_;
};

/// All but the routing's details, which `check_routing_of` compares.
/// \param balance  Of the mixture; its coefficient may be zero.
template <Activation Act, class Check>
void check_deepseek(CaseFile& file, Checker& checker, const MoeInputs& in, const GluNames& names,
                    const DeepSeekGate& gate, const SwitchLoss<double>& balance,
                    Check&& check_routing_of) {
  MoELayer moe(LinearRouter<double>(weight(file, "gate.weight", in.experts, in.d_model)),
               Replay(gate), Dropless(), read_bank<Act>(file, in, names), ScoreLoss(balance, gate));
  settle_ties(checker, file, moe, in, [&](const Routing<double>& routing, Index t, Index e) {
    return gate.biased_scores(routing.logits.row(t))(0, e);
  });

  const auto check = [&](auto& layer, auto& cache, const Routing<double>& routing, bool shared) {
    const double aux_loss = check_layer(checker, layer, in, cache);
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
    if (shared) {
      gradients.check(checker, "shared.gate", kShared + names.gate);
      gradients.check(checker, "shared.up", kShared + names.up);
      gradients.check(checker, "shared.down", kShared + names.down);
    }
    gradients.finish(checker);
  };

  const std::string count = file.text_or("n_shared_experts", "0");
  if (count == "0") {  // None, as the code has it for n_shared_experts = None.
    typename decltype(moe)::Cache cache;
    return check(moe, cache, cache.routing, false);
  }
  const Index d_ff = file.size("n_shared_experts") * in.d_ff;
  if (file.size_or("shared_d_ff", d_ff) != d_ff) {
    checker.failure("cfg.shared_d_ff", "is not that of the shared experts together");
  }
  Glu<double, Act> shared(weight(file, kShared + names.gate, d_ff, in.d_model),
                          weight(file, kShared + names.up, d_ff, in.d_model),
                          weight(file, kShared + names.down, in.d_model, d_ff));
  SharedExperts layer(std::move(moe), std::move(shared));
  typename decltype(layer)::Cache cache;
  check(layer, cache, cache.moe.routing, true);
}

/// What the file says of a setting, which has to be one of these.
std::string one_of(CaseFile& file, const std::string& key, const std::vector<std::string>& known) {
  const std::string value = file.text_or(key, known.front());
  if (std::find(known.begin(), known.end(), value) != known.end()) return value;
  std::string names;
  for (const std::string& name : known) names += (names.empty() ? "" : ", ") + name;
  throw_error<UnknownCase>(file.path(), ": cfg.", key, " = ", value, ", expected one of ", names);
}

/// The gate of DeepSeek-V2's code. Renormalised weights are not scaled there, and one expert's
/// weight is not renormalised. "noaux_tc" is what the code for V3 added.
DeepSeekGate read_v2_gate(CaseFile& file, const MoeInputs& in) {
  const std::string method =
      one_of(file, "topk_method", {"greedy", "group_limited_greedy", "noaux_tc"});
  const bool sigmoid = one_of(file, "scoring_func", {"softmax", "sigmoid"}) == "sigmoid";
  const Index k = file.size("top_k");
  const double scale = file.number_or("routed_scaling_factor", 1.0);
  const bool renormalise = k > 1 && file.flag_or("norm_topk_prob", false);
  DeepSeekGateConfig config{.sigmoid = sigmoid,
                            .k = k,
                            .renormalise = renormalise,
                            .scale = renormalise && method != "noaux_tc" ? 1.0 : scale};
  const std::string bias = "w.gate.e_score_correction_bias";
  if (method == "noaux_tc" && file.has(bias)) config.bias = file.matrix(bias, {in.experts});
  if (method != "greedy") config.groups = read_groups(file, method == "noaux_tc" ? 2 : 1);
  return {in.experts, std::move(config)};
}

}  // namespace

void check_deepseek_v2_moe(CaseFile& file, Checker& checker) {
  const MoeInputs in(file);
  // Groups that are not allowed have the score 0 there, below every probability.
  const DeepSeekGate gate = read_v2_gate(file, in);
  const bool by_sequence = file.flag_or("seq_aux", true);
  // There is no loss outside of training.
  const double alpha = file.number_or("aux_loss_alpha", 0.0);
  const SwitchLoss<double> balance({.coefficient = file.training() ? alpha : 0.0,
                                    .scope = by_sequence ? Scope::kSequence : Scope::kBatch});
  const auto check = [&](const Routing<double>& routing, double aux_loss) {
    checker.reals("out.router_scores", gate.scores(routing.logits));
    checker.scalar("out.aux_loss", aux_loss);
    if (gate.has_bias()) {
      checker.reals("g.gate.e_score_correction_bias", Matrix<double>::Zero(1, in.experts));
    }
  };
  with_activation(file, "silu", [&]<Activation Act>() {
    check_deepseek<Act>(file, checker, in, kV2Names, gate, balance, check);
  });
}

void check_deepseek_v3_moe(CaseFile& file, Checker& checker) {
  one_of(file, "score_func", {"sigmoid", "softmax"});
  const MoeInputs in(file);
  const DeepSeekGate gate = read_v3_gate(file, in.experts, "");
  if (file.flag_or("correction_bias", gate.has_bias()) != gate.has_bias()) {
    checker.failure("cfg.correction_bias", "contradicts the weights");
  }
  const auto check = [&](const Routing<double>& routing, double) {
    checker.reals("out.router_scores", gate.scores(routing.logits));
    checker.reals("out.biased_scores", gate.biased_scores(routing.logits));
    checker.reals("g.gate.bias", Matrix<double>::Zero(1, in.experts));  // It is a buffer.
  };
  with_activation(file, "silu", [&]<Activation Act>() {
    check_deepseek<Act>(file, checker, in, kV3Names, gate, SwitchLoss<double>({.coefficient = 0.0}),
                        check);
  });
}

}  // namespace weir::golden
