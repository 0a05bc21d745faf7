// SPDX-License-Identifier: MIT
// The MoE layer of gpt-oss as Hugging Face's transformers have it: a router with a bias, and
// experts that keep gate and up as the even and odd columns of one matrix, used untransposed.
#include <string>
#include <utility>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/around/replay.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"

namespace weir::golden {
namespace {

/// Every second column from `first` on of `rows` rows from row `begin` on, transposed.
Matrix<double> every_second(const Matrix<double>& from, Index begin, Index rows, Index first) {
  Matrix<double> columns(from.cols() / 2, rows);
  for (Index i = 0; i < columns.rows(); ++i) {
    columns.row(i) = from.col(2 * i + first).segment(begin, rows).transpose();
  }
  return columns;
}

ClampedGluBank<double> read_bank(CaseFile& file, const MoeInputs& in) {
  const Matrix<double> gate_up =
      file.matrix("w.experts.gate_up_proj", {in.experts, in.d_model, 2 * in.d_ff});
  const Matrix<double> gate_up_bias =
      file.matrix("w.experts.gate_up_proj_bias", {in.experts, 2 * in.d_ff});
  const Matrix<double> down = file.matrix("w.experts.down_proj", {in.experts, in.d_ff, in.d_model});
  const Matrix<double> down_bias =
      file.matrix("w.experts.down_proj_bias", {in.experts, in.d_model});
  ClampedGluWeights<double> weights;
  for (Index e = 0; e < in.experts; ++e) {
    weights.gate.push_back(every_second(gate_up, e * in.d_model, in.d_model, 0));
    weights.up.push_back(every_second(gate_up, e * in.d_model, in.d_model, 1));
    weights.gate_bias.emplace_back(every_second(gate_up_bias, e, 1, 0).transpose());
    weights.up_bias.emplace_back(every_second(gate_up_bias, e, 1, 1).transpose());
    weights.down.emplace_back(down.middleRows(e * in.d_ff, in.d_ff).transpose());
    weights.down_bias.emplace_back(down_bias.row(e));
  }
  return ClampedGluBank<double>(std::move(weights),
                                {.alpha = file.number("alpha"), .limit = file.number("limit")});
}

/// Puts `gate` and `up`, [d_ff, rows] each, into the even and odd columns of `rows` rows of `to`.
void interleave(const Matrix<double>& gate, const Matrix<double>& up, Index begin,
                Matrix<double>& to) {
  for (Index i = 0; i < gate.rows(); ++i) {
    to.col(2 * i).segment(begin, gate.cols()) = gate.row(i).transpose();
    to.col(2 * i + 1).segment(begin, up.cols()) = up.row(i).transpose();
  }
}

void check_gradients(Checker& checker, Gradients& gradients, const MoeInputs& in) {
  gradients.check(checker, "router.weight", "router.weight");
  gradients.check(checker, "router.bias", "router.bias");
  Matrix<double> gate_up(in.experts * in.d_model, 2 * in.d_ff);
  Matrix<double> gate_up_bias(in.experts, 2 * in.d_ff);
  Matrix<double> down(in.experts * in.d_ff, in.d_model);
  Matrix<double> down_bias(in.experts, in.d_model);
  for (Index e = 0; e < in.experts; ++e) {
    const std::string prefix = "experts." + std::to_string(e) + ".";
    interleave(gradients.take(prefix + "gate"), gradients.take(prefix + "up"), e * in.d_model,
               gate_up);
    interleave(gradients.take(prefix + "gate_bias").transpose(),
               gradients.take(prefix + "up_bias").transpose(), e, gate_up_bias);
    down.middleRows(e * in.d_ff, in.d_ff) = gradients.take(prefix + "down").transpose();
    down_bias.row(e) = gradients.take(prefix + "down_bias");
  }
  checker.reals("g.experts.gate_up_proj", gate_up);
  checker.reals("g.experts.gate_up_proj_bias", gate_up_bias);
  checker.reals("g.experts.down_proj", down);
  checker.reals("g.experts.down_proj_bias", down_bias);
  gradients.finish(checker);
}

}  // namespace

void check_gpt_oss(CaseFile& file, Checker& checker) {
  const MoeInputs in(file);
  Matrix<double> bias = file.matrix("w.router.bias", {in.experts});
  MoELayer moe(LinearRouter<double>(weight(file, "router.weight", in.experts, in.d_model), bias),
               Replay(TopKSoftmax<double>({.k = file.size("top_k")})), Dropless(),
               read_bank(file, in));
  settle_ties(checker, file, moe, in, logit_of);
  decltype(moe)::Cache cache;
  check_layer(checker, moe, in, cache);
  checker.reals("out.router_logits", cache.routing.logits);
  check_top_k(checker, file, cache.routing);
  checker.reals("out.combine_dense", dense_weights(cache.routing));
  Gradients gradients(moe);
  check_gradients(checker, gradients, in);
}

}  // namespace weir::golden
