// SPDX-License-Identifier: MIT
/// \file
/// Auxiliary-loss-free balancing (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3,
/// arXiv:2412.19437, section 2.1.2).
#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/selection_bias.hpp>

namespace weir {

/// By how much BiasBalance moves a bias.
enum class BiasRule {
  kSign,          ///< rate * sign(mean - c_e): algorithm 1 of the paper, DeepSeek-V3.
  kProportional,  ///< rate * (mean - c_e) / mean: the paper's variant that moves by the error,
                  ///< which is divided by the mean here, so that the rate does not depend on the
                  ///< batch.
};

/// Settings of BiasBalance.
struct BiasBalanceConfig {
  BiasRule rule = BiasRule::kSign;
  bool recentre = false;  ///< Shift the bias to mean zero after each move, as torchtitan does; the
                          ///< choice of experts does not depend on it.
};

/// After each optimizer step, raises the selection bias of the experts that got too little and
/// lowers that of those that got too much:
///
///     b_e += rate * sign(mean_j c_j - c_e)            or, see BiasRule
///     b_e += rate * (mean_j c_j - c_e) / mean_j c_j
///
/// c_e counts the assignments to expert e, dropped or not and without padding, in all backward
/// passes since the last update: micro-batches of one step add up, and a forward pass that is run
/// again counts once. An expert with exactly the mean keeps its bias. There is no loss.
///
/// An expert that none of the tokens was allowed (Pass::allowed) keeps its bias as well, and is
/// left out of both means, of the load and of the bias: once allowed again it is chosen as before,
/// neither swamped nor avoided.
template <std::floating_point T>
class BiasBalance {
 public:
  static constexpr std::string_view kName = "bias";

  /// \throws ConfigError  if rate < 0.
  explicit BiasBalance(T rate = T(0.001), BiasBalanceConfig config = {})
      : rate_(rate), config_(config) {
    check();
  }

  void check() const { expect_at_least("BiasBalance", "rate", rate_, T(0)); }

  void observe(const Routing<T>& routing) {
    if (load_.size() != routing.experts()) start(routing.experts());
    routing.mark_allowed(allowed_);
    RowVector<T>& count = routing.scratch[0];
    count.setZero(routing.experts());
    routing.add_load(0, routing.tokens(), count);
    load_ += count.template cast<double>();
  }

  /// Adds what other ranks counted: the load is that of the global batch.
  /// \param load      [experts]
  /// \param allowed   [experts], their `allowed()`; empty if they were allowed all experts.
  /// \throws ShapeError   if passes before it were of another number of experts, or `allowed` is.
  void add_load(const RowVector<double>& load, std::span<const std::uint8_t> allowed = {}) {
    if (load_.size() > 0) {
      expect_shape("BiasBalance::add_load", "load", load, 1, load_.size());
    }
    const auto experts = static_cast<std::size_t>(load.size());
    if (!allowed.empty() && allowed.size() != experts) {
      fail<ShapeError>("BiasBalance::add_load: allowed has ", allowed.size(), " entries, expected ",
                       experts);
    }
    if (load_.size() == 0) start(load.size());
    load_ += load;
    for (std::size_t e = 0; e < experts; ++e) {
      if (allowed.empty() || allowed[e] != 0) allowed_[e] = 1;
    }
  }

  /// Moves the bias and starts counting anew; without anything counted, or frozen, it stays.
  /// \throws ConfigError  if the selector is of another number of experts than what was counted.
  template <BiasedSelector S>
  void update(S& selector) {
    const double mean = load_.size() > 0 ? mean_of_allowed(load_) : 0.0;
    if (mean > 0.0 && !frozen_) {
      expect_selection_bias("BiasBalance::update", selector.selection_bias(), load_.size());
      Matrix<T>& bias = selector.selection_bias().value;
      for_each_allowed([&](Index e) {
        const double lack = mean - load_[e];
        if (config_.rule == BiasRule::kProportional) {
          bias(0, e) += rate_ * static_cast<T>(lack / mean);
        } else {
          bias(0, e) += lack > 0.0 ? rate_ : lack < 0.0 ? -rate_ : T(0);
        }
      });
      if (config_.recentre) {
        const T mean_bias = mean_of_allowed(bias);
        for_each_allowed([&](Index e) { bias(0, e) -= mean_bias; });
      }
    }
    start(load_.size());
  }

  /// A frozen bias stays as it is, and what is counted is forgotten at each update.
  void set_frozen(bool frozen) { frozen_ = frozen; }
  bool frozen() const { return frozen_; }

  /// What has been counted since the last update; empty before the first pass.
  const RowVector<double>& load() const { return load_; }

  /// Since then: 1 for the experts that any token was allowed, else 0.
  std::span<const std::uint8_t> allowed() const { return allowed_; }

  const BiasBalanceConfig& config() const { return config_; }

  T rate() const { return rate_; }

  /// For a schedule, set before `update`: `balancer.set_rate(schedule(step))`. DeepSeek-V3 ends its
  /// training with 0.
  void set_rate(T rate) {
    expect_at_least("BiasBalance", "rate", rate, T(0));
    rate_ = rate;
  }

 private:
  void start(Index experts) {
    load_.setZero(experts);
    allowed_.assign(static_cast<std::size_t>(experts), 0);
  }

  template <class Body>
  void for_each_allowed(Body&& body) const {
    for (Index e = 0; e < load_.size(); ++e) {
      if (allowed_[static_cast<std::size_t>(e)] != 0) body(e);
    }
  }

  /// Of the numbers of the experts [1, experts]; 0 if no expert was allowed.
  template <class Numbers>
  auto mean_of_allowed(const Numbers& of_expert) const {
    typename Numbers::Scalar sum(0), count(0);
    for_each_allowed([&](Index e) {
      sum += of_expert(0, e);
      count += 1;
    });
    return count > 0 ? sum / count : sum;
  }

  T rate_;
  BiasBalanceConfig config_;
  bool frozen_ = false;
  RowVector<double> load_;
  std::vector<std::uint8_t> allowed_;
};

}  // namespace weir
