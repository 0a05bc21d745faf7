// SPDX-License-Identifier: MIT
/// \file
/// The parameters of one expert, and which axes of them are its neurons.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/tuning/neuron_matching.hpp>

namespace weir {

/// Where the neurons of an expert, its hidden numbers, are in one of its parameters.
enum class NeuronAxis { kRows, kColumns, kNone };

/// One parameter of an expert.
template <class T>
struct ExpertPart {
  std::string name;       ///< Of the parameter within the expert, such as "gate".
  std::string full_name;  ///< Within the layer, such as "experts.3.gate".
  Parameter<T>* parameter = nullptr;
  NeuronAxis axis = NeuronAxis::kNone;
  bool is_output = false;  ///< Whether the expert yields zero where all such parameters are zero.
};

namespace detail {

struct PartKind {
  std::string_view name;
  NeuronAxis axis;
  bool is_output;
};

inline constexpr auto kPartKinds = std::to_array<PartKind>({
    {"gate", NeuronAxis::kRows, false},
    {"up", NeuronAxis::kRows, false},
    {"in", NeuronAxis::kRows, false},
    {"gate_bias", NeuronAxis::kColumns, false},
    {"up_bias", NeuronAxis::kColumns, false},
    {"in_bias", NeuronAxis::kColumns, false},
    {"down", NeuronAxis::kColumns, true},
    {"out", NeuronAxis::kColumns, true},
    {"down_bias", NeuronAxis::kNone, true},
    {"out_bias", NeuronAxis::kNone, true},
});

}  // namespace detail

/// The parameters of expert `expert` of a layer with one mixture, whose bank is a GluBank, MlpBank
/// or ClampedGluBank, also within wrappers.
/// \throws ConfigError  if there is no such expert, it is of another kind, or there are several
///                      mixtures.
/// \throws StateError   if it has adapters, or is stored for inference.
template <class Layer>
auto expert_parts(std::string_view where, Layer& layer, Index expert) {
  using T = typename Layer::Scalar;
  if (!is_trainable(layer)) {
    throw_error<StateError>(where, ": weights are stored for inference, expected ",
                            "Storage::kTrainable");
  }
  const std::string path = "experts." + std::to_string(expert) + ".";
  std::vector<ExpertPart<T>> parts;
  for (const auto& [name, parameter] : parameters(layer)) {
    const std::size_t at = name.find(path);
    if (at == std::string::npos || (at > 0 && name[at - 1] != '.')) continue;
    const std::string own = name.substr(at + path.size());
    if (own.find(".lora_") != std::string::npos) {
      throw_error<StateError>(where, ": expert ", expert,
                              " has an adapter, expected merge_lora and remove_lora before");
    }
    const auto* const kind = std::find_if(detail::kPartKinds.begin(), detail::kPartKinds.end(),
                                          [&](const auto& k) { return k.name == own; });
    if (kind == detail::kPartKinds.end()) {
      throw_error<ConfigError>(where, ": expert ", expert, " has a parameter '", own,
                               "', expected one of GluBank, MlpBank or ClampedGluBank");
    }
    for (const auto& part : parts) {
      if (part.name == own) {
        throw_error<ConfigError>(where, ": the layer has several mixtures, expected one");
      }
    }
    parts.push_back({own, name, parameter, kind->axis, kind->is_output});
  }
  if (parts.empty()) {
    throw_error<ConfigError>(where, ": expert = ", expert, ", expected one that the layer has");
  }
  return parts;
}

/// The permutation of the neurons of `other` that makes its weights most like those of `expert`:
///
///     max over p of sum over weights W of <W_expert, W_other permuted by p>
///
/// as its output does not depend on the order of its neurons. Neuron i of `expert` corresponds to
/// p_i of `other`. (Ainsworth et al. 2022, arXiv:2209.04836, eq. 1 for one hidden layer; for
/// experts: Li et al. 2023, arXiv:2310.01334, section 3.2.)
/// \throws ShapeError   if the two differ in shape.
template <class T>
std::vector<Index> match_neurons(const std::vector<ExpertPart<T>>& expert,
                                 const std::vector<ExpertPart<T>>& other) {
  Matrix<double> alike;
  for (std::size_t i = 0; i < expert.size(); ++i) {
    if (expert[i].axis == NeuronAxis::kNone) continue;
    const Matrix<double> a = expert[i].parameter->value.template cast<double>();
    const Matrix<double> b = other[i].parameter->value.template cast<double>();
    expect_shape("match_neurons", other[i].full_name, b, a.rows(), a.cols());
    const bool rows = expert[i].axis == NeuronAxis::kRows;
    const Index neurons = rows ? a.rows() : a.cols();
    if (alike.size() == 0) alike.setZero(neurons, neurons);
    if (rows) {
      multiply_nt<double>(a, b, alike, true);
    } else {
      multiply_tn<double>(a, b, alike, true);
    }
  }
  return best_assignment(alike);
}

/// A value of an expert with its neurons in another order: neuron i is neuron `order[i]` of before.
template <class T>
Matrix<T> with_neurons(const Matrix<T>& value, NeuronAxis axis, const std::vector<Index>& order) {
  if (axis == NeuronAxis::kNone) return value;
  Matrix<T> permuted(value.rows(), value.cols());
  for (std::size_t i = 0; i < order.size(); ++i) {
    const auto to = static_cast<Index>(i);
    if (axis == NeuronAxis::kRows) {
      permuted.row(to) = value.row(order[i]);
    } else {
      permuted.col(to) = value.col(order[i]);
    }
  }
  return permuted;
}

}  // namespace weir
