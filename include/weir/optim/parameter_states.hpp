// SPDX-License-Identifier: MIT
/// \file
/// What an optimizer remembers about each parameter, found by the parameter's name.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/list.hpp>
#include <weir/core/name_pattern.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/walk.hpp>

namespace weir {

/// What an optimizer remembers about the parameter of that name, as checkpoints save it. Optimizers
/// offer, for io/checkpoint.hpp,
///
///     std::vector<SavedState<T>> saved_states()          of all parameters, without what is empty
///     SavedState<T> saved_state(std::string_view name)   of one, to be filled; made if need be
///     Optimizer without_states() const                   the same settings, and nothing remembered
///     Index steps() const,  void set_steps(Index)
///
/// Pointers are valid until the next call of a member.
template <class T>
struct SavedState {
  std::string parameter;
  std::vector<std::pair<std::string_view, Matrix<T>*>> matrices;  ///< Each with what it is.
  Index* steps = nullptr;  ///< The parameter's own count of updates, where it has one.
  /// What is kept in 16 bits.
  std::vector<std::pair<std::string_view, Matrix<Eigen::bfloat16>*>> halves = {};
};

/// \throws ShapeError   unless `matrix`, the `what` of a parameter, is empty or shaped like its
/// value. \param who      The name of the function, for messages.
template <class Number, class T>
void expect_like_value(std::string_view who, std::string_view what, std::string_view name,
                       const Matrix<Number>& matrix, const Matrix<T>& value) {
  if (matrix.size() == 0) return;
  if (matrix.rows() == value.rows() && matrix.cols() == value.cols()) return;
  throw_error<ShapeError>(who, ": ", what, " of ", name, " is ", shape_of(matrix), ", expected ",
                          shape_of(value));
}

/// Keeps a `State` for each parameter name, so that an optimizer holds no pointers: a model may be
/// moved, and lose and gain parts, between steps. The states of parameters that are no longer in
/// the model are kept until they are forgotten.
template <class T, class State>
class ParameterStates {
 public:
  struct Named {
    std::string name;
    State state = {};
  };

  /// A parameter of the model at hand, and its state.
  struct Found {
    Parameter<T>* parameter = nullptr;
    Named* named = nullptr;
  };

  /// Makes the state of a parameter that has none yet, from its name.
  using Make = FunctionRef<State(std::string_view name)>;

  /// Finds the parameters of `model`, in the order of the walk, each with its state; a new name
  /// gets `make(name)`. Allocates nothing as long as the model has the same parameters as last
  /// time. The pointers are valid until the next call of a member.
  /// \param who      The name of the function, for messages.
  /// \throws ConfigError  if two parameters have the same name, or are the same.
  template <class Model>
  const List<Found>& find(std::string_view who, Model& model, Make make) {
    places_.clear();
    Finder finder(*this, make);
    finder("", model);
    return found(who);
  }

  /// The state of the parameter `name`; a new name gets `make(name)`.
  State& of(std::string_view name, Make make) { return states_[index_of(name, 0, make)].state; }

  /// All states, in the order of the model.
  List<Named>& all() { return states_; }

  /// Removes the states of the names that match `pattern`.
  void forget(std::string_view pattern) {
    std::erase_if(states_, [&](const Named& n) { return matches_pattern(pattern, n.name); });
  }

 private:
  struct Place {
    Parameter<T>* parameter;
    Index index;
  };

  struct Finder final : Walk<T> {
    Finder(ParameterStates& s, Make m) : states(s), make(m) {}
    void at_parameter(std::string_view name, Parameter<T>& parameter) override {
      const Index guess = states.places_.count();  // Right in every step except the first.
      states.places_.push_back({&parameter, states.index_of(name, guess, make)});
    }
    ParameterStates& states;
    Make make;
  };

  Index index_of(std::string_view name, Index guess, Make make);

  /// The parameters of `places_`, each with its state.
  const List<Found>& found(std::string_view who);

  /// Puts the states into the order of the model, so that the next step finds them at once.
  void sort(std::string_view who);

  void expect_distinct(std::string_view who);

  List<Named> states_;
  List<Place> places_;  // The parameters of the model at hand.
  List<Found> found_;   // The same, once the states stay where they are.
  List<const Parameter<T>*> addresses_;
};

template <class T, class State>
Index ParameterStates<T, State>::index_of(std::string_view name, Index guess, Make make) {
  if (guess < states_.count() && states_[guess].name == name) return guess;
  const auto known = std::ranges::find(states_, name, &Named::name);
  if (known != states_.end()) return static_cast<Index>(known - states_.begin());
  states_.push_back({std::string(name), make(name)});
  return states_.count() - 1;
}

template <class T, class State>
auto ParameterStates<T, State>::found(std::string_view who) -> const List<Found>& {
  bool in_order = true;
  for (Index i = 0; i < places_.count(); ++i) in_order = in_order && places_[i].index == i;
  if (!in_order) sort(who);
  expect_distinct(who);
  found_.clear();
  for (const Place& place : places_) found_.push_back({place.parameter, &states_[place.index]});
  return found_;
}

template <class T, class State>
void ParameterStates<T, State>::sort(std::string_view who) {
  List<Index> moved_to(states_.count(), -1);
  Index next = 0;
  for (const Place& place : places_) {
    if (moved_to[place.index] >= 0) {
      throw_error<ConfigError>(who, ": two parameters are named ", states_[place.index].name,
                               ", expected different names");
    }
    moved_to[place.index] = next++;
  }
  for (Index& to : moved_to) to = to < 0 ? next++ : to;
  List<Named> sorted(states_.count());
  for (Index i = 0; i < states_.count(); ++i) sorted[moved_to[i]] = std::move(states_[i]);
  states_ = std::move(sorted);
  for (Place& place : places_) place.index = moved_to[place.index];
}

template <class T, class State>
void ParameterStates<T, State>::expect_distinct(std::string_view who) {
  addresses_.clear();
  for (const Place& place : places_) addresses_.push_back(place.parameter);
  std::sort(addresses_.begin(), addresses_.end());
  const auto twice = std::adjacent_find(addresses_.begin(), addresses_.end());
  if (twice == addresses_.end()) return;
  std::string names;
  for (const Place& place : places_) {
    if (place.parameter != *twice) continue;
    names += (names.empty() ? "" : " and ") + states_[place.index].name;
  }
  throw_error<ConfigError>(who, ": ", names, " are the same parameter, expected each once");
}

}  // namespace weir
