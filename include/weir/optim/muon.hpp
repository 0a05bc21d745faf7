// SPDX-License-Identifier: MIT
/// \file
/// The Muon optimizer (Jordan et al. 2024), scaled as for Moonlight (Liu et al. 2025,
/// arXiv:2502.16982).
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/name_pattern.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/newton_schulz.hpp>
#include <weir/optim/parameter_group.hpp>
#include <weir/optim/parameter_states.hpp>

namespace weir {

/// Settings of Muon.
struct MuonConfig {
  double learning_rate = 1e-3;  ///< Of all parameters: updates have the size of AdamW's.
  double momentum = 0.95;
  bool nesterov = true;
  double weight_decay = 0.1;
  Index iterations = 5;       ///< Of `newton_schulz`.
  double update_scale = 0.2;  ///< The root mean square of an update, times the learning rate.

  /// The matrices that AdamW updates, as it does all parameters of one row: those whose names match
  /// one of these patterns, in which '*' stands for any characters. Embeddings and heads map to and
  /// from tokens, not between activations.
  std::vector<std::string> adamw = {"*embedding*", "head.*", "*.head.*"};
  double adamw_beta1 = 0.9;
  double adamw_beta2 = 0.95;
  double adamw_epsilon = 1e-8;
  bool decay_vectors = false;  ///< Whether one-row parameters (norm weights, biases) decay too.

  std::vector<ParameterGroup> groups = {};  ///< The first that matches a name applies to it.
};

/// The momentum of the parameter called `name`.
template <class T>
struct NamedMomentum {
  std::string name;
  Matrix<T>* momentum;
};

/// Momentum, orthogonalised. Per step and matrix W [rows, cols], with G its accumulated gradient:
///
///     M <- momentum M + G
///     O = newton_schulz(G + momentum M)            newton_schulz(M) without `nesterov`
///     W <- W - learning_rate * (update_scale * sqrt(max(rows, cols)) O + weight_decay W)
///
/// O has orthonormal rows or columns, about, so that its numbers have root mean square
/// 1 / sqrt(max(rows, cols)). The factor makes it `update_scale`, which is that of AdamW's updates:
/// learning rate and decay of AdamW can be kept, and all parameters share them. Parameters of one
/// row and those that `adamw` names are updated by AdamW.
/// (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025,
/// arXiv:2502.16982, for scale and decay. The published code orthogonalises in
/// bfloat16; this is done in T.)
///
/// Each parameter is one matrix: experts that lie in one model as parameters of their own are
/// orthogonalised each by itself, and projections that are stored as one matrix are taken together.
/// Frozen parameters and those without a gradient are treated as AdamW treats them.
template <std::floating_point T>
class Muon {
 public:
  using Scalar = T;

  /// \throws ConfigError   if a number is out of range.
  explicit Muon(MuonConfig config = {})
      : config_(checked(std::move(config))), adamw_(adamw_config(config_)) {}

  /// Updates every parameter of `model` by its accumulated gradient, sets the gradients to zero,
  /// and runs balancing rules and schedules (`weir::update`). Allocates nothing once it has seen
  /// all parameters.
  /// \throws ShapeError   if a gradient or a momentum is not shaped like its parameter; nothing has
  ///                      changed then.
  /// \throws ConfigError  if two parameters have the same name, or are the same.
  template <class Model>
  void step(Model& model) {
    const auto make = [&](std::string_view name) { return new_state(name); };
    update_all(states_.find("Muon::step", model, make));
    update(model);
  }

  const MuonConfig& config() const { return config_; }

  /// The learning rate of the next step.
  double learning_rate() const { return config_.learning_rate; }

  /// \throws ConfigError  if `learning_rate` is negative, infinite or NaN.
  void set_learning_rate(double learning_rate) {
    expect_at_least("Muon::set_learning_rate", "learning_rate", learning_rate, 0.0);
    config_.learning_rate = learning_rate;
  }

  /// How many steps were taken; learning-rate schedules need it.
  Index steps() const { return steps_; }

  /// Continues the count of an earlier run.
  /// \throws ConfigError  if `steps` is negative.
  void set_steps(Index steps) {
    expect_at_least<Index>("Muon::set_steps", "steps", steps, 0);
    steps_ = steps;
  }

  /// M of each matrix that has been in a step, to be saved. The pointers are valid until the next
  /// call of a member.
  std::vector<NamedMomentum<T>> momenta();

  /// M of the parameter `name`, to be overwritten with a saved one; empty if it has been in no
  /// step. The reference is valid until the next call of a member.
  Matrix<T>& momentum(std::string_view name) {
    return states_.of(name, [&](std::string_view n) { return new_state(n); }).momentum;
  }

  /// The optimizer of the other parameters, with their moments.
  AdamW<T>& adamw() { return adamw_; }

  /// See SavedState.
  std::vector<SavedState<T>> saved_states();
  SavedState<T> saved_state(std::string_view name);
  Muon without_states() const { return Muon(config_); }

  /// Forgets what is known about the parameters whose names match `pattern`.
  void forget(std::string_view pattern) {
    states_.forget(pattern);
    adamw_.forget(pattern);
  }

 private:
  struct State {
    Matrix<T> momentum = {};  // Empty until the first update.
    double learning_rate_factor = 1.0;
    std::optional<double> weight_decay = {};
    bool by_adamw = false;
  };
  using States = ParameterStates<T, State>;
  using Found = typename States::Found;

  // The parameters that AdamW updates, as a model.
  struct Others {
    using Scalar = T;
    List<Found> found;

