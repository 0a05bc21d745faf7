// SPDX-License-Identifier: MIT
/// \file
/// What the cases of one MoE layer have in common.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/routing_trace.hpp>
#include <weir/ops/activation.hpp>

#include "golden/case_file.hpp"
#include "golden/checker.hpp"

namespace weir::golden {

/// The tensor `name`, or zeros if the file does not have it: out.loss is then that without this
/// part.
inline Matrix<double> matrix_or_zero(CaseFile& file, const std::string& name,
                                     const std::vector<Index>& shape) {
  if (file.has(name)) return file.matrix(name, shape);
  Index rows = 1;
  for (std::size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
  return Matrix<double>::Zero(rows, shape.back());
}

/// Calls `body.operator()<Act>()` with the activation that the file names.
/// \throws UnknownCase  if it is none of weir's.
template <class Body>
void with_activation(CaseFile& file, const std::string& otherwise, Body&& body) {
  const std::string name = file.activation(otherwise);
  if (name == "silu" || name == "swish") return body.template operator()<Silu>();
  if (name == "relu") return body.template operator()<Relu>();
  if (name == "gelu") return body.template operator()<Gelu>();
  if (name == "gelu_tanh" || name == "gelu_new" || name == "gelu_pytorch_tanh") {
    return body.template operator()<GeluTanh>();
  }
  throw_error<UnknownCase>(file.path(), ": cfg.activation = ", name,
                           ", expected silu, relu, gelu or gelu_tanh");
}

/// The tensors in.x and in.cotangent, [batch, seq, d_model] in the file, and the sizes.
struct MoeInputs {
  explicit MoeInputs(CaseFile& file)
      : batch(file.size("batch")),
        seq(file.size("seq")),
        d_model(file.size("d_model")),
        d_ff(file.size("d_ff")),
        experts(file.size("n_experts")),
        x(file.matrix("in.x", {batch, seq, d_model})),
        cotangent(matrix_or_zero(file, "in.cotangent", {batch, seq, d_model})),
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

/// Whether `theirs` are as good a choice as the experts of token t in `routing`: the scores of
/// those that one has and the other has not are equal.
template <class Score>
bool is_tied(const Routing<double>& routing, Index t, const std::vector<Index>& theirs,
             const Score& score) {
  const auto ours = routing.experts_of(t);
  const auto contains = [](const auto& list, Index e) {
    return std::find(list.begin(), list.end(), e) != list.end();
  };
  std::vector<double> of_ours, of_theirs;
  for (const Index e : ours) {
    if (!contains(theirs, e)) of_ours.push_back(score(t, e));
  }
  for (const Index e : theirs) {
    if (e < 0 || e >= routing.experts()) return false;
    if (!contains(ours, e)) of_theirs.push_back(score(t, e));
  }
  if (of_ours.size() != of_theirs.size()) return false;
  std::sort(of_ours.begin(), of_ours.end());
  std::sort(of_theirs.begin(), of_theirs.end());
  constexpr double kRounding = 1e-13;
  for (std::size_t i = 0; i < of_ours.size(); ++i) {
    const double difference = std::abs(of_ours[i] - of_theirs[i]);
    if (difference > kRounding * std::max(1.0, std::abs(of_ours[i]))) return false;
  }
  return true;
}

/// Which of several experts with equal scores a token gets is not defined. Where the choice
/// `prefix`topk_idx of the file, [tokens, k], differs from that of `routing` in nothing else, it is
/// imposed on the selector of `moe`, which has to be a Replay, so that all that follows from it can
/// be compared.
/// \param score    `score(t, e)` is what the selector chooses by.
template <class Moe, class Score>
void settle_ties(Checker& checker, CaseFile& file, Moe& moe, const Routing<double>& routing,
                 const Score& score, const std::string& name = "out.topk_idx") {
  if (!file.has(name) || routing.tokens() == 0) return;
  const std::vector<std::int64_t> choice = file.integers(name);
  const Index k = routing.assignments() / routing.tokens();
  if (static_cast<Index>(choice.size()) != routing.assignments()) return;
  List<Index> offsets = {0};
  List<Index> experts;
  bool differs = false;
  for (Index t = 0; t < routing.tokens(); ++t) {
    std::vector<Index> theirs(choice.begin() + t * k, choice.begin() + (t + 1) * k);
    experts.insert(experts.end(), theirs.begin(), theirs.end());
    std::vector<Index> ours(routing.experts_of(t).begin(), routing.experts_of(t).end());
    if (!is_tied(routing, t, theirs, score)) return;
    std::sort(theirs.begin(), theirs.end());
    std::sort(ours.begin(), ours.end());
    if (std::adjacent_find(theirs.begin(), theirs.end()) != theirs.end()) return;
    differs = differs || theirs != ours;
    offsets.push_back((t + 1) * k);
  }
  if (!differs) return;
  checker.section("with the file's choice among experts of equal scores");
  moe.selector().impose(RoutingTrace(routing.experts(), std::move(offsets), std::move(experts)));
}

/// The same, with the routing that `moe` makes of in.x by itself.
template <class Moe, class Score>
void settle_ties(Checker& checker, CaseFile& file, Moe& moe, const MoeInputs& in,
                 const Score& score, const std::string& name = "out.topk_idx") {
  typename Moe::Cache cache;
  moe.forward(in.x, in.pass(), cache);
  const auto of_expert = [&](Index t, Index e) { return score(cache.routing, t, e); };
  settle_ties(checker, file, moe, cache.routing, of_expert, name);
}

/// What selectors choose by whose scores rise with the logits.
inline double logit_of(const Routing<double>& routing, Index t, Index e) {
  return routing.logits(t, e);
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

/// Compares `name`, [tokens, k]: which experts were chosen, in the reference's order. Padding
/// is not looked at.
inline void check_choice(Checker& checker, CaseFile& file, const Routing<double>& routing,
                         const std::string& name, const Pass& pass = {}) {
  if (!file.has(name)) return;
  std::vector<std::int64_t> choice = file.integers(name);
  const Index k = static_cast<Index>(choice.size()) / std::max<Index>(1, routing.tokens());
  for (std::size_t i = 0; i < choice.size(); ++i) {
    const Index t = static_cast<Index>(i) / k;
    if (pass.is_padding(t)) continue;
    const auto begin = routing.expert.begin() + routing.first(t);
    const auto end = routing.expert.begin() + routing.last(t);
    if (std::find(begin, end, choice[i]) == end || end - begin != k) choice[i] = -1;
  }
  checker.integers(name, choice);
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
