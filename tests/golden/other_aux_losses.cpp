// SPDX-License-Identifier: MIT
// The auxiliary losses of Tutel (gshard_loss, load_importance_loss) and of MegaBlocks
// (batched_load_balancing_loss).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <numeric>
#include <vector>

#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "golden/families.hpp"

namespace weir::golden {
namespace {

/// Tutel's load_importance_loss, which is not that of Shazeer et al. 2017: its importance is made
/// of all probabilities and not of the weights of the chosen experts, and its load compares
/// probabilities without noise with the k-th best of what the caller gives, for every expert; the
/// paper compares logits, and takes the next one for an expert that is itself among the best.
struct TutelLoadImportance {
  Matrix<double> noisy_scores;  ///< [tokens, experts], whose k-th best is the threshold.
  Index k;
  double deviation;  ///< Of the noise.

  double loss(const Routing<double>& routing) const {
    const RowVector<double> importance = routing.probabilities.colwise().sum();
    const RowVector<double> load =
        margins(routing)
            .unaryExpr([](double z) { return std::erfc(-z / std::numbers::sqrt2) / 2.0; })
            .colwise()
            .sum();
    return (squared_variation<double>(importance, Variance::kSample) +
            squared_variation<double>(load, Variance::kSample)) /
           2.0;
  }

  void add_gradient(const Routing<double>& routing, RoutingGradient<double>& gradient) const {
    const Matrix<double> z = margins(routing);
    const Matrix<double> density = z.unaryExpr([](double x) {
      return std::exp(-x * x / 2.0) * std::numbers::inv_sqrtpi / std::numbers::sqrt2;
    });
    const RowVector<double> importance = routing.probabilities.colwise().sum();
    const RowVector<double> load =
        z.unaryExpr([](double x) { return std::erfc(-x / std::numbers::sqrt2) / 2.0; })
            .colwise()
            .sum();
    RowVector<double> d_importance, d_load;
    squared_variation<double>(importance, Variance::kSample, &d_importance);
    squared_variation<double>(load, Variance::kSample, &d_load);
    for (Index t = 0; t < z.rows(); ++t) {
      // The noise is constant, the threshold is not: it moves with the probability it was made of.
      const RowVector<double> d_margin = density.row(t).cwiseProduct(d_load) / (2.0 * deviation);
      gradient.probabilities.row(t) += d_importance / 2.0 + d_margin;
      gradient.probabilities(t, threshold(t)) -= d_margin.sum();
    }
  }

 private:
  /// The expert whose noisy probability is the threshold of token t.
  Index threshold(Index t) const {
    std::vector<Index> order(static_cast<std::size_t>(noisy_scores.cols()));
    std::iota(order.begin(), order.end(), Index(0));
    std::sort(order.begin(), order.end(),
              [&](Index a, Index b) { return noisy_scores(t, a) > noisy_scores(t, b); });
    return order[static_cast<std::size_t>(k - 1)];
  }

  /// By how many deviations each probability is above the threshold.
  Matrix<double> margins(const Routing<double>& routing) const {
    Matrix<double> z = routing.probabilities;
    for (Index t = 0; t < z.rows(); ++t) z.row(t).array() -= noisy_scores(t, threshold(t));
    return z / deviation;
  }
};

}  // namespace

void check_other_aux_losses(CaseFile& file, Checker& checker) {
  const Index layers = file.size("n_layers");
  const Index tokens = file.size("n_tokens");
  const Index experts = file.size("n_experts");
  const Index k = file.size("top_k");
  const Matrix<double> logits = file.matrix("in.logits", {layers, tokens, experts});
  const SoftmaxTopK<double> selector{.k = k};
  std::vector<Routing<double>> routings(static_cast<std::size_t>(layers));
  std::vector<std::int64_t> chosen;
  for (Index l = 0; l < layers; ++l) {
    Routing<double>& routing = routings[static_cast<std::size_t>(l)];
    selector.select(logits.middleRows(l * tokens, tokens), {}, routing);
    chosen.insert(chosen.end(), routing.expert.begin(), routing.expert.end());
  }
  checker.integers("out.topk_idx", chosen);

  // The loss of the first `count` layers, and its gradient with respect to all.
  const auto check = [&](const std::string& name, const auto& loss, Index count, double factor) {
    double sum = 0.0;
    Matrix<double> d_logits = Matrix<double>::Zero(logits.rows(), logits.cols());
    for (Index l = 0; l < count; ++l) {
      const Routing<double>& routing = routings[static_cast<std::size_t>(l)];
      sum += factor * loss.loss(routing);
      RoutingGradient<double> gradient;
      gradient.reset(routing);
      loss.add_gradient(routing, gradient);
      selector.backward(routing, gradient);
      d_logits.middleRows(l * tokens, tokens) = factor * gradient.logits;
    }
    checker.scalar("out." + name, sum);
    checker.reals("g_" + name + ".logits", d_logits);
  };
  check("gshard", GShardLoss<double>{1.0}, 1, 1.0);

  const Matrix<double> noise = file.matrix("in.gate_noise_sample", {tokens, experts});
  const Matrix<double> noisy = file.matrix("in.noisy_scores", {tokens, experts});
  checker.reals("in.noisy_scores", routings[0].probabilities + noise);
  checker.section("as Tutel has it, probabilities against a threshold of noisy probabilities");
  check("load_importance",
        TutelLoadImportance{noisy, k, file.number("gate_noise") / static_cast<double>(experts)}, 1,
        1.0);

  checker.section("the mean over the layers");
  check("megablocks_lbl", SwitchLoss<double>{file.number("moe_loss_weight")}, layers,
        1.0 / static_cast<double>(layers));
}

}  // namespace weir::golden
