// SPDX-License-Identifier: MIT
// The MoE layer of DBRX as Hugging Face's transformers have it.
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "golden/double_softmax_loss.hpp"
#include "golden/families.hpp"
#include "golden/moe_case.hpp"
#include "support/routing.hpp"

namespace weir::golden {
namespace {

const std::string kRouter = "router.layer.weight";
const std::string kGate = "experts.mlp.w1";
const std::string kUp = "experts.mlp.v1";
const std::string kDown = "experts.mlp.w2";

/// The experts' matrices out of one that has them all, expert after expert.
std::vector<Matrix<double>> split(const Matrix<double>& fused, Index experts) {
  std::vector<Matrix<double>> parts;
  const Index rows = fused.rows() / experts;
  for (Index e = 0; e < experts; ++e) parts.push_back(fused.middleRows(e * rows, rows));
  return parts;
}

/// The same for matrices that the file has transposed.
std::vector<Matrix<double>> split_transposed(const Matrix<double>& fused, Index experts) {
  std::vector<Matrix<double>> parts = split(fused, experts);
  for (Matrix<double>& part : parts) part.transposeInPlace();
  return parts;
}

/// The gradients of `member` of all experts, one below the other: [experts * d_ff, d_model].
Matrix<double> join(Gradients& gradients, const std::string& member, bool transposed,
                    const MoeInputs& in) {
  Matrix<double> fused(in.experts * in.d_ff, in.d_model);
  for (Index e = 0; e < in.experts; ++e) {
    Matrix<double> part = gradients.take("experts." + std::to_string(e) + "." + member);
    if (transposed) part.transposeInPlace();
    fused.middleRows(e * in.d_ff, in.d_ff) = part;
  }
  return fused;
}

/// DBRX divides by a norm of at least 1 of the chosen probabilities, or by none.
SoftmaxTopK<double> selector_of(CaseFile& file) {
  const double norm = file.number_or("moe_normalize_expert_weights", 0.0);
  return SoftmaxTopK<double>(
      {.k = file.size("top_k"), .renormalise = norm > 0.0, .norm = norm > 0.0 ? norm : 1.0});
}

template <Activation Act>
void check_with(CaseFile& file, Checker& checker) {
  const MoeInputs in(file);
  const Index rows = in.experts * in.d_ff;
  const SwitchLoss<double> balance(
      {.coefficient = file.number_or("aux_coef", 0.0), .fraction = LoadFraction::kOfTokens});
  MoELayer moe(
      LinearRouter<double>(weight(file, kRouter, in.experts, in.d_model)),
      Replay(selector_of(file)), Dropless(),
      GluBank<double, Act>(split(weight(file, kGate, rows, in.d_model), in.experts),
                           split(weight(file, kUp, rows, in.d_model), in.experts),
                           split_transposed(weight(file, kDown, rows, in.d_model), in.experts)),
      DoubleSoftmaxLoss(balance));

  settle_ties(checker, file, moe, in, logit_of);
  typename decltype(moe)::Cache cache;
  check_layer(checker, moe, in, cache);
  check_routing(checker, file, cache.routing);
  // The file has these losses unscaled.
  const SwitchLoss<double> unscaled({.coefficient = 1.0, .fraction = LoadFraction::kOfTokens});
  checker.scalar("out.aux_loss", test::loss_of(DoubleSoftmaxLoss(unscaled), cache.routing));
  checker.scalar("out.aux_loss_single_softmax", test::loss_of(unscaled, cache.routing));

  Gradients gradients(moe);
  gradients.check(checker, "router.weight", kRouter);
  checker.reals("g." + kGate, join(gradients, "gate", false, in));
  checker.reals("g." + kUp, join(gradients, "up", false, in));
  checker.reals("g." + kDown, join(gradients, "down", true, in));
  gradients.finish(checker);
}

}  // namespace

void check_dbrx_ffn(CaseFile& file, Checker& checker) {
  with_activation(file, "silu", [&]<Activation Act>() { check_with<Act>(file, checker); });
}

}  // namespace weir::golden
