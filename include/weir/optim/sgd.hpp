// SPDX-License-Identifier: MIT
/// \file
/// Stochastic gradient descent with momentum.
#pragma once

#include <concepts>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/optim/parameter_group.hpp>
#include <weir/optim/parameter_states.hpp>

namespace weir {

/// Settings of Sgd.
struct SgdConfig {
  double learning_rate = 1e-2;
  double momentum = 0.0;
  double dampening = 0.0;  ///< Of the gradients that momentum adds up, from the second one on.
  bool nesterov = false;   ///< Needs momentum without dampening.
  double weight_decay = 0.0;
  bool decoupled = false;     ///< Whether decay bypasses momentum.
  bool decay_vectors = true;  ///< Whether one-row parameters (norm weights, biases) decay too.
  std::vector<ParameterGroup> groups = {};  ///< The first that matches a name applies to it.
};

/// What Sgd remembers about one parameter.
template <class T>
struct SgdState {
  Matrix<T> velocity = {};  ///< b, shaped like the parameter; empty before its first update.
  double learning_rate_factor = 1.0;
  std::optional<double> weight_decay = {};
};

/// The velocity of the parameter called `name`.
template <class T>
struct NamedVelocity {
  std::string name;
  Matrix<T>* velocity;
};

/// Gradient descent. Per step and parameter, with g its accumulated gradient:
///
///     g <- g + weight_decay * w                              unless decoupled
///     b <- momentum * b + (1 - dampening) * g                b <- g at the first update
///     w <- w - learning_rate * weight_decay * w              if decoupled
///     w <- w - learning_rate * b                             without nesterov
///     w <- w - learning_rate * (g + momentum * b)            with nesterov
///
/// As PyTorch's `SGD`, whose decay is the coupled one; decoupled, it is that of SGDW (Loshchilov &
/// Hutter 2017, arXiv:1711.05101, algorithm 1, with the learning rate as factor of the decay).
/// Without momentum nothing is remembered. (Sutskever et al. 2013, for Nesterov's momentum.)
///
/// Frozen parameters and those without a gradient are treated as AdamW treats them.
template <std::floating_point T>
class Sgd {
 public:
  using Scalar = T;

  /// \throws ConfigError   if a number is out of range, or nesterov is without momentum or with
  ///                       dampening.
  explicit Sgd(SgdConfig config = {});

  /// Updates every parameter of `model` by its accumulated gradient, sets the gradients to zero,
  /// and runs balancing rules and schedules (`weir::update`). Allocates nothing except the velocity
  /// of a parameter at its first update; if memory runs out then, nothing has changed.
  /// \throws ShapeError   if a gradient or a velocity is not shaped like its parameter; nothing has
  ///                      changed then.
  /// \throws ConfigError  if two parameters have the same name, or are the same.
  template <class Model>
  void step(Model& model) {
    const auto make = [&](std::string_view name) { return new_state(name); };
    update_all(states_.find("Sgd::step", model, make));
    update(model);
  }

  const SgdConfig& config() const { return config_; }

  /// The learning rate of the next step.
  double learning_rate() const { return config_.learning_rate; }

  /// \throws ConfigError  if `learning_rate` is negative, infinite or NaN.
  void set_learning_rate(double learning_rate) {
    expect_at_least("Sgd::set_learning_rate", "learning_rate", learning_rate, 0.0);
    config_.learning_rate = learning_rate;
  }

  /// How many steps were taken; learning-rate schedules need it.
  Index steps() const { return steps_; }

  /// Continues the count of an earlier run.
  /// \throws ConfigError  if `steps` is negative.
  void set_steps(Index steps) {
    expect_at_least<Index>("Sgd::set_steps", "steps", steps, 0);
    steps_ = steps;
  }

  /// The velocity of each parameter that has one, to be saved. The pointers are valid until the
  /// next call of a member.
  std::vector<NamedVelocity<T>> velocities();

  /// The velocity of the parameter `name`, to be overwritten with a saved one; empty if it has
  /// none. The reference is valid until the next call of a member.
  Matrix<T>& velocity(std::string_view name) {
    return states_.of(name, [&](std::string_view n) { return new_state(n); }).velocity;
  }

  /// See SavedState.
  std::vector<SavedState<T>> saved_states();
  SavedState<T> saved_state(std::string_view name) {
    return {std::string(name), {{"velocity", &velocity(name)}}};
  }
  Sgd without_states() const { return Sgd(config_); }

  /// Forgets the velocity of the parameters whose names match `pattern`, so that they start anew.
  void forget(std::string_view pattern) { states_.forget(pattern); }

 private:
  using State = SgdState<T>;
  using Found = typename ParameterStates<T, State>::Found;

  State new_state(std::string_view name) const;

  // What a step does with the parameters found.
  void update_all(const List<Found>& found);

  // Makes those that are missing, all or none.
  void make_velocities(const List<Found>& found);

  static void check(const Found& f);

  // Updates one parameter; `first` says that its velocity has no past.
  void update_one(const Found& f, bool first) const;

