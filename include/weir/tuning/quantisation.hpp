// SPDX-License-Identifier: MIT
/// \file
/// What a storage costs a model in accuracy, and rounding that is calibrated by sample text.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/input_samples.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/storage_rules.hpp>
#include <weir/core/types.hpp>
#include <weir/core/walk.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/tuning/gptq.hpp>

namespace weir {

/// One weight of a StorageReport.
struct StoredWeight {
  std::string name;  ///< Of the parameter, such as "layers.3.moe.experts.0.gate".
  Storage storage = Storage::kTrainable;
  Index rows = 0, cols = 0;
  std::size_t bytes = 0;      ///< In that storage, by itself.
  double weight_error = 0.0;  ///< ||stored weight - weight|| / ||weight||
  /// ||stored product - product|| / ||product|| for the samples of its inputs, tokens rounded where
  /// the storage does that. -1 without samples.
  double output_error = -1.0;
};

/// What storing a model costs.
struct StorageReport {
  std::vector<StoredWeight> weights;

  std::size_t bytes() const {
    std::size_t sum = 0;
    for (const StoredWeight& weight : weights) sum += weight.bytes;
    return sum;
  }
};

namespace detail {

/// Calls `weight(name, parameter, storage)` for each matrix that the rules store.
template <class T>
struct WalkStoredWeights : Walk<T> {
  WalkStoredWeights(std::string_view who, const StorageRules& all) : caller(who), rules(all) {}
  bool only_stored() const final { return true; }
  bool with_adapters() const final { return false; }
  bool at_node(const Node& node) final {
    if (inside && this->path().starts_with(part)) return true;
    inside = node.stores_itself();
    if (!inside) return !node.set_storage_exists();
    part = this->path();
    std::string_view name = part;
    if (!name.empty()) name.remove_suffix(1);  // The dot.
    storage = storage_of(rules, name);
    if (storage != nullptr && node.storage() != Storage::kTrainable) {
      throw_error<StateError>(caller, ": part '", name,
                              "' is stored for inference, expected Storage::kTrainable");
    }
    return true;
  }
  void at_parameter(std::string_view name, Parameter<T>& parameter) final {
    // Biases, norms and sinks, which are rows, stay parameters in every storage.
    const bool is_matrix = parameter.value.rows() > 1 && parameter.value.cols() > 1;
    if (!inside || !name.starts_with(part) || !is_matrix || storage == nullptr) return;
    if (*storage != Storage::kTrainable) at_weight(name, parameter, *storage);
  }
  virtual void at_weight(std::string_view name, Parameter<T>& weight, Storage how) = 0;

  std::string_view caller;  // The function that needs the walk, for messages.
  const StorageRules& rules;
  bool inside = false;  // Of a part that stores its weights as a whole,
  std::string part;     // whose path this is.
  const Storage* storage = nullptr;
};

template <class T>
struct ReportStorage final : WalkStoredWeights<T> {
  ReportStorage(const StorageRules& all, const InputSamples* inputs)
      : WalkStoredWeights<T>("storage_report", all), samples(inputs) {}

  void at_weight(std::string_view name, Parameter<T>& weight, Storage how) override {
    const Matrix<T>& w = weight.value;
    StoredWeight line = {
        .name = std::string(name), .storage = how, .rows = w.rows(), .cols = w.cols()};
    line.bytes = kernels::PackedWeight<T>::bytes(w.rows(), w.cols(), how);
    const kernels::PackedWeight<T> packed(w, how);
    Matrix<T> stored;
    packed.unpack(stored);
    line.weight_error = relative(stored, w);
    const Matrix<T> x =
        samples == nullptr ? Matrix<T>(0, w.cols()) : samples->of(weight).template cast<T>();
    if (x.rows() > 0) {
      Matrix<T> exact(x.rows(), w.rows());
      Matrix<T> rounded(x.rows(), w.rows());
      multiply_nt<T>(x, w, exact);
      const kernels::PackedTo<T> to = {&packed, 0, x.rows(), rounded.data(), rounded.cols()};
      kernels::multiply_packed<T>(x, {&to, 1});
      line.output_error = relative(rounded, exact);
    }
    report.weights.push_back(std::move(line));
  }

  static double relative(const Matrix<T>& a, const Matrix<T>& b) {
    const auto norm = static_cast<double>(b.norm());
    const auto off = static_cast<double>((a - b).norm());
    return norm > 0.0 ? off / norm : off;
  }

  const InputSamples* samples;
  StorageReport report;
};

template <class T>
struct Calibrate final : WalkStoredWeights<T> {
  Calibrate(const StorageRules& all, const InputSamples& inputs, double damp)
      : WalkStoredWeights<T>("calibrate", all), samples(inputs), damping(damp) {}

  void at_weight(std::string_view /*name*/, Parameter<T>& weight, Storage how) override {
    if (kernels::code_of(how) != kernels::Code::kInt4) return;
    const Matrix<float> x = samples.of(weight);
    if (x.rows() == 0) return;
    round_to_int4_for<T>(x, damping, weight.value);
    ++count;
  }

  const InputSamples& samples;
  double damping;
  Index count = 0;
};

}  // namespace detail

/// What the weights of `layer`, all of them parameters, become if they are stored by `rules`, and
/// how far that moves their products with sampled inputs. Nothing is changed.
///
///     InputSamples samples;
///     model.forward(text, {.inputs = &samples}, cache);
///     const StorageReport report = storage_report(model, {{"*.experts", Storage::kInt4}},
///     &samples);
///
/// \throws StateError   if a part that the rules store is stored for inference already.
template <class Layer>
StorageReport storage_report(Layer& layer, const StorageRules& rules,
                             const InputSamples* samples = nullptr) {
  detail::ReportStorage<typename Layer::Scalar> walk(rules, samples);
  walk("", layer);
  return std::move(walk.report);
}

/// Rounds the weights that `rules` store with 4 bits (kInt4, kInt4Dot) so that their products with
/// the sampled inputs change as little as possible, see `round_to_int4_for`. They stay parameters,
/// whose values the storage then keeps as they are:
///
///     InputSamples samples;
///     model.forward(text, {.inputs = &samples}, cache);
///     calibrate(model, rules, samples);
///     set_storage(model, rules);
///
/// Weights without samples, such as those of experts that no token came to, are left to plain
/// rounding. The time grows with the square of the inputs of a weight.
/// \param damping       See `round_to_int4_for`.
/// \return              How many weights were rounded.
/// \throws ConfigError  unless damping > 0.
/// \throws StateError   if a part that the rules store is stored for inference already.
template <class Layer>
Index calibrate(Layer& layer, const StorageRules& rules, const InputSamples& samples,
                double damping = 0.01) {
  expect_positive("calibrate", "damping", damping);
  detail::Calibrate<typename Layer::Scalar> walk(rules, samples, damping);
  walk("", layer);
  return walk.count;
}

}  // namespace weir
