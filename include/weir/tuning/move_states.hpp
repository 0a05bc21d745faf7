// SPDX-License-Identifier: MIT
/// \file
/// What an optimizer remembers about experts, when their numbers change.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/core/walk.hpp>

namespace weir {

namespace detail {

template <class T>
struct RemapExperts final : StorageWalk<T> {
  explicit RemapExperts(const ExpertMap& to) : map(to) {}
  bool only_stored() const override { return false; }
  bool at_node(const Node& node) override {
    const bool is_mixture = node.change_experts(map);
    count += is_mixture ? 1 : 0;
    return !is_mixture;
  }
  const ExpertMap& map;
  Index count = 0;
};

/// Changes the experts of the mixture in `layer`.
/// \throws ConfigError  unless there is one that can be changed.
template <class Layer>
void remap_mixture(std::string_view where, Layer& layer, const ExpertMap& map) {
  RemapExperts<typename Layer::Scalar> walk(map);
  walk("", layer);
  if (walk.count == 1) return;
  throw_error<ConfigError>(where, ": the layer has ", walk.count,
                           " mixtures whose experts can be changed, expected 1");
}

inline std::string in_model(const std::string& layer, const std::string& parameter) {
  return layer.empty() ? parameter : layer + "." + parameter;
}

}  // namespace detail

/// Lets an optimizer's memory follow its parameters when the experts of a mixture change: what it
/// remembers about each parameter goes where the parameter goes, row by row where the router has a
/// row for each expert. That of experts that are gone is forgotten, that of clones is copied, and
/// cold experts start without any.
///
/// A layer is changed like the model, with the optimizer's numbers in the place of its values. That
/// serves every optimizer with the members that SavedState lists.
/// \param name     The name of the layer in the model, such as "layers.3.moe"; "" for the model.
/// \param before   The layer before it was changed by `map`.
template <class Optimizer, class Layer>
void move_states(Optimizer& optimizer, const std::string& name, const Layer& before,
                 const ExpertMap& map) {
  using T = typename Layer::Scalar;
  struct Remembered {
    std::vector<std::pair<std::string, Matrix<T>>> matrices;
    Index steps = 0;
  };
  std::map<std::string, Remembered> all;  // By the names within the layer.
  Layer ghost = before;
  const auto old = parameters(ghost);
  for (const auto& saved : optimizer.saved_states()) {
    for (const auto& [parameter_name, parameter] : old) {
      if (saved.parameter != detail::in_model(name, parameter_name)) continue;
      Remembered& remembered = all[parameter_name];
      for (const auto& [what, matrix] : saved.matrices) {
        remembered.matrices.emplace_back(std::string(what), *matrix);
      }
      for (const auto& [what, matrix] : saved.halves) {
        remembered.matrices.emplace_back(std::string(what), matrix->template cast<T>());
      }
      if (saved.steps != nullptr) remembered.steps = *saved.steps;
    }
  }
  // Cold experts must not be taken for others, nor move the generator that drew their weights.
  Rng unused;
  ExpertMap same = map;
  same.rng = &unused;
  same.cold_logit = 0.0;
  const auto changed = [&](const auto& value_of) {
    Layer layer = before;
    Index number = 0;
    for (auto& [parameter_name, parameter] : parameters(layer)) {
      parameter->value = value_of(parameter_name, parameter->value, number++);
    }
    detail::remap_mixture("move_states", layer, same);
    return layer;
  };
  // Which parameter came from which, by a number that is larger than any drawn weight.
  constexpr Index kFirst = 1000;
  Layer numbered = changed([](const auto& /*name*/, const Matrix<T>& value, Index number) {
    return Matrix<T>(
        Matrix<T>::Constant(value.rows(), value.cols(), static_cast<T>(kFirst + number)));
  });
  std::map<std::string, Remembered> next;
  for (const auto& [new_name, parameter] : parameters(numbered)) {
    const auto number = static_cast<Index>(parameter->value.maxCoeff());
    if (number < kFirst) continue;
    const auto from = all.find(old[static_cast<std::size_t>(number - kFirst)].name);
    if (from != all.end()) next[new_name] = from->second;
  }
  std::vector<std::string> kinds;
  for (const auto& [parameter_name, remembered] : all) {
    for (const auto& [what, matrix] : remembered.matrices) {
      if (std::find(kinds.begin(), kinds.end(), what) == kinds.end()) kinds.push_back(what);
    }
  }
  const auto find = [](Remembered& remembered, const std::string& kind) -> Matrix<T>* {
    for (auto& [what, matrix] : remembered.matrices) {
      if (what == kind) return &matrix;
    }
    return nullptr;
  };
  for (const std::string& kind : kinds) {
    // What is not shaped like its parameter, such as MissedSteps, is the same for all of it.
    bool like_value = true;
    for (const auto& [parameter_name, parameter] : old) {
      const auto found = all.find(parameter_name);
      const Matrix<T>* const matrix = found == all.end() ? nullptr : find(found->second, kind);
      like_value = like_value && (matrix == nullptr || (matrix->rows() == parameter->value.rows() &&
                                                        matrix->cols() == parameter->value.cols()));
    }
    if (!like_value) continue;
    Layer moved = changed([&](const std::string& parameter_name, const Matrix<T>& value, Index) {
      const auto found = all.find(parameter_name);
      const Matrix<T>* const matrix = found == all.end() ? nullptr : find(found->second, kind);
      return matrix != nullptr ? *matrix : Matrix<T>(Matrix<T>::Zero(value.rows(), value.cols()));
    });
    for (const auto& [new_name, parameter] : parameters(moved)) {
      const auto found = next.find(new_name);
      if (found == next.end()) continue;
      if (Matrix<T>* const matrix = find(found->second, kind)) *matrix = parameter->value;
    }
  }
  for (const auto& [parameter_name, parameter] : old) {
    optimizer.forget(detail::in_model(name, parameter_name));
  }
  for (auto& [new_name, remembered] : next) {
    auto state = optimizer.saved_state(detail::in_model(name, new_name));
    for (auto& [what, matrix] : state.matrices) {
      for (auto& [kind, values] : remembered.matrices) {
        if (kind == what) *matrix = std::move(values);
      }
    }
    for (auto& [what, matrix] : state.halves) {
      for (const auto& [kind, values] : remembered.matrices) {
        if (kind == what) *matrix = values.template cast<Eigen::bfloat16>();
      }
    }
    if (state.steps != nullptr) *state.steps = remembered.steps;
  }
}

}  // namespace weir
