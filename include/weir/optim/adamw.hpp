// SPDX-License-Identifier: MIT
/// \file
/// The AdamW optimizer (Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <functional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// What AdamW remembers of one parameter.
template <class T>
struct Moments {
  Matrix<T> first;   ///< m, shaped like the parameter; empty until its first update.
  Matrix<T> second;  ///< v, likewise.
  Index steps = 0;   ///< t: how many updates the parameter has had.
};

/// The moments of the parameter of that name.
template <class T>
struct NamedMoments {
  std::string name;
  Moments<T>* moments;
};

/// Adam with decoupled weight decay. Per step and parameter, with g its accumulated gradient:
///
///     m <- beta1 m + (1 - beta1) g                  m' = m / (1 - beta1^t)
///     v <- beta2 v + (1 - beta2) g^2                v' = v / (1 - beta2^t)
///     w <- w - learning_rate * (m' / (sqrt(v') + epsilon) + weight_decay * w)
///
/// learning_rate is the product of the paper's alpha and eta_t, and it multiplies the decay too, as
/// is the custom: the paper's lambda is weight_decay times the base learning rate. t counts the
/// updates of this parameter, so that its moments are unbiased whenever it is first used.
/// (Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2.)
///
/// Three kinds of parameter stand apart:
/// - frozen: keeps value, moments and t; its gradient is cleared.
/// - gradient empty, because no backward pass ever reached it (an expert that never got a token):
///   left alone altogether, also by weight decay.
/// - gradient zero, because no backward pass reached it since the last step: updated like others.
///   Its moments fade, and with them its movement; weight decay goes on.
///
/// A NaN in a gradient goes through to the value; `clip_global_norm` before each step refuses it.
template <std::floating_point T>
class AdamW {
 public:
  using Scalar = T;

  struct Config {
    double learning_rate = 1e-3;
    double beta1 = 0.9;
    double beta2 = 0.95;
    double epsilon = 1e-8;
    double weight_decay = 0.1;
    bool decay_vectors = false;  ///< Whether one-row parameters (norm weights, biases) decay too.
  };

  /// \param parameters    Those of one or more layers, as `parameters(layer)` lists them. They have
  ///                      to outlive the optimizer, and must not be moved or resized.
  /// \throws ConfigError   if a number is out of range, or a parameter is listed twice.
  explicit AdamW(const std::vector<NamedParameter<T>>& parameters, const Config& config = {})
      : config_(config) {
    expect_rate("AdamW", "learning_rate", config.learning_rate);
    expect_fraction("beta1", config.beta1);
    expect_fraction("beta2", config.beta2);
    expect_positive("AdamW", "epsilon", static_cast<T>(config.epsilon));
    expect_rate("AdamW", "weight_decay", config.weight_decay);
    expect_distinct(parameters);
    slots_.reserve(parameters.size());
    for (const auto& [name, parameter] : parameters) {
      const Index begin = blocks_;
      const Matrix<T>& value = parameter->value;
      blocks_ += (value.size() + kBlock - 1) / kBlock;
      slots_.push_back({name, parameter, value.rows(), value.cols(), begin, blocks_});
    }
  }

  /// Updates every parameter by its accumulated gradient, then sets the gradient to zero.
  /// Allocates nothing but the moments of a parameter at its first update.
  /// \throws ShapeError   if a gradient or a moment is not shaped like its parameter.
  /// \throws StateError   if a parameter was resized since the optimizer was made.
  void step() {
    for (const Slot& slot : slots_) check(slot);
    for (Slot& slot : slots_) {
      if (slot.learns()) prepare(slot);
    }
    parallel_for((blocks_ + kTaskBlocks - 1) / kTaskBlocks, [&](Index task) {
      const Index begin = task * kTaskBlocks;
      const Index end = std::min(blocks_, begin + kTaskBlocks);
      auto slot = std::partition_point(slots_.begin(), slots_.end(),
                                       [&](const Slot& s) { return s.end <= begin; });
      for (Index block = begin; block < end; ++block) {
        while (slot->end <= block) ++slot;
        update(*slot, (block - slot->begin) * kBlock);
      }
    });
    ++steps_;
  }

  const Config& config() const { return config_; }

  /// The learning rate of the next step.
  double learning_rate() const { return config_.learning_rate; }

  /// \throws ConfigError  if `learning_rate` is negative, infinite or NaN.
  void set_learning_rate(double learning_rate) {
    expect_rate("AdamW::set_learning_rate", "learning_rate", learning_rate);
    config_.learning_rate = learning_rate;
  }

  /// How many steps were taken; what a learning-rate schedule wants to know.
  Index steps() const { return steps_; }

  /// Continues the count of an earlier run.
  /// \throws ConfigError  if `steps` is negative.
  void set_steps(Index steps) {
    expect_at_least<Index>("AdamW::set_steps", "steps", steps, 0);
    steps_ = steps;
  }

