// SPDX-License-Identifier: MIT
/// \file
/// The AdamW optimizer (Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2).
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
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/core/zeros.hpp>
#include <weir/optim/adamw_state.hpp>
#include <weir/optim/parameter_group.hpp>
#include <weir/optim/parameter_states.hpp>

namespace weir {

/// Settings of AdamW. The defaults are those of language models, not those of PyTorch.
struct AdamWConfig {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.1;
  bool decay_vectors = false;  ///< Whether one-row parameters (norm weights, biases) decay too.
  /// Whether parameters that no backward pass reached since the last step, such as experts without
  /// tokens, miss the step until a later one catches up on it.
  bool lazy = false;
  /// Whether m and v are kept as bfloat16 numbers, in half the memory, and widened for each step,
  /// as in DeepSeek-V3's training in FP8 (arXiv:2412.19437, section 3.3.3). Changes of less than
  /// 1/512 of a number are lost, so that v stops moving if beta2 is nearer to 1 than about 0.99.
  bool bfloat16_moments = false;
  std::vector<ParameterGroup> groups = {};  ///< The first that matches a name applies to it.
};

/// Adam with decoupled weight decay. Per step and parameter, with g its accumulated gradient:
///
///     m <- beta1 m + (1 - beta1) g                  m' = m / (1 - beta1^t)
///     v <- beta2 v + (1 - beta2) g^2                v' = v / (1 - beta2^t)
///     w <- w - learning_rate * (m' / (sqrt(v') + epsilon) + weight_decay * w)
///
/// learning_rate is the product of the paper's alpha and eta_t, and it multiplies the decay too, as
/// in other implementations: the paper's lambda is weight_decay times the base learning rate. t
/// counts the updates of this parameter, so that its moments are unbiased whenever it is first
/// used. (Loshchilov & Hutter 2017, arXiv:1711.05101, algorithm 2.)
///
/// The optimizer holds no pointers. `step` finds the parameters of the model by their names, so
/// that a model may be moved, frozen in part, or lose and gain parts between steps.
///
/// Three kinds of parameter are special:
/// - A frozen one keeps value, moments and t; its gradient is cleared.
/// - One whose gradient is empty, because no backward pass ever reached it (an expert that never
///   got a token), is left alone, also by weight decay.
/// - One whose gradient is zero, because no backward pass reached it since the last step, is
///   updated like others. Its moments fade, and with them its movement; weight decay goes on.
///   With `lazy`, it is not touched, so that a step costs what the experts with tokens cost. The
///   next step after a backward pass has reached it catches up on what it missed (see MissedSteps),
///   as does `catch_up`. Until then the model computes with the value it had: a token that comes to
///   the expert first sees it as it was when its last token left. This, and the little that
///   MissedSteps tells of epsilon, is all that differs from a step without `lazy`. (In the test of
///   AdamWState, with 70 % of 200 steps missed, the loss ends 2.5 % higher.) Which parameters were
///   reached is known from `Parameter::gradient`, through which gradients have to be added.
///
/// A NaN in a gradient goes through to the value; `clip_global_norm` before each step refuses it.
template <std::floating_point T>
class AdamW {
 public:
  using Scalar = T;

  /// \throws ConfigError   if a number is out of range.
  explicit AdamW(AdamWConfig config = {});

  /// Updates every parameter of `model` by its accumulated gradient, sets the gradients to zero,
  /// and runs balancing rules and schedules (`weir::update`). Allocates nothing except the moments
  /// of a parameter at its first update; if memory runs out then, nothing has changed.
  /// \throws ShapeError   if a gradient or a moment is not shaped like its parameter; nothing has
  ///                      changed then.
  /// \throws ConfigError  if two parameters have the same name, or are the same.
  template <class Model>
  void step(Model& model) {
    const auto make = [&](std::string_view name) { return new_state(name); };
    update_all(states_.find("AdamW::step", model, make));
    update(model);
  }

  /// Catches up on the steps that parameters of `model` have missed, as before it is saved or
  /// evaluated. Steps without `lazy` miss none.
  template <class Model>
  void catch_up(Model& model) {
    const auto make = [&](std::string_view name) { return new_state(name); };
    run(states_.find("AdamW::catch_up", model, make), false);
  }

  const AdamWConfig& config() const { return config_; }

  /// The learning rate of the next step.
  double learning_rate() const { return config_.learning_rate; }

  /// \throws ConfigError  if `learning_rate` is negative, infinite or NaN.
  void set_learning_rate(double learning_rate) {
    expect_at_least("AdamW::set_learning_rate", "learning_rate", learning_rate, 0.0);
    config_.learning_rate = learning_rate;
  }

