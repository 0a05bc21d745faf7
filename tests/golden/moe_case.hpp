// SPDX-License-Identifier: MIT
/// \file
/// What the cases of one MoE layer have in common.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/routing.hpp>

#include "golden/case_file.hpp"
#include "golden/checker.hpp"

namespace weir::golden {

/// The tensors in.x and in.cotangent, [batch, seq, d_model] in the file, and the sizes.
struct MoeInputs {
  explicit MoeInputs(CaseFile& file)
      : batch(file.size("batch")),
        seq(file.size("seq")),
        d_model(file.size("d_model")),
        d_ff(file.size("d_ff")),
        experts(file.size("n_experts")),
        x(file.matrix("in.x", {batch, seq, d_model})),
        cotangent(file.matrix("in.cotangent", {batch, seq, d_model})),
        sequences(Sequences::uniform(batch, seq)) {}

  Pass pass() const { return {.training = true, .sequences = &sequences}; }

  Index batch, seq, d_model, d_ff, experts;
  Matrix<double> x, cotangent;  ///< [tokens, d_model]
  Sequences sequences;
};

/// The weight w.`name`, which has to be [rows, cols].
inline Matrix<double> weight(CaseFile& file, const std::string& name, Index rows, Index cols) {
  return file.matrix("w." + name, {rows, cols});
}

/// Runs `layer` forward and backward, and compares
///
///     out.y, g.x and out.loss = sum(y * cotangent) + the auxiliary losses of the layer
///
/// \return         The sum of the auxiliary losses.
template <Layer L>
double check_layer(Checker& checker, L& layer, const MoeInputs& in, typename L::Cache& cache) {
  PassRecord record;
  Pass pass = in.pass();
  pass.record = &record;
  const Matrix<double> y = layer.forward(in.x, pass, cache);
  checker.reals("out.y", y);
  checker.scalar("out.loss", y.cwiseProduct(in.cotangent).sum() + record.aux_loss());
  checker.reals("g.x", layer.backward(in.cotangent, cache));
  return record.aux_loss();
}

/// The weight of each expert for each token, [tokens, experts]; zero where it is not chosen, or
/// dropped.
inline Matrix<double> dense_weights(const Routing<double>& routing) {
  Matrix<double> dense = Matrix<double>::Zero(routing.tokens(), routing.experts());
  for (Index t = 0; t < routing.tokens(); ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] != 0) dense(t, routing.expert[a]) = routing.weight[a];
    }
  }
  return dense;
}

/// Compares `prefix`topk_idx and `prefix`topk_weight, [tokens, k] each. The order within a token is
/// the reference's own affair: weir's choice is put into it first.
inline void check_top_k(Checker& checker, CaseFile& file, const Routing<double>& routing,
                        const std::string& prefix = "out.") {
  const std::string idx = prefix + "topk_idx";
  const std::string weight_name = prefix + "topk_weight";
  constexpr std::int64_t kNotChosen = -1;
  std::vector<std::int64_t> order;
  if (file.has(idx)) order = file.integers(idx);
  const Index tokens = routing.tokens();
  const Index k = tokens > 0 ? routing.assignments() / tokens : 0;
  if (static_cast<Index>(order.size()) != routing.assignments()) {
    checker.integers(idx, {routing.expert.begin(), routing.expert.end()});
    checker.reals(weight_name, Eigen::Map<const Matrix<double>>(routing.weight.data(), tokens, k));
    return;
  }
  std::vector<std::int64_t> expert(order.size(), kNotChosen);
  Matrix<double> weights =
      Matrix<double>::Constant(tokens, k, std::numeric_limits<double>::quiet_NaN());
  for (Index t = 0; t < tokens; ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      for (Index r = 0; r < k; ++r) {
        const auto theirs = static_cast<std::size_t>(t * k + r);
        if (order[theirs] != routing.expert[a] || expert[theirs] != kNotChosen) continue;
        expert[theirs] = routing.expert[a];
        weights(t, r) = routing.weight[a];
        break;
      }
    }
  }
  checker.integers(idx, expert);
  checker.reals(weight_name, weights);
}

/// Compares what a top-k router without capacity decided: out.router_logits, router_probs,
/// topk_idx, topk_weight, combine_dense and tokens_per_expert.
inline void check_routing(Checker& checker, CaseFile& file, const Routing<double>& routing) {
  checker.reals("out.router_logits", routing.logits);
  checker.reals("out.router_probs", routing.probabilities);
  check_top_k(checker, file, routing);
  checker.reals("out.combine_dense", dense_weights(routing));
  const LayerReport report = report_of(routing);
  checker.integers("out.tokens_per_expert", {report.load.begin(), report.load.end()});
}

}  // namespace weir::golden
