// SPDX-License-Identifier: MIT
/// \file
/// Auxiliary-loss-free balancing (Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-V3,
/// arXiv:2412.19437, section 2.1.2).
#pragma once

#include <concepts>
#include <cstdint>
#include <span>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/balance/mark_allowed.hpp>
#include <weir/moe/concepts.hpp>
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
  double rate = 0.001;
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
class BiasBalance : public BalancerBase {
 public:
  static constexpr std::string_view kName = "bias";

  explicit BiasBalance(BiasBalanceConfig config = {}) : config_(config) { check(); }

  /// \throws ConfigError  if the rate is negative.
  void check() const { expect_at_least("BiasBalance", "rate", config_.rate, 0.0); }

  void observe(const Routing<T>& routing) {
    if (load_.size() != routing.experts()) start(routing.experts());
    mark_allowed(routing, allowed_);
    routing.add_load(0, routing.tokens(), load_);
  }

  /// Adds what other ranks counted: the load is that of the global batch.
  /// \param load      [experts]
  /// \param allowed   [experts], their `allowed()`; empty if they were allowed all experts.
  /// \throws ShapeError   if passes before it were of another number of experts, or `allowed` is.
  void add_load(const RowVector<double>& load, std::span<const std::uint8_t> allowed = {});

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
        const double sign = lack > 0.0 ? 1.0 : lack < 0.0 ? -1.0 : 0.0;
        const double step = config_.rule == BiasRule::kProportional ? lack / mean : sign;
        bias(0, e) += static_cast<T>(config_.rate * step);
      });
      if (config_.recentre) {
        const T mean_bias = mean_of_allowed(bias);
        for_each_allowed([&](Index e) { bias(0, e) -= mean_bias; });
      }
    }
    start(load_.size());
  }

  /// Forgets what was counted since the last update; for `weir::discard`.
  void discard_self() { start(load_.size()); }

  /// A frozen bias stays as it is, and what is counted is forgotten at each update.
  void set_frozen(bool frozen) { frozen_ = frozen; }
  bool frozen() const { return frozen_; }

  /// What has been counted since the last update; empty before the first pass.
  const RowVector<double>& load() const { return load_; }

  /// 1 for the experts that any token was allowed since the last update, else 0.
  std::span<const std::uint8_t> allowed() const { return allowed_; }

  const BiasBalanceConfig& config() const { return config_; }

  /// For a schedule, set before `update`: `balancer.set_rate(schedule(step))`. DeepSeek-V3 ends its
  /// training with 0.
  void set_rate(double rate) {
    expect_at_least("BiasBalance", "rate", rate, 0.0);
    config_.rate = rate;
  }

 private:
  void start(Index experts) {
    set_zero(load_, experts);
    allowed_.assign(experts, 0);
  }

  template <class Body>
  void for_each_allowed(Body&& body) const {
    for (Index e = 0; e < load_.size(); ++e) {
      if (allowed_[e] != 0) body(e);
    }
  }

  /// The mean of numbers [1, experts] over the experts that were allowed; 0 if there are none.
  template <class Numbers>
  auto mean_of_allowed(const Numbers& of_expert) const {
    typename Numbers::Scalar sum(0), count(0);
    for_each_allowed([&](Index e) {
      sum += of_expert(0, e);
      count += 1;
    });
    return count > 0 ? sum / count : sum;
  }

  BiasBalanceConfig config_;
  bool frozen_ = false;
  RowVector<double> load_;
  List<std::uint8_t> allowed_;
};

template <std::floating_point T>
void BiasBalance<T>::add_load(const RowVector<double>& load,
                              std::span<const std::uint8_t> allowed) {
  if (load_.size() > 0) {
    expect_shape("BiasBalance::add_load", "load", load, 1, load_.size());
  }
  const Index experts = load.size();
  if (!allowed.empty() && static_cast<Index>(allowed.size()) != experts) {
    throw_error<ShapeError>("BiasBalance::add_load: allowed has ", allowed.size(),
                            " entries, expected ", experts);
  }
  if (load_.size() == 0) start(experts);
  load_ += load;
  for (Index e = 0; e < experts; ++e) {
    if (allowed.empty() || allowed.data()[e] != 0) allowed_[e] = 1;
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::BiasBalance<float>;
extern template class weir::BiasBalance<double>;
#endif
