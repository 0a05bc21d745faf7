// SPDX-License-Identifier: MIT
// Functions of Megatron-Core: here, its choice of experts and their weights.
#include "golden/megatron.hpp"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "golden/moe_case.hpp"

namespace weir::golden {
namespace {

/// Compares one variant: weights and choice, [tokens, experts], and the gradient of
/// sum(weights * in.cotangent) with respect to the logits.
template <class S>
void check_variant(CaseFile& file, Checker& checker, const std::string& name, const S& selector,
                   const Matrix<double>& logits, const Matrix<double>& cotangent) {
  const bool named = file.has("out." + name + ".probs") || file.has("out." + name + ".map") ||
                     file.has("g_" + name + ".logits");
  if (!named) return;  // Its settings may not be sound then.
  Routing<double> routing;
  typename S::Cache cache;
  selector.forward(logits, kTraining, routing, cache);
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  std::vector<std::int64_t> map(static_cast<std::size_t>(logits.size()), 0);
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      const Index expert = routing.expert[a];
      map[static_cast<std::size_t>(t * routing.experts() + expert)] = 1;
      gradient.weights[a] = cotangent(t, expert);
    }
  }
  selector.backward(routing, gradient, cache);
  checker.reals("out." + name + ".probs", dense_weights(routing));
  checker.integers("out." + name + ".map", map);
  checker.reals("g_" + name + ".logits", gradient.logits);
}

void check_routing_functions(CaseFile& file, Checker& checker) {
  const Index tokens = file.size("n_tokens");
  const Index experts = file.size("n_experts");
  const Index k = file.size("top_k");
  const double scale = file.number_or("scaling_factor", 1.0);
  const Index allowed = file.size_or("group_topk", 1);
  const GroupLimit groups = {.count = file.size_or("num_groups", 1),
                             .allowed = allowed,
                             .summed = std::max<Index>(1, k / allowed)};
  const bool several = k > 1;  // The score of a single expert is its weight as it is.
  const Matrix<double> logits = file.matrix("in.logits", {tokens, experts});
  const Matrix<double> cotangent = matrix_or_zero(file, "in.cotangent", {tokens, experts});
  const Matrix<double> bias = matrix_or_zero(file, "in.expert_bias", {experts});
  const auto check = [&](const std::string& name, const auto& selector) {
    check_variant(file, checker, name, selector, logits, cotangent);
  };
  const auto biased = [&](SigmoidTopKConfig config) {
    config.renormalise = several;
    SigmoidTopK<double> selector(experts, config);
    selector.selection_bias().value = bias;
    return selector;
  };

  check("post_softmax", TopKSoftmax<double>({.k = k}));
  check("pre_softmax", SoftmaxTopK<double>({.k = k}));
  check("pre_softmax_scaled", SoftmaxTopK<double>({.k = k, .scale = scale}));
  check("sigmoid", SigmoidTopK<double>(experts, {.k = k, .renormalise = several}));
  check("sigmoid_bias_scaled", biased({.k = k, .scale = scale}));
  check("sqrtsoftplus_bias", biased({.k = k, .score = ScoreFunction::kSqrtSoftplus}));
  check("group_post_softmax", TopKSoftmax<double>({.k = k, .groups = groups}));
  check("group_pre_softmax_scaled",
        SoftmaxTopK<double>({.k = k, .scale = scale, .groups = groups}));
  check("group_sigmoid_bias_scaled", biased({.k = k, .scale = scale, .groups = groups}));
}

}  // namespace

void check_megatron(CaseFile& file, Checker& checker) {
  // What a file is about shows in what it has, whatever its name.
  if (file.has_config("batch") && file.has_config("seq")) {
    return check_megatron_losses(file, checker);
  }
  if (is_megatron_dropping(file)) return check_megatron_dropping(file, checker);
  check_routing_functions(file, checker);
}

}  // namespace weir::golden
