// SPDX-License-Identifier: MIT
/// \file
/// A temperature on the logits of any router, and a schedule for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/group_count.hpp>

namespace weir {

/// From one temperature to another in equal ratios:
///
///     tau(step) = start * (end / start)^(min(step, steps) / steps)
struct TemperatureSchedule {
  double start = 1.0;
  double end = 1.0;
  Index steps = 1;

  /// \throws ConfigError  unless all three are positive.
  void check() const {
    expect_positive("TemperatureSchedule", "start", start);
    expect_positive("TemperatureSchedule", "end", end);
    expect_positive("TemperatureSchedule", "steps", steps);
  }

  double at(Index step) const {
    if (step >= steps) return end;
    const double part = static_cast<double>(std::max<Index>(step, 0)) / static_cast<double>(steps);
    return start * std::pow(end / start, part);
  }
};

/// The inner router's logits divided by tau, in training and outside of it. High temperatures level
/// the weights while experts know nothing yet; the choice of the largest logits is the same at any.
/// Logits that are all zero stay so: experts that tie are told apart only by noise on the logits
/// (NoisyRouter), neither by a temperature nor by jitter on the input. `set_step` moves along the
/// schedule; tau is constant to the derivative.
template <Layer Inner>
class TemperatureRouter {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;

  struct Cache {
    typename Inner::Cache inner;
    Matrix<T> logits, d_logits;
    Matrix<T> dx;                 ///< Where the inner router returns its own by value.
    RoutingGradient<T> gradient;  ///< Of the inner router's noise.
    T scale = T(1);               ///< 1 / tau of the last forward pass.
    bool filled = false;
  };

  /// At step 0.
  /// \throws ConfigError  if the schedule is out of range.
  explicit TemperatureRouter(Inner inner, TemperatureSchedule schedule = {})
      : inner_(std::move(inner)), schedule_(schedule) {
    schedule.check();
    set_step(0);
  }

  /// Takes the temperature of that step, 0 being the first.
  void set_step(Index step) { temperature_ = schedule_.at(step); }

  double temperature() const { return temperature_; }

  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }
  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.filled = false;
    cache.scale = static_cast<T>(1.0 / temperature_);
    cache.logits = apply(inner_, x, pass, cache.inner);
    cache.logits *= cache.scale;
    cache.filled = true;
    return cache.logits;
  }

  /// \throws StateError   if the cache has seen no forward pass.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    if (!cache.filled) fail<StateError>("TemperatureRouter::backward: no forward pass before it");
    cache.d_logits = d_logits;
    cache.d_logits *= cache.scale;
    return keep(cache.dx, inner_.backward(cache.d_logits, cache.inner));
  }

  /// The noise of the inner router, divided by tau as well.
  void annotate(const Cache& cache, Routing<T>& routing) const requires AnnotatingRouter<Inner> {
    inner_.annotate(cache.inner, routing);
    if (!routing.noisy) return;
    routing.clean_logits *= cache.scale;
    routing.noise_std *= cache.scale;
    if (routing.groups == 0) return;
    routing.group_noise *= cache.scale;
    routing.group_noise_std *= cache.scale;
  }
  void receive(const RoutingGradient<T>& gradient,
               Cache& cache) const requires AnnotatingRouter<Inner> {
    cache.gradient.clean_logits = cache.scale * gradient.clean_logits;
    cache.gradient.noise_std = cache.scale * gradient.noise_std;
    cache.gradient.groups = gradient.groups;
    if (gradient.groups > 0) {
      cache.gradient.group_noise = cache.scale * gradient.group_noise;
      cache.gradient.group_noise_std = cache.scale * gradient.group_noise_std;
    }
    inner_.receive(cache.gradient, cache.inner);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    Inner::visit(self.inner_, visit);
  }

  Index d_model() const { return inner_.d_model(); }
  Index experts() const { return inner_.experts(); }
  Index groups() const requires GroupedRouter<Inner> { return inner_.groups(); }

 private:
  Inner inner_;
  TemperatureSchedule schedule_;
  double temperature_ = 1.0;
};

}  // namespace weir