  /// How many steps were taken; learning-rate schedules need it.
  Index steps() const { return steps_; }

  /// Continues the count of an earlier run.
  /// \throws ConfigError  if `steps` is negative.
  void set_steps(Index steps) {
    expect_at_least<Index>("AdamW::set_steps", "steps", steps, 0);
    steps_ = steps;
  }

  /// The moments of each parameter that has been in a step, to be saved. The pointers are valid
  /// until the next call of a member.
  std::vector<NamedMoments<T>> moments() {
    std::vector<NamedMoments<T>> named;
    for (auto& [name, state] : states_.all()) named.push_back({name, &state.moments});
    return named;
  }

  /// The moments of the parameter `name`, to be overwritten with saved ones; empty if it has been
  /// in no step. The reference is valid until the next call of a member.
  Moments<T>& moments(std::string_view name) {
    return states_.of(name, [&](std::string_view n) { return new_state(n); }).moments;
  }

  /// See SavedState.
  std::vector<SavedState<T>> saved_states();
  SavedState<T> saved_state(std::string_view name) {
    return moments(name).saved(name, config_.bfloat16_moments);
  }
  AdamW without_states() const { return AdamW(config_); }

  /// Forgets the moments of the parameters whose names match `pattern`, so that they start anew.
  void forget(std::string_view pattern) { states_.forget(pattern); }

 private:
  using State = AdamWState<T>;
  using Values = typename MomentBlock<T, 1>::Values;

  // Parameters are updated in blocks that stay in the first-level cache over the statements of
  // `update_block`. A task is a run of blocks of one large parameter or of many small ones. A block
  // starts at a multiple of kBlock within its parameter, so that the rounding of an element depends
  // only on its place there.
  static constexpr Index kBlock = 512;
  static constexpr Index kTaskBlocks = 32;

  // A parameter of the model during a step.
  struct Active {
    Parameter<T>* parameter = nullptr;
    const std::string* name = nullptr;
    State* state = nullptr;
    Index begin = 0, end = 0;  // The range of its blocks.
    bool steps = false;        // Whether it takes the step.
    bool behind = false;       // Whether it has missed some before it.
    AdamWCoefficients<T> coefficients = {};
  };

  State new_state(std::string_view name) const;

  // What a step does with the parameters found.
  void update_all(const List<typename ParameterStates<T, State>::Found>& found) {
    run(found, true);
    ++steps_;
  }

  // Lets the parameters that have been reached take a step, if `stepping`, and those that move
  // catch up on what they missed.
  void run(const List<typename ParameterStates<T, State>::Found>& found, bool stepping);

  static void check(const Active& active);

  // The coefficients of the parameter's next step.
  AdamWCoefficients<T> next(const Active& active) const;

  // Updates one block of a parameter, from element `begin` on.
  void update_block(const Active& active, Index begin, bool stepping) const;

