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
#include "support/routing.hpp"

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

template <class S>
void check_scores(CaseFile& file, Checker& checker, const S& selector, const std::string& name) {
  const Index batch = file.size("batch");
  const Index seq = file.size("seq");
  const Sequences sequences = Sequences::uniform(batch, seq);
  const Pass pass{.training = true, .sequences = &sequences};
  const Matrix<double> logits = transposed(file.matrix("in.logits"), seq, batch);
  const Routing<double> routing = test::route(selector, logits, pass);
  Matrix<double> map = Matrix<double>::Zero(routing.tokens(), routing.experts());
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      map(t, routing.expert[a]) = 1.0;
    }
  }
  map = transposed(map, batch, seq);
  std::vector<std::int64_t> chosen;
  for (Index i = 0; i < map.size(); ++i) chosen.push_back(map.data()[i] != 0.0 ? 1 : 0);
  const LayerReport report = report_of(routing);
  checker.reals("out." + name + ".scores", transposed(routing.probabilities, batch, seq));
  checker.integers("out." + name + ".routing_map", chosen);
  checker.integers("out." + name + ".tokens_per_expert", {report.load.begin(), report.load.end()});

  const auto check_loss = [&](const std::string& kind, Scope scope) {
    const SwitchLoss<double> loss({.coefficient = file.number_or("aux_coef", 0.0), .scope = scope});
    checker.scalar("out." + name + "." + kind + "_loss", test::loss_of(loss, routing));
    checker.reals("g_" + name + "_" + kind + ".logits",
                  transposed(test::logit_gradient(selector, loss, logits, pass), batch, seq));
  };
  check_loss("aux", Scope::kBatch);
  check_loss("seq_aux", Scope::kSequence);
}

}  // namespace

void check_megatron_losses(CaseFile& file, Checker& checker) {
  const Index k = file.size("top_k");
  const SoftmaxTopK<double> softmax({.k = k});
  check_scores(file, checker, softmax, "softmax");
  check_scores(file, checker, SigmoidTopK<double>(file.size("n_experts"), {.k = k}), "sigmoid");
  check_scores(
      file, checker,
      SigmoidTopK<double>(file.size("n_experts"), {.k = k, .score = ScoreFunction::kSqrtSoftplus}),
      "sqrtsoftplus");

  const ZLoss<double> z_loss({.coefficient = file.number_or("z_coef", 0.0)});
  const Matrix<double> logits = file.matrix("in.logits");
  checker.scalar("out.z_loss", test::loss_of(z_loss, test::route(softmax, logits)));
  checker.reals("g_z.logits", test::logit_gradient(softmax, z_loss, logits, kTraining));

  if (!file.has("in.padding_mask")) return;
  std::vector<std::uint8_t> mask;  // In the file, 1 is padding.
  for (const std::int64_t padding : file.integers("in.padding_mask", {logits.rows()})) {
    mask.push_back(padding != 0 ? 0 : 1);
  }
  const Routing<double> padded = test::route(softmax, logits, {.mask = mask});
  checker.scalar("out.z_loss_padded", test::loss_of(z_loss, padded));
}

}  // namespace weir::golden
