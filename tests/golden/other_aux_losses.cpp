// SPDX-License-Identifier: MIT
// The auxiliary losses of Tutel (gshard_loss, load_importance_loss) and of MegaBlocks
// (batched_load_balancing_loss).
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <numeric>
#include <utility>
#include <vector>

#include <weir/moe/balance/gshard_loss.hpp>
#include <weir/moe/balance/squared_variation.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "golden/families.hpp"
#include "support/routing.hpp"

namespace weir::golden {
namespace {

/// Tutel's load_importance_loss, which is not that of Shazeer et al. 2017: its importance is made
/// of all probabilities and not of the weights of the chosen experts, and its load compares
/// probabilities without noise with the k-th best of what the caller gives, for every expert; the
/// paper compares logits, and takes the next one for an expert that is itself among the best.
class TutelLoadImportance : public BalancerBase {
 public:
  struct Cache {
    Matrix<double> z;  ///< [tokens, experts], the margins.
    RowVector<double> importance, load;
  };

  /// \param noisy_scores  [tokens, experts], whose k-th best is the threshold.
  /// \param deviation     The standard deviation of the noise.
  TutelLoadImportance(Matrix<double> noisy_scores, Index k, double deviation)
      : noisy_scores_(std::move(noisy_scores)), k_(k), deviation_(deviation) {}

  double forward(const Routing<double>& routing, Cache& cache) const {
    cache.z = margins(routing);
    cache.importance = routing.probabilities.colwise().sum();
    cache.load =
        cache.z.unaryExpr([](double z) { return std::erfc(-z / std::numbers::sqrt2) / 2.0; })
            .colwise()
            .sum();
    return (squared_variation<double>(cache.importance, Variance::kSample) +
            squared_variation<double>(cache.load, Variance::kSample)) /
           2.0;
  }

  void backward(const Routing<double>& /*routing*/, double scale, RoutingGradient<double>& gradient,
                Cache& cache) const {
    const Matrix<double> density = cache.z.unaryExpr([](double z) {
      return std::exp(-z * z / 2.0) * std::numbers::inv_sqrtpi / std::numbers::sqrt2;
    });
    RowVector<double> d_importance, d_load;
    squared_variation<double>(cache.importance, Variance::kSample, &d_importance);
    squared_variation<double>(cache.load, Variance::kSample, &d_load);
    d_importance *= scale / 2.0;
    d_load *= scale / 2.0;
    for (Index t = 0; t < density.rows(); ++t) {
      // The noise is constant, the threshold is not: it moves with the probability it was made of.
      const RowVector<double> d_margin = density.row(t).cwiseProduct(d_load) / deviation_;
      gradient.probabilities.row(t) += d_importance + d_margin;
      gradient.probabilities(t, threshold(t)) -= d_margin.sum();
    }
  }

 private:
  /// The expert whose noisy probability is the threshold of token t.
  Index threshold(Index t) const {
    std::vector<Index> order(static_cast<std::size_t>(noisy_scores_.cols()));
    std::iota(order.begin(), order.end(), Index(0));
    std::sort(order.begin(), order.end(),
              [&](Index a, Index b) { return noisy_scores_(t, a) > noisy_scores_(t, b); });
    return order[static_cast<std::size_t>(k_ - 1)];
  }

  /// By how many deviations each probability is above the threshold.
  Matrix<double> margins(const Routing<double>& routing) const {
    Matrix<double> z = routing.probabilities;
    for (Index t = 0; t < z.rows(); ++t) z.row(t).array() -= noisy_scores_(t, threshold(t));
    return z / deviation_;
  }

  Matrix<double> noisy_scores_;
  Index k_;
  double deviation_;
};

}  // namespace

void check_other_aux_losses(CaseFile& file, Checker& checker) {
  const Index layers = file.size("n_layers");
  const Index tokens = file.size("n_tokens");
  const Index experts = file.size("n_experts");
  const Index k = file.size("top_k");
  const Matrix<double> logits = file.matrix("in.logits", {layers, tokens, experts});
  const SoftmaxTopK<double> selector({.k = k});
  std::vector<Routing<double>> routings(static_cast<std::size_t>(layers));
  std::vector<std::int64_t> chosen;
  for (Index l = 0; l < layers; ++l) {
    Routing<double>& routing = routings[static_cast<std::size_t>(l)];
    routing = test::route(selector, logits.middleRows(l * tokens, tokens));
    chosen.insert(chosen.end(), routing.expert.begin(), routing.expert.end());
  }
  if (file.has("out.topk_idx")) {  // In any order within a token.
    std::vector<std::int64_t> theirs = file.integers("out.topk_idx");
    const auto sort_tokens = [&](std::vector<std::int64_t>& all) {
      for (auto at = all.begin(); at < all.end(); at += k) std::sort(at, at + k);
    };
    std::vector<std::int64_t> ours = chosen;
    sort_tokens(ours);
    if (theirs.size() == ours.size()) {
      std::vector<std::int64_t> sorted = theirs;
      sort_tokens(sorted);
      if (sorted == ours) chosen = theirs;
    }
  }
  checker.integers("out.topk_idx", chosen);

  // The loss of the first `count` layers, and its gradient with respect to all.
  const auto check = [&](const std::string& name, const auto& loss, Index count, double factor) {
    double sum = 0.0;
    Matrix<double> d_logits = Matrix<double>::Zero(logits.rows(), logits.cols());
    for (Index l = 0; l < count; ++l) {
      sum += factor * test::loss_of(loss, routings[static_cast<std::size_t>(l)]);
      d_logits.middleRows(l * tokens, tokens) =
          factor *
          test::logit_gradient(selector, loss, logits.middleRows(l * tokens, tokens), kTraining);
    }
    checker.scalar("out." + name, sum);
    checker.reals("g_" + name + ".logits", d_logits);
  };
  check("gshard", GShardLoss<double>({.coefficient = 1.0}), 1, 1.0);

  if (file.has("in.noisy_scores")) {
    const Matrix<double> noisy = file.matrix("in.noisy_scores", {tokens, experts});
    if (file.has("in.gate_noise_sample")) {
      const Matrix<double> noise = file.matrix("in.gate_noise_sample", {tokens, experts});
      checker.reals("in.noisy_scores", routings[0].probabilities + noise);
    }
    checker.section("as Tutel has it, probabilities against a threshold of noisy probabilities");
    const double deviation = file.number_or("gate_noise", 1.0) / static_cast<double>(experts);
    check("load_importance", TutelLoadImportance(noisy, k, deviation), 1, 1.0);
  }

  checker.section("the mean over the layers");
  check("megablocks_lbl",
        SwitchLoss<double>({.coefficient = file.number_or("moe_loss_weight", 0.0)}), layers,
        1.0 / static_cast<double>(layers));
}

}  // namespace weir::golden
