// SPDX-License-Identifier: MIT
// The auxiliary losses of Megatron-Core, each by itself, and their gradients.
#include <cstdint>
#include <string>
#include <vector>

#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "golden/megatron.hpp"

namespace weir::golden {
namespace {

/// Token s * batch + b of the file, as token b * seq + s; or the other way about.
Matrix<double> transposed(const Matrix<double>& rows, Index outer, Index inner) {
  Matrix<double> result(rows.rows(), rows.cols());
  for (Index i = 0; i < outer; ++i) {
    for (Index j = 0; j < inner; ++j) result.row(j * outer + i) = rows.row(i * inner + j);
  }
  return result;
}

template <class S, class Loss>
Matrix<double> logit_gradient(const S& selector, const Loss& loss, const Routing<double>& routing) {
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  loss.add_gradient(routing, gradient);
  selector.backward(routing, gradient);
  return gradient.logits;
}

template <class S>
void check_scores(CaseFile& file, Checker& checker, const S& selector, const std::string& name) {
  const Index batch = file.size("batch");
  const Index seq = file.size("seq");
  const Sequences sequences = Sequences::uniform(batch, seq);
  Routing<double> routing;
  selector.select(transposed(file.matrix("in.logits"), seq, batch), {.sequences = &sequences},
                  routing);
  Matrix<double> map = Matrix<double>::Zero(routing.tokens(), routing.experts());
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      map(t, routing.expert[static_cast<std::size_t>(a)]) = 1.0;
    }
  }
  map = transposed(map, batch, seq);
  std::vector<std::int64_t> chosen;
  for (Index i = 0; i < map.size(); ++i) chosen.push_back(map.data()[i] != 0.0 ? 1 : 0);
  const MoEReport report = report_of(routing);
  checker.reals("out." + name + ".scores", transposed(routing.probabilities, batch, seq));
  checker.integers("out." + name + ".routing_map", chosen);
  checker.integers("out." + name + ".tokens_per_expert", {report.load.begin(), report.load.end()});

  const auto check_loss = [&](const std::string& kind, Scope scope) {
    const SwitchLoss<double> loss{file.number("aux_coef"), LoadFraction::kOfAssignments, scope};
    checker.scalar("out." + name + "." + kind + "_loss", loss.loss(routing));
    checker.reals("g_" + name + "_" + kind + ".logits",
                  transposed(logit_gradient(selector, loss, routing), batch, seq));
  };
  check_loss("aux", Scope::kBatch);
  check_loss("seq_aux", Scope::kSequence);
}

}  // namespace

void check_megatron_losses(CaseFile& file, Checker& checker) {
  const Index k = file.size("top_k");
  const SoftmaxTopK<double> softmax{.k = k};
  check_scores(file, checker, softmax, "softmax");
  check_scores(file, checker, SigmoidTopK<double>(file.size("n_experts"), {.k = k}), "sigmoid");
  check_scores(
      file, checker,
      SigmoidTopK<double>(file.size("n_experts"), {.k = k, .score = ScoreFunction::kSqrtSoftplus}),
      "sqrtsoftplus");

  const ZLoss<double> z_loss{file.number("z_coef")};
  const Matrix<double> logits = file.matrix("in.logits");
  Routing<double> routing;
  softmax.select(logits, {}, routing);
  checker.scalar("out.z_loss", z_loss.loss(routing));
  checker.reals("g_z.logits", logit_gradient(softmax, z_loss, routing));

  std::vector<std::uint8_t> mask;  // In the file, 1 is padding.
  for (const std::int64_t padding : file.integers("in.padding_mask", {logits.rows()})) {
    mask.push_back(padding != 0 ? 0 : 1);
  }
  Routing<double> padded;
  softmax.select(logits, {.mask = mask}, padded);
  checker.scalar("out.z_loss_padded", z_loss.loss(padded));
}

}  // namespace weir::golden