  SgdConfig config_;
  ParameterStates<T, State> states_;
  List<std::uint8_t> first_;  // Whether a parameter had no velocity before this step.
  Index steps_ = 0;
};

template <std::floating_point T>
Sgd<T>::Sgd(SgdConfig config) : config_(std::move(config)) {
  expect_at_least("Sgd", "learning_rate", config_.learning_rate, 0.0);
  expect_fraction("Sgd", "momentum", config_.momentum);
  expect_in("Sgd", "dampening", config_.dampening, 0.0, 1.0);
  expect_at_least("Sgd", "weight_decay", config_.weight_decay, 0.0);
  if (config_.nesterov && (config_.momentum == 0.0 || config_.dampening != 0.0)) {
    throw_error<ConfigError>("Sgd: nesterov with momentum = ", config_.momentum,
                             " and dampening = ", config_.dampening,
                             ", expected momentum > 0 and dampening = 0");
  }
  for (const ParameterGroup& group : config_.groups) group.check("Sgd");
}

template <std::floating_point T>
std::vector<SavedState<T>> Sgd<T>::saved_states() {
  std::vector<SavedState<T>> all;
  for (const auto& [name, velocity] : velocities()) all.push_back({name, {{"velocity", velocity}}});
  return all;
}

template <std::floating_point T>
std::vector<NamedVelocity<T>> Sgd<T>::velocities() {
  std::vector<NamedVelocity<T>> named;
  for (auto& [name, state] : states_.all()) {
    if (state.velocity.size() > 0) named.push_back({name, &state.velocity});
  }
  return named;
}

template <std::floating_point T>
SgdState<T> Sgd<T>::new_state(std::string_view name) const {
  State state;
  if (const ParameterGroup* const group = group_of(config_.groups, name)) {
    state.learning_rate_factor = group->learning_rate_factor;
    state.weight_decay = group->weight_decay;
  }
  return state;
}

template <std::floating_point T>
void Sgd<T>::update_all(const List<Found>& found) {
  for (const Found& f : found) check(f);
  first_.assign(found.count(), 0);
  if (config_.momentum > 0.0) make_velocities(found);
  for (Index i = 0; i < found.count(); ++i) {
    if (found[i].parameter->learns()) update_one(found[i], first_[i] != 0);
    found[i].parameter->grad.setZero();
  }
  ++steps_;
}

template <std::floating_point T>
void Sgd<T>::make_velocities(const List<Found>& found) {
  try {
    for (Index i = 0; i < found.count(); ++i) {
      Matrix<T>& velocity = found[i].named->state.velocity;
      if (velocity.size() > 0 || !found[i].parameter->learns()) continue;
      const Matrix<T>& value = found[i].parameter->value;
      velocity.setZero(value.rows(), value.cols());
      first_[i] = 1;
    }
  } catch (...) {
    for (Index i = 0; i < found.count(); ++i) {
      if (first_[i] != 0) found[i].named->state.velocity = {};
    }
    throw;
  }
}

template <std::floating_point T>
void Sgd<T>::check(const Found& f) {
  const Matrix<T>& value = f.parameter->value;
  expect_like_value("Sgd::step", "gradient", f.named->name, f.parameter->grad, value);
  expect_like_value("Sgd::step", "velocity", f.named->name, f.named->state.velocity, value);
}

template <std::floating_point T>
void Sgd<T>::update_one(const Found& f, bool first) const {
  constexpr Index kCost = 8;
  State& state = f.named->state;
  Matrix<T>& value = f.parameter->value;
  const double rate_of_all = config_.learning_rate * state.learning_rate_factor;
  const bool decays = value.rows() != 1 || config_.decay_vectors;
  const double decay_of_all = state.weight_decay.value_or(decays ? config_.weight_decay : 0.0);
  const auto rate = static_cast<T>(rate_of_all);
  const auto keep = static_cast<T>(config_.decoupled ? 1.0 - rate_of_all * decay_of_all : 1.0);
  const auto decay = static_cast<T>(config_.decoupled ? 0.0 : decay_of_all);
  const auto mu = static_cast<T>(first ? 0.0 : config_.momentum);
  const auto taken = static_cast<T>(first ? 1.0 : 1.0 - config_.dampening);
  const auto ahead = static_cast<T>(config_.momentum);
  const bool remembers = state.velocity.size() > 0;
  parallel_rows(value.size(), kCost, [&](Index begin, Index end) {
    using Values = Eigen::Map<Eigen::Array<T, Eigen::Dynamic, 1>>;
    Values w(value.data() + begin, end - begin);
    Values g(f.parameter->grad.data() + begin, end - begin);
    g += decay * w;
    if (!remembers) {
      w = keep * w - rate * g;
      return;
    }
    Values b(state.velocity.data() + begin, end - begin);
    b = mu * b + taken * g;
    if (config_.nesterov) {
      w = keep * w - rate * (g + ahead * b);
    } else {
      w = keep * w - rate * b;
    }
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Sgd<float>;
extern template class weir::Sgd<double>;
#endif
