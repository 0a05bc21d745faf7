// SPDX-License-Identifier: MIT
/// \file
/// Whether other experts can stand in for the best ones.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include <weir/analysis/bootstrap.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/forbidden_experts.hpp>
#include <weir/ops/logsumexp.hpp>

namespace weir {

/// Settings of `loss_without_best`.
struct RedundancyConfig {
  std::vector<double> shares = {0.0, 1.0 / 16, 2.0 / 16, 3.0 / 16, 4.0 / 16};  ///< Of the experts.
  Index batch = 8;         ///< Texts in one pass.
  Index random_masks = 1;  ///< How many passes the loss by chance is the mean of; 0: it is NaN.
  BootstrapConfig bootstrap = {};

  /// \throws ConfigError  if a setting is out of range.
  void check() const {
    for (const double share : shares) {
      if (share >= 0.0 && share < 1.0) continue;
      throw_error<ConfigError>("RedundancyConfig: shares has ", share, ", expected 0 <= share < 1");
    }
    expect_at_least<Index>("RedundancyConfig", "batch", batch, 1);
    expect_at_least<Index>("RedundancyConfig", "random_masks", random_masks, 0);
    bootstrap.check();
  }
};

namespace detail {

/// A sum over the tokens of one text, and how many they are.
struct LossSum {
  double loss = 0.0;
  double tokens = 0.0;
};

/// The losses of a model over texts, in nats: of each text the sum over its predicted tokens.
/// \param prepare  `prepare(pass, tokens)` says what else a pass is told.
template <class Model, class Prepare>
std::vector<LossSum> text_losses(const Model& model, const std::vector<std::vector<Index>>& texts,
                                 Index batch, Prepare&& prepare) {
  using T = typename Model::Scalar;
  std::vector<LossSum> losses;
  for (std::size_t begin = 0; begin < texts.size(); begin += static_cast<std::size_t>(batch)) {
    const std::size_t end = std::min(texts.size(), begin + static_cast<std::size_t>(batch));
    std::vector<Index> ids;
    Sequences sequences;
    for (std::size_t i = begin; i < end; ++i) {
      ids.insert(ids.end(), texts[i].begin(), texts[i].end());
      sequences.append(static_cast<Index>(texts[i].size()));
    }
    Pass pass = {.sequences = &sequences};
    prepare(pass, static_cast<Index>(ids.size()));
    const Matrix<T> logits = infer(model, ids, pass);
    for (Index s = 0; s < sequences.count(); ++s) {
      LossSum sum;
      for (Index t = sequences.begin(s); t + 1 < sequences.end(s); ++t) {
        const std::span<const T> row = span_of(logits.row(t).data(), logits.cols());
        const Index next = ids[static_cast<std::size_t>(t) + 1];
        sum.loss += static_cast<double>(logsumexp<T>(row) - element(row, next));
        sum.tokens += 1.0;
      }
      losses.push_back(sum);
    }
  }
  return losses;
}

/// The number of experts that each mixture of the model has; 0 if they differ or there are none.
template <class Model>
Index experts_of_all(const Model& model, const std::vector<Index>& text) {
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  infer(model, text, {.record = &record});
  Index experts = 0;
  for (const auto& found : record.reports()) {
    const auto own = static_cast<Index>(found.report.load.size());
    if (own == 0) continue;
    if (experts != 0 && own != experts) return 0;
    experts = own;
  }
  return experts;
}

/// Forbids each token as many experts, drawn at random, as `share` makes: [tokens * experts].
inline std::vector<std::uint8_t> random_mask(Index tokens, Index experts, double share, Rng& rng) {
  std::vector<std::uint8_t> allowed(static_cast<std::size_t>(tokens * experts), 1);
  std::vector<Index> pool(static_cast<std::size_t>(experts));
  std::iota(pool.begin(), pool.end(), Index{0});
  const Index count = share_of_experts(share, experts);
  for (Index t = 0; t < tokens; ++t) {
    draw_to_back(pool, count, rng);
    for (auto e = pool.end() - count; e != pool.end(); ++e) {
      allowed[static_cast<std::size_t>(t * experts + *e)] = 0;
    }
  }
  return allowed;
}

}  // namespace detail

/// The mean loss of a token, in nats, where each token goes without its best experts, share by
/// share: in every mixture a share of the experts, those of the token's largest logits, is masked,
/// and the selector chooses among the others (see Pass::without_best). The steeper the loss rises,
/// the less the others can stand in for the best, and the less redundant experts are.
///
///     loss(r) = mean over texts' tokens of -log p(next token), without round(r experts) best
///
/// `chance` is the loss if as many experts are masked that are drawn at random for each token, the
/// same in all layers; NaN if mixtures differ in their number of experts. Intervals are by
/// bootstrap over texts. Weights that are made of the chosen experts alone are what they would be
/// without a mask; raw probabilities are those of a softmax over the experts that are left.
/// (Dai et al. 2024, arXiv:2401.06066, section 4.5 and figure 4, with raw probabilities, of which
/// it does not say whether they are of all experts or of those that are left.)
/// \param model    A model of tokens, such as Decoder, also stored for inference.
/// \param texts    Each a sequence of its own; of each, all tokens but the first are predicted.
/// \return         One for each of config.shares.
/// \throws ConfigError  if a setting is out of range, if there is no text or an empty one, or if a
///                      share leaves a token of some mixture fewer than k experts.
template <class Model>
std::vector<Estimate> loss_without_best(const Model& model,
                                        const std::vector<std::vector<Index>>& texts,
                                        const RedundancyConfig& config = {}) {
  config.check();
  expect_at_least<std::size_t>("loss_without_best", "texts", texts.size(), 1);
  for (const std::vector<Index>& text : texts) {
    expect_at_least<std::size_t>("loss_without_best", "tokens of a text", text.size(), 1);
  }
  const auto mean = [](const std::vector<detail::LossSum>& losses, std::span<const Index> chosen) {
    detail::LossSum sum;
    for (const Index s : chosen) {
      sum.loss += losses[static_cast<std::size_t>(s)].loss;
      sum.tokens += losses[static_cast<std::size_t>(s)].tokens;
    }
    return sum.tokens > 0.0 ? sum.loss / sum.tokens : kUnknown;
  };
  std::vector<Index> all(texts.size());
  std::iota(all.begin(), all.end(), Index{0});
  const std::vector<Index> domain(texts.size(), 0);
  const Index experts =
      config.random_masks > 0 ? detail::experts_of_all(model, texts[0]) : Index{0};
  Rng rng(config.bootstrap.seed);
  std::vector<Estimate> estimates;
  for (const double share : config.shares) {
    const auto losses = detail::text_losses(model, texts, config.batch,
                                            [&](Pass& pass, Index) { pass.without_best = share; });
    estimates.push_back(estimate(
        domain,
        [&](std::span<const Index> chosen) { return std::vector<double>{mean(losses, chosen)}; },
        config.bootstrap, 0.0, std::numeric_limits<double>::infinity())[0]);
    if (experts == 0) continue;
    double sum = 0.0;
    for (Index r = 0; r < config.random_masks; ++r) {
      std::vector<std::uint8_t> allowed;
      sum += mean(detail::text_losses(model, texts, config.batch,
                                      [&](Pass& pass, Index tokens) {
                                        allowed = detail::random_mask(tokens, experts, share, rng);
                                        pass.allowed = allowed;
                                      }),
                  all);
    }
    estimates.back().chance = sum / static_cast<double>(config.random_masks);
  }
  return estimates;
}

}  // namespace weir