  AdamWConfig config_;
  ParameterStates<T, State> states_;
  List<Active> active_;
  Index steps_ = 0;
};

template <std::floating_point T>
AdamW<T>::AdamW(AdamWConfig config) : config_(std::move(config)) {
  expect_at_least("AdamW", "learning_rate", config_.learning_rate, 0.0);
  expect_fraction("AdamW", "beta1", config_.beta1);
  expect_fraction("AdamW", "beta2", config_.beta2);
  expect_positive("AdamW", "epsilon", static_cast<T>(config_.epsilon));
  expect_at_least("AdamW", "weight_decay", config_.weight_decay, 0.0);
  for (const ParameterGroup& group : config_.groups) group.check("AdamW");
}

template <std::floating_point T>
std::vector<SavedState<T>> AdamW<T>::saved_states() {
  std::vector<SavedState<T>> all;
  for (auto& [name, state] : states_.all()) {
    SavedState<T> of_parameter = state.moments.saved(name, config_.bfloat16_moments);
    const auto is_empty = [](const auto& m) { return m.second->size() == 0; };
    std::erase_if(of_parameter.matrices, is_empty);
    std::erase_if(of_parameter.halves, is_empty);
    if (of_parameter.matrices.size() + of_parameter.halves.size() == 0) continue;
    all.push_back(std::move(of_parameter));
  }
  return all;
}

template <std::floating_point T>
AdamWState<T> AdamW<T>::new_state(std::string_view name) const {
  State state;
  if (const ParameterGroup* const group = group_of(config_.groups, name)) {
    state.learning_rate_factor = group->learning_rate_factor;
    state.weight_decay = group->weight_decay;
  }
  return state;
}

template <std::floating_point T>
void AdamW<T>::run(const List<typename ParameterStates<T, State>::Found>& found, bool stepping) {
  active_.clear();
  for (const auto& [parameter, named] : found) {
    Active active = {parameter, &named->name, &named->state};
    const bool learns = parameter->learns();
    active.steps = stepping && learns && (parameter->reached || !config_.lazy);
    active.behind = !parameter->frozen && MissedSteps<T>(named->state.moments.missed).any();
    active_.push_back(active);
  }
  for (const Active& active : active_) check(active);
  for (const Active& active : active_) {
    if (!active.steps) continue;
    active.state->moments.make(active.parameter->value, config_.bfloat16_moments);
  }
  Index blocks = 0;
  for (Active& active : active_) {
    Moments<T>& moments = active.state->moments;
    const bool misses = stepping && active.parameter->learns() && !active.steps;
    if (stepping && (active.steps || misses)) {
      ++moments.steps;
      active.coefficients = next(active);
    }
    if (misses) {
      MissedSteps<T>(moments.missed).add(active.coefficients, config_.beta1, config_.beta2);
    }
    // A gradient that is not used is cleared all the same.
    const bool touched = stepping ? !misses : active.behind;
    active.begin = blocks;
    if (touched) blocks += (active.parameter->value.size() + kBlock - 1) / kBlock;
    active.end = blocks;
  }
  parallel_for((blocks + kTaskBlocks - 1) / kTaskBlocks, [&](Index task) {
    const Index begin = task * kTaskBlocks;
    const Index end = std::min(blocks, begin + kTaskBlocks);
    auto active = std::partition_point(active_.begin(), active_.end(),
                                       [&](const Active& a) { return a.end <= begin; });
    for (Index block = begin; block < end; ++block) {
      while (active->end <= block) ++active;
      update_block(*active, (block - active->begin) * kBlock, stepping);
    }
  });
  for (Active& active : active_) {
    const bool caught_up = active.behind && active.begin < active.end;
    if (caught_up) MissedSteps<T>(active.state->moments.missed).clear();
  }
}

template <std::floating_point T>
void AdamW<T>::check(const Active& active) {
  const Matrix<T>& value = active.parameter->value;
  expect_like_value("AdamW::step", "gradient", *active.name, active.parameter->grad, value);
  active.state->moments.check("AdamW::step", *active.name, value);
}

template <std::floating_point T>
AdamWCoefficients<T> AdamW<T>::next(const Active& active) const {
  const auto t = static_cast<double>(active.state->moments.steps);
  const bool decays = active.parameter->value.rows() != 1 || config_.decay_vectors;
  const double weight_decay =
      active.state->weight_decay.value_or(decays ? config_.weight_decay : 0.0);
  const double rate = config_.learning_rate * active.state->learning_rate_factor;
  return {.keep = static_cast<T>(1.0 - rate * weight_decay),
          .rate = static_cast<T>(rate / (1.0 - std::pow(config_.beta1, t))),
          .root = static_cast<T>(1.0 / std::sqrt(1.0 - std::pow(config_.beta2, t)))};
}

template <std::floating_point T>
void AdamW<T>::update_block(const Active& active, Index begin, bool stepping) const {
  Parameter<T>& parameter = *active.parameter;
  const Index size = std::min(kBlock, parameter.value.size() - begin);
  Values w(parameter.value.data() + begin, size);
  Moments<T>& moments = active.state->moments;
  const MomentBlock<T, kBlock> block(moments, begin, size);
  Values m = block.m();
  Values v = block.v();
  const T epsilon = static_cast<T>(config_.epsilon);
  if (active.behind) {
    const MissedSteps<T> missed(moments.missed);
    w *= missed.keep();
    if (moments.any()) {  // Else it had no step before those it missed.
      w -= missed.move() * m / (v.sqrt() + epsilon);
      m *= missed.first();
      v *= missed.second();
    }
  }
  if (!stepping || parameter.grad.size() == 0) return;
  Values g(parameter.grad.data() + begin, size);
  if (active.steps) {
    const auto [keep, rate, root] = active.coefficients;
    m = static_cast<T>(config_.beta1) * m + static_cast<T>(1.0 - config_.beta1) * g;
    v = static_cast<T>(config_.beta2) * v + static_cast<T>(1.0 - config_.beta2) * g.square();
    w = keep * w - rate * m / (root * v.sqrt() + epsilon);
  }
  g.setZero();
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::ParameterStates<float, weir::AdamWState<float>>;
extern template class weir::ParameterStates<double, weir::AdamWState<double>>;
extern template class weir::AdamW<float>;
extern template class weir::AdamW<double>;
#endif