    static void visit(Others& self, Walk<T>& visit) {
      for (const Found& f : self.found) visit(f.named->name, *f.parameter);
    }
  };

  static MuonConfig checked(MuonConfig config);

  static AdamWConfig adamw_config(const MuonConfig& config) {
    return {.learning_rate = config.learning_rate,
            .beta1 = config.adamw_beta1,
            .beta2 = config.adamw_beta2,
            .epsilon = config.adamw_epsilon,
            .weight_decay = config.weight_decay,
            .decay_vectors = config.decay_vectors,
            .groups = config.groups};
  }

  State new_state(std::string_view name) const;

  // What a step does with the parameters found.
  void update_all(const List<Found>& found);

  // Checks the shapes of a matrix, and makes its momentum and room for its update.
  void prepare(const Found& f);

  void update_matrix(const Found& f);

  MuonConfig config_;
  AdamW<T> adamw_;
  States states_;
  Others others_;
  List<Found> matrices_;
  NewtonSchulzCache<T> cache_;
  Scratch<T> direction_;
  Index steps_ = 0;
};

template <std::floating_point T>
MuonConfig Muon<T>::checked(MuonConfig config) {
  expect_at_least("Muon", "learning_rate", config.learning_rate, 0.0);
  expect_fraction("Muon", "momentum", config.momentum);
  expect_at_least("Muon", "weight_decay", config.weight_decay, 0.0);
  expect_at_least<Index>("Muon", "iterations", config.iterations, 1);
  expect_positive("Muon", "update_scale", config.update_scale);
  expect_fraction("Muon", "adamw_beta1", config.adamw_beta1);
  expect_fraction("Muon", "adamw_beta2", config.adamw_beta2);
  expect_positive("Muon", "adamw_epsilon", static_cast<T>(config.adamw_epsilon));
  for (const ParameterGroup& group : config.groups) group.check("Muon");
  return config;
}

template <std::floating_point T>
std::vector<SavedState<T>> Muon<T>::saved_states() {
  std::vector<SavedState<T>> all = adamw_.saved_states();
  for (const auto& [name, momentum] : momenta()) all.push_back({name, {{"momentum", momentum}}});
  return all;
}

template <std::floating_point T>
SavedState<T> Muon<T>::saved_state(std::string_view name) {
  SavedState<T> state = adamw_.saved_state(name);
  state.matrices.emplace_back("momentum", &momentum(name));
  return state;
}

template <std::floating_point T>
std::vector<NamedMomentum<T>> Muon<T>::momenta() {
  std::vector<NamedMomentum<T>> named;
  for (auto& [name, state] : states_.all()) {
    if (state.momentum.size() > 0) named.push_back({name, &state.momentum});
  }
  return named;
}

template <std::floating_point T>
typename Muon<T>::State Muon<T>::new_state(std::string_view name) const {
  State state;
  if (const ParameterGroup* const group = group_of(config_.groups, name)) {
    state.learning_rate_factor = group->learning_rate_factor;
    state.weight_decay = group->weight_decay;
  }
  for (const std::string& pattern : config_.adamw) {
    state.by_adamw = state.by_adamw || matches_pattern(pattern, name);
  }
  return state;
}

template <std::floating_point T>
void Muon<T>::update_all(const List<Found>& found) {
  others_.found.clear();
  matrices_.clear();
  for (const Found& f : found) {
    const bool by_adamw = f.named->state.by_adamw || f.parameter->value.rows() <= 1;
    (by_adamw ? others_.found : matrices_).push_back(f);
  }
  for (const Found& f : matrices_) prepare(f);
  adamw_.set_learning_rate(config_.learning_rate);
  adamw_.step(others_);
  for (const Found& f : matrices_) {
    if (f.parameter->learns()) update_matrix(f);
    f.parameter->grad.setZero();
  }
  ++steps_;
}

template <std::floating_point T>
void Muon<T>::prepare(const Found& f) {
  const Matrix<T>& value = f.parameter->value;
  Matrix<T>& momentum = f.named->state.momentum;
  expect_like_value("Muon::step", "gradient", f.named->name, f.parameter->grad, value);
  expect_like_value("Muon::step", "momentum", f.named->name, momentum, value);
  if (!f.parameter->learns()) return;
  if (momentum.size() == 0) momentum.setZero(value.rows(), value.cols());
  cache_.reshape(value.rows(), value.cols());
  direction_.reshape(value.rows(), value.cols());
}

template <std::floating_point T>
void Muon<T>::update_matrix(const Found& f) {
  Matrix<T>& value = f.parameter->value;
  const Matrix<T>& gradient = f.parameter->grad;
  State& state = f.named->state;
  const auto mu = static_cast<T>(config_.momentum);
  state.momentum = mu * state.momentum + gradient;
  auto direction = direction_.reshape(value.rows(), value.cols());
  if (config_.nesterov) {
    direction = gradient + mu * state.momentum;
  } else {
    direction = state.momentum;
  }
  const auto orthogonal = newton_schulz<T>(direction, config_.iterations, cache_);
  const double rate = config_.learning_rate * state.learning_rate_factor;
  const double decay = state.weight_decay.value_or(config_.weight_decay);
  const auto longer = static_cast<double>(std::max(value.rows(), value.cols()));
  const auto step = static_cast<T>(rate * config_.update_scale * std::sqrt(longer));
  value = static_cast<T>(1.0 - rate * decay) * value - step * orthogonal;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Muon<float>;
extern template class weir::Muon<double>;
#endif
