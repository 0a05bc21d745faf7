// SPDX-License-Identifier: MIT
// An expert-choice layer. The reference multiplies what goes into an expert by the score (out.y,
// g.*), the paper what comes out of it (out.y_paper, gp.*); the routing is the same.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/input_weighted.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/expert_choice.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"

namespace weir::golden {
namespace {

/// ExpertChoice by the sigmoid of each logit, which has no softmax to share a token's weight.
class SigmoidExpertChoice : public SelectorBase<double> {
 public:
  using Cache = ExpertChoice<double>::Cache;

  /// \param config  Its scores over the tokens have the order of the logits.
  explicit SigmoidExpertChoice(ExpertChoiceConfig config) : inner_(over_tokens(config)) {}

  void check(Index experts) const { inner_.check(experts); }

  void forward(MatrixIn<double> logits, const Pass& pass, Routing<double>& routing,
               Cache& cache) const {
    inner_.forward(logits, pass, routing, cache);
    routing.probabilities = 1.0 / (1.0 + (-routing.logits.array()).exp());
    for_each(routing, [&](Index t, Index a) {
      routing.weight[a] = routing.probabilities(t, routing.expert[a]);
    });
  }

  void backward(const Routing<double>& routing, RoutingGradient<double>& gradient,
                Cache& /*cache*/) const {
    for_each(routing, [&](Index t, Index a) {
      const double s = routing.weight[a];
      gradient.logits(t, routing.expert[a]) += gradient.weights[a] * s * (1.0 - s);
    });
  }

 private:
  static ExpertChoiceConfig over_tokens(ExpertChoiceConfig config) {
    config.over = ScoresOver::kTokens;
    return config;
  }

  template <class Body>
  static void for_each(const Routing<double>& routing, Body&& body) {
    for (Index t = 0; t < routing.tokens(); ++t) {
      for (Index a = routing.first(t); a < routing.last(t); ++a) body(t, a);
    }
  }

  ExpertChoice<double> inner_;
};

const std::string kRouter = "router.gate.weight";
const std::string kMembers[] = {"gate", "up", "down"};

/// The experts' matrices out of a tensor [experts, in, out], each [out, in].
std::vector<Matrix<double>> read_experts(CaseFile& file, const std::string& name, Index experts,
                                         Index d_in, Index d_out) {
  const Matrix<double> all = file.matrix("w.experts." + name, {experts, d_in, d_out});
  std::vector<Matrix<double>> parts;
  for (Index e = 0; e < experts; ++e) {
    parts.push_back(all.middleRows(e * d_in, d_in).transpose());
  }
  return parts;
}

/// The gradients of one member of all experts, one below the other, as the file has them.
Matrix<double> join(const std::vector<Matrix<double>>& parts) {
  const Index rows = parts[0].cols();
  Matrix<double> all(static_cast<Index>(parts.size()) * rows, parts[0].rows());
  for (std::size_t e = 0; e < parts.size(); ++e) {
    all.middleRows(static_cast<Index>(e) * rows, rows) = parts[e].transpose();
  }
  return all;
}

void check_decision(Checker& checker, CaseFile& file, const Routing<double>& routing) {
  checker.reals("out.router_logits", routing.logits);
  checker.reals("out.scores", routing.probabilities);
  std::vector<std::int64_t> serving;
  for (Index t = 0; t < routing.tokens(); ++t) {
    serving.push_back(routing.last(t) - routing.first(t));
  }
  checker.integers("out.experts_per_token", serving);

  // The file has the tokens of each expert by score, the largest first.
  const Matrix<double> weights = dense_weights(routing);
  const Index count = file.size_or("tokens_per_expert", routing.assignments() / routing.experts());
  std::vector<std::int64_t> tokens;
  Matrix<double> scores = Matrix<double>::Zero(routing.experts(), count);
  for (Index e = 0; e < routing.experts(); ++e) {
    std::vector<Index> taken;
    for (Index t = 0; t < routing.tokens(); ++t) {
      if (weights(t, e) > 0.0) taken.push_back(t);
    }
    std::stable_sort(taken.begin(), taken.end(),
                     [&](Index a, Index b) { return weights(a, e) > weights(b, e); });
    for (std::size_t i = 0; i < taken.size(); ++i) {
      tokens.push_back(taken[i]);
      if (static_cast<Index>(i) < count) scores(e, static_cast<Index>(i)) = weights(taken[i], e);
    }
  }
  checker.integers("out.token_idx", tokens);
  checker.reals("out.token_score", scores);
}

/// Compares what `layer` decides, its result, and its gradients, which the file has under names
/// that end in `suffix` or begin with `prefix`.
template <class Moe>
void check_layer_of(Checker& checker, CaseFile& file, const MoeInputs& in, Moe& layer,
                    const std::string& suffix, const std::string& prefix) {
  typename Moe::Cache cache;
  const Matrix<double> y = layer.forward(in.x, in.pass(), cache);
  check_decision(checker, file, cache.routing);
  checker.reals("out.y" + suffix, y);
  checker.scalar("out.loss" + suffix, y.cwiseProduct(in.cotangent).sum());
  checker.reals(prefix + "x", layer.backward(in.cotangent, cache));
  Gradients gradients(layer);
  checker.reals(prefix + kRouter, gradients.take("router.weight"));
  for (const std::string& member : kMembers) {
    std::vector<Matrix<double>> parts;
    for (Index e = 0; e < in.experts; ++e) {
      parts.push_back(gradients.take("experts." + std::to_string(e) + "." + member));
    }
    checker.reals(prefix + "experts." + member + "_proj", join(parts));
  }
  gradients.finish(checker);
}

template <class S>
void check_with(CaseFile& file, Checker& checker, const MoeInputs& in, const S& selector) {
  const auto gate = read_experts(file, "gate_proj", in.experts, in.d_model, in.d_ff);
  const auto up = read_experts(file, "up_proj", in.experts, in.d_model, in.d_ff);
  const auto down = read_experts(file, "down_proj", in.experts, in.d_ff, in.d_model);
  const LinearRouter<double> router(weight(file, kRouter, in.experts, in.d_model));
  const GluBank<double> bank(gate, up, down);

  checker.section("the paper: outputs are weighted");
  MoELayer of_paper(router, selector, Dropless(), bank);
  check_layer_of(checker, file, in, of_paper, "_paper", "gp.");
  checker.section("the reference: inputs are weighted");
  MoELayer of_reference(router, selector, Dropless(), InputWeighted(bank));
  check_layer_of(checker, file, in, of_reference, "", "g.");
}

}  // namespace

void check_expert_choice(CaseFile& file, Checker& checker) {
  const MoeInputs in(file);
  ExpertChoiceConfig config{
      .factor = file.number("capacity_factor"), .rounding = Rounding::kDown, .multiple = 8};
  const std::string score = file.text_or("score", "softmax over experts");
  if (score.starts_with("sigmoid")) {
    return check_with(file, checker, in, SigmoidExpertChoice(config));
  }
  if (score == "softmax over tokens") config.over = ScoresOver::kTokens;
  if (config.over == ScoresOver::kExperts && score != "softmax over experts") {
    throw_error<UnknownCase>(file.path(), ": cfg.score = ", score, ", expected sigmoid, softmax ",
                             "over experts or softmax over tokens");
  }
  check_with(file, checker, in, ExpertChoice<double>(config));
}

}  // namespace weir::golden
