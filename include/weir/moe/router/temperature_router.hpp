// SPDX-License-Identifier: MIT
/// \file
/// A temperature on the logits of any router, and a schedule for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/mapped_logits_router.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Settings of TemperatureRouter: a temperature that goes from `start` to `end` in equal ratios,
///
///     tau(step) = start * (end / start)^(min(step, steps) / steps)
struct TemperatureRouterConfig {
  double start = 1.0;
  double end = 1.0;
  Index steps = 1;

  /// \throws ConfigError  unless all three are positive.
  void check() const {
    expect_positive("TemperatureRouter", "start", start);
    expect_positive("TemperatureRouter", "end", end);
    expect_positive("TemperatureRouter", "steps", steps);
  }

  /// tau(step); steps below 0 count as 0.
  double temperature(double step) const {
    const double part = std::max(step, 0.0) / static_cast<double>(steps);
    return part >= 1.0 ? end : start * std::pow(end / start, part);
  }
};

/// The inner router's logits divided by tau, in training and outside of it. High temperatures level
/// the weights while experts know nothing yet; the choice of the largest logits is the same at any.
/// Logits that are all zero stay so: experts that tie are told apart only by noise on the logits
/// (NoisyRouter), neither by a temperature nor by jitter on the input. The noise that the inner
/// router tells is divided by tau as well.
///
/// Each step of an optimizer is one step of the schedule: `weir::update` moves it on. tau is
/// constant to the derivative.
template <Router Inner>
class TemperatureRouter : public MappedLogitsRouter<Inner> {
 public:
  using T = typename Inner::Scalar;
  using typename MappedLogitsRouter<Inner>::Cache;

  /// At step 0.
  /// \throws ConfigError  if the schedule is out of range.
  explicit TemperatureRouter(Inner inner, TemperatureRouterConfig config = {})
      : MappedLogitsRouter<Inner>(std::move(inner)), config_(config) {
    config_.check();
    step_.value.setZero(1, 1);
  }

  /// Takes the temperature of that step, 0 being the first.
  void set_step(Index step) { step_.value(0, 0) = static_cast<T>(std::min(step, config_.steps)); }

  /// Moves on to the next step; for `weir::update`.
  void update_self() {
    if (step_.value(0, 0) < static_cast<T>(config_.steps)) step_.value(0, 0) += T(1);
  }

  /// tau
  double temperature() const { return config_.temperature(static_cast<double>(step_.value(0, 0))); }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, experts]
  /// \throws ShapeError   if x does not have d_model columns.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    const Matrix<T>& z = this->inner_.forward(x, pass, cache.inner);
    const T scale = static_cast<T>(1.0 / temperature());
    scale_rows<T>(scale, z, cache.logits);
    return cache.state.finish(*this, pass,
                              this->finish_mapped("TemperatureRouter", z, scale, pass, cache));
  }

  /// \param d_logits  [tokens, experts], of the last forward pass.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    cache.state.begin_backward("TemperatureRouter::backward", *this, d_logits);
    return this->backward_mapped(d_logits, cache);
  }

  /// The step as the buffer `temperature_step`, and the members of the inner router under its own
  /// names.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("temperature_step", self.step_);
    visit("", self.inner_);
  }

  const TemperatureRouterConfig& config() const { return config_; }

 private:
  TemperatureRouterConfig config_;
  Buffer<T> step_;  // [1, 1]
};

}  // namespace weir