  /// The moments of each parameter, in the order given to the constructor: to be saved, or to be
  /// overwritten with saved ones. The pointers are good for as long as the optimizer lives.
  std::vector<NamedMoments<T>> moments() {
    std::vector<NamedMoments<T>> named;
    named.reserve(slots_.size());
    for (Slot& slot : slots_) named.push_back({slot.name, &slot.moments});
    return named;
  }

 private:
  using Values = Eigen::Map<Eigen::Array<T, Eigen::Dynamic, 1>>;

  // Parameters are worked off in blocks that stay in the first-level cache over the statements of
  // `update`, and a task is a run of blocks, of one large parameter or of many small ones. A block
  // starts at a multiple of kBlock within its parameter: how an element is rounded then depends on
  // nothing but its place there.
  static constexpr Index kBlock = 512;
  static constexpr Index kTaskBlocks = 32;

  // The update of one step: w <- keep * w - rate * m / (root * sqrt(v) + epsilon).
  struct Coefficients {
    T keep = T(1);
    T rate = T(0);
    T root = T(1);
  };

  struct Slot {
    std::string name;
    Parameter<T>* parameter = nullptr;
    Index rows = 0, cols = 0;
    Index begin = 0, end = 0;  // Its blocks.
    Moments<T> moments = {};
    Coefficients coefficients = {};

    bool learns() const { return !parameter->frozen && parameter->grad.size() > 0; }
  };

  static void expect_rate(std::string_view where, std::string_view name, double value) {
    if (!(value >= 0.0 && std::isfinite(value))) {
      fail<ConfigError>(where, ": ", name, " = ", value, ", expected finite and >= 0");
    }
  }

  static void expect_fraction(std::string_view name, double value) {
    if (!(value >= 0.0 && value < 1.0)) {
      fail<ConfigError>("AdamW: ", name, " = ", value, ", expected in [0, 1)");
    }
  }

  static void expect_distinct(std::vector<NamedParameter<T>> parameters) {
    const auto address = [](const NamedParameter<T>& p) { return p.parameter; };
    std::ranges::stable_sort(parameters, std::less<>{}, address);
    const auto twice = std::ranges::adjacent_find(parameters, std::equal_to<>{}, address);
    if (twice != parameters.end()) {
      fail<ConfigError>("AdamW: parameters has ", twice->name, " and ", std::next(twice)->name,
                        ", which are the same parameter, expected each once");
    }
  }

  static void check(const Slot& slot) {
    const Matrix<T>& value = slot.parameter->value;
    if (value.rows() != slot.rows || value.cols() != slot.cols) {
      fail<StateError>("AdamW::step: ", slot.name, " is ", shape_of(value), ", but was [",
                       slot.rows, ", ", slot.cols, "] when the optimizer was made");
    }
    const auto expect_like_value = [&](std::string_view what, const Matrix<T>& m) {
      if (m.size() > 0 && (m.rows() != slot.rows || m.cols() != slot.cols)) {
        fail<ShapeError>("AdamW::step: ", what, slot.name, " is ", shape_of(m), ", expected ",
                         shape_of(value));
      }
    };
    expect_like_value("gradient of ", slot.parameter->grad);
    expect_like_value("first moment of ", slot.moments.first);
    expect_like_value("second moment of ", slot.moments.second);
  }

  void prepare(Slot& slot) const {
    Moments<T>& moments = slot.moments;
    if (moments.first.size() == 0) moments.first.setZero(slot.rows, slot.cols);
    if (moments.second.size() == 0) moments.second.setZero(slot.rows, slot.cols);
    ++moments.steps;
    const auto t = static_cast<double>(moments.steps);
    const bool decays = slot.rows != 1 || config_.decay_vectors;
    const double decay = decays ? config_.learning_rate * config_.weight_decay : 0.0;
    slot.coefficients = {
        .keep = static_cast<T>(1.0 - decay),
        .rate = static_cast<T>(config_.learning_rate / (1.0 - std::pow(config_.beta1, t))),
        .root = static_cast<T>(1.0 / std::sqrt(1.0 - std::pow(config_.beta2, t)))};
  }

  // One block of a parameter, from element `begin`.
  void update(Slot& slot, Index begin) const {
    Parameter<T>& parameter = *slot.parameter;
    if (parameter.grad.size() == 0) return;
    const Index size = std::min(kBlock, parameter.value.size() - begin);
    Values g(parameter.grad.data() + begin, size);
    if (slot.learns()) {
      Values w(parameter.value.data() + begin, size);
      Values m(slot.moments.first.data() + begin, size);
      Values v(slot.moments.second.data() + begin, size);
      const auto [keep, rate, root] = slot.coefficients;
      m = static_cast<T>(config_.beta1) * m + static_cast<T>(1.0 - config_.beta1) * g;
      v = static_cast<T>(config_.beta2) * v + static_cast<T>(1.0 - config_.beta2) * g.square();
      w = keep * w - rate * m / (root * v.sqrt() + static_cast<T>(config_.epsilon));
    }
    g.setZero();
  }

  Config config_;
  std::vector<Slot> slots_;
  Index blocks_ = 0;
  Index steps_ = 0;
};

}  // namespace weir
