// SPDX-License-Identifier: MIT
/// \file
/// The gates of DeepSeek's own code, for Hugging Face (V2) and for inference (V3), in all their
/// settings.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include <weir/core/index_span.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/routing_trace.hpp>
#include <weir/moe/selector/group_limit.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/top_k.hpp>

#include "golden/case_file.hpp"

namespace weir::golden {

/// Settings of DeepSeekGate.
struct DeepSeekGateConfig {
  bool sigmoid = true;  ///< The scores; else a softmax.
  Index k = 1;
  bool renormalise = true;
  double scale = 1.0;
  GroupLimit groups = {};
  Matrix<double> bias = {};  ///< [1, experts], added to the scores for the choice; or empty.
};

/// SoftmaxTopK or SigmoidTopK, whichever the file asks for, and the one thing that neither has: a
/// bias on the probabilities of a softmax, in groups.
class DeepSeekGate : public SelectorBase<double> {
 public:
  DeepSeekGate(Index experts, DeepSeekGateConfig config) : config_(std::move(config)) {
    if (config_.sigmoid) {
      SigmoidTopK<double> selector(experts, {.k = config_.k,
                                             .renormalise = config_.renormalise,
                                             .scale = config_.scale,
                                             .groups = config_.groups});
      if (has_bias()) selector.selection_bias().value = config_.bias;
      inner_ = std::move(selector);
    } else {
      inner_ = SoftmaxTopK<double>({.k = config_.k,
                                    .renormalise = config_.renormalise,
                                    .scale = config_.scale,
                                    .groups = config_.groups});
    }
  }

  void check(Index experts) const {
    std::visit([&](const auto& selector) { selector.check(experts); }, inner_);
  }

  void forward(MatrixIn<double> logits, const Pass& pass, Routing<double>& routing,
               Cache& cache) const {
    if (!config_.sigmoid && has_bias()) {
      return forward_imposed(logits, pass, biased_choice(logits), routing, cache);
    }
    std::visit([&](const auto& selector) { selector.forward(logits, pass, routing, cache); },
               inner_);
  }

  void forward_imposed(MatrixIn<double> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<double>& routing, Cache& cache) const {
    std::visit(
        [&](const auto& selector) {
          selector.forward_imposed(logits, pass, imposed, routing, cache);
        },
        inner_);
  }

  void backward(const Routing<double>& routing, RoutingGradient<double>& gradient,
                Cache& cache) const {
    std::visit([&](const auto& selector) { selector.backward(routing, gradient, cache); }, inner_);
  }

  /// The scores before the bias, [tokens, experts].
  Matrix<double> scores(MatrixIn<double> logits) const {
    if (config_.sigmoid) return 1.0 / (1.0 + (-logits.array()).exp());
    return softmax<double>(logits);
  }

  /// Those that it chooses by.
  Matrix<double> biased_scores(MatrixIn<double> logits) const {
    Matrix<double> biased = scores(logits);
    if (has_bias()) biased.rowwise() += config_.bias.row(0);
    return biased;
  }

  bool has_bias() const { return config_.bias.size() > 0; }
  const DeepSeekGateConfig& config() const { return config_; }

 private:
  RoutingTrace biased_choice(MatrixIn<double> logits) const {
    const Matrix<double> score = biased_scores(logits);
    List<Index> offsets = {0}, experts(score.rows() * config_.k);
    for (Index t = 0; t < score.rows(); ++t) {
      const double* const candidates = config_.groups.candidates(&score(t, 0), score.cols());
      top_k<double>(span_of(candidates, score.cols()),
                    span_of(experts.data() + t * config_.k, config_.k));
      offsets.push_back((t + 1) * config_.k);
    }
    return RoutingTrace(score.cols(), std::move(offsets), std::move(experts));
  }

  DeepSeekGateConfig config_;
  std::variant<SoftmaxTopK<double>, SigmoidTopK<double>> inner_;
};

/// The groups of the file, or one; their score is the sum of the `summed` best in it.
inline GroupLimit read_groups(CaseFile& file, Index summed) {
  const Index count = file.size_or("n_group", 1);
  const Index allowed = file.size_or("topk_group", 1);
  if (allowed >= count) return {};
  return {.count = count, .allowed = allowed, .summed = summed};
}

/// The gate of DeepSeek-V3's inference code, whose bias, if it has one, is w.`prefix`gate.bias.
inline DeepSeekGate read_v3_gate(CaseFile& file, Index experts, const std::string& prefix) {
  const std::string bias = "w." + prefix + "gate.bias";
  const bool sigmoid = file.text_or("score_func", "sigmoid") == "sigmoid";
  DeepSeekGateConfig config{.sigmoid = sigmoid,
                            .k = file.size("top_k"),
                            .renormalise = sigmoid,
                            .scale = file.number_or("route_scale", 1.0)};
  if (file.has(bias)) config.bias = file.matrix(bias, {experts});
  config.groups = read_groups(file, file.has(bias) ? 2 : 1);
  return {experts, std::move(config)};
}

}  // namespace weir::golden
