// SPDX-License-Identifier: MIT
/// \file
/// What can be done to a whole tree of layers. Each verb reaches every part: routers, selectors,
/// capacity policies, experts, balancers, and what wrappers wrap.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/name_pattern.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/core/walk.hpp>
#include <weir/core/zeros.hpp>

namespace weir {

namespace detail {

template <class T>
struct CollectTensors final : Walk<T> {
  std::vector<NamedParameter<T>> parameters;
  std::vector<NamedBuffer<T>> buffers;

  void at_parameter(std::string_view name, Parameter<T>& parameter) override {
    parameters.push_back({std::string(name), &parameter});
  }
  void at_buffer(std::string_view name, Buffer<T>& buffer) override {
    buffers.push_back({std::string(name), &buffer});
  }
};

template <class T>
struct CollectLinears final : Walk<T> {
  explicit CollectLinears(std::string_view names) : pattern(names) {}
  void at_linear(std::string_view name, LinearParameter<T>& weight) override {
    if (matches_pattern(pattern, name)) weights.push_back({std::string(name), &weight});
  }
  std::string_view pattern;
  std::vector<NamedLinear<T>> weights;
};

template <class T>
struct ZeroGradients final : Walk<T> {
  void at_parameter(std::string_view /*name*/, Parameter<T>& parameter) override {
    set_zero_in_parallel(parameter.grad);
    parameter.reached = false;
  }
};

template <class T>
struct UpdateNodes final : Walk<T> {
  void at_parameter(std::string_view /*name*/, Parameter<T>& parameter) override {
    parameter.fresh = parameter.reached = false;
  }
  bool at_node(const Node& node) override {
    node.update();
    return true;
  }
};

template <class T>
struct DiscardStep final : Walk<T> {
  void at_parameter(std::string_view /*name*/, Parameter<T>& parameter) override {
    parameter.discard_gradient();
  }
  bool at_node(const Node& node) override {
    node.discard();
    return true;
  }
};

template <class T>
struct ExpectStorable final : Walk<T> {
  explicit ExpectStorable(Storage wanted) : storage(wanted) {}
  bool at_node(const Node& node) override {
    node.expect_storable(storage);
    return true;
  }
  Storage storage;
};

template <class T>
struct SetStorage final : StorageWalk<T> {
  explicit SetStorage(Storage wanted) : storage(wanted) {}
  bool at_node(const Node& node) override { return !node.set_storage(storage); }
  Storage storage;
};

template <class T>
struct FindStored final : Walk<T> {
  bool at_node(const Node& node) override {
    all_trainable = all_trainable && node.is_trainable();
    return all_trainable;
  }
  bool all_trainable = true;
};

template <class T>
struct Settle final : Walk<T> {
  void at_parameter(std::string_view /*name*/, Parameter<T>& parameter) override {
    if (parameter.rows == nullptr) return;
    Matrix<T>& value = parameter.value;
    parallel_rows(value.rows(), value.cols(), [&](Index begin, Index end) {
      parameter.rows->read(begin, end - begin, &value(begin, 0));
    });
    parameter.rows = nullptr;
  }
};

template <class T>
struct Freeze final : Walk<T> {
  Freeze(std::string_view names, bool freeze) : pattern(names), frozen(freeze) {}
  void at_parameter(std::string_view name, Parameter<T>& parameter) override {
    if (!matches_pattern(pattern, name)) return;
    parameter.frozen = frozen;
    ++count;
  }
  std::string_view pattern;
  bool frozen;
  Index count = 0;
};

}  // namespace detail

/// Every parameter of `layer` under its dotted name, in checkpoint order. The
/// pointers stay valid as long as the layer lives and is not moved.
template <class Layer>
std::vector<NamedParameter<typename Layer::Scalar>> parameters(Layer& layer) {
  detail::CollectTensors<typename Layer::Scalar> collect;
  collect("", layer);
  return std::move(collect.parameters);
}

/// Every buffer of `layer`, as `parameters` lists the parameters.
template <class Layer>
std::vector<NamedBuffer<typename Layer::Scalar>> buffers(Layer& layer) {
  detail::CollectTensors<typename Layer::Scalar> collect;
  collect("", layer);
  return std::move(collect.buffers);
}

/// The weights of the linear maps of `layer` whose names match `pattern`, in the order of the
/// model, in any storage. These can have adapters.
template <class Layer>
std::vector<NamedLinear<typename Layer::Scalar>> linear_weights(Layer& layer,
                                                                std::string_view pattern = "*") {
  detail::CollectLinears<typename Layer::Scalar> collect(pattern);
  collect("", layer);
  return std::move(collect.weights);
}

/// Sets every gradient of `layer` to zero.
template <class Layer>
void zero_gradients(Layer& layer) {
  detail::ZeroGradients<typename Layer::Scalar> zero;
  zero("", layer);
}

/// How many numbers `layer` trains.
template <class Layer>
Index parameter_count(Layer& layer) {
  Index count = 0;
  for (auto& [name, parameter] : parameters(layer)) count += parameter->value.size();
  return count;
}

/// Ends a step: runs everything that acts between optimizer steps (balancing rules, adaptive
/// capacities, schedules), and lets `discard` know that this step was taken. Optimizers call it at
/// the end of their `step`; call it yourself only if you update the parameters without one.
template <class Layer>
void update(Layer& layer) {
  detail::UpdateNodes<typename Layer::Scalar> walk;
  walk("", layer);
}

/// Gives up a step instead of taking it: makes every gradient what it was after the last step
/// (zero, or empty where no batch had reached the parameter), and lets balancing rules and adaptive
/// capacities forget what they counted in the backward passes since then. The next steps are those
/// of a training that never saw these batches; only what forward passes drew from a generator stays
/// drawn. `clip_global_norm` calls it where it throws.
template <class Layer>
void discard(Layer& layer) {
  detail::DiscardStep<typename Layer::Scalar> walk;
  walk("", layer);
}

/// Makes sure that `set_storage` can store all weights of `layer` as `storage` says.
/// \throws StateError   if the weights of a layer in `layer` cannot be stored like that: see
///                      GluBank::set_source.
template <class Layer>
void expect_storable(Layer& layer, Storage storage) {
  detail::ExpectStorable<typename Layer::Scalar> walk(storage);
  walk("", layer);
}

/// Stores the weights of `layer` and of all layers in it as `storage` says; layers that have no
/// large weights stay as they are. From `kPacked` and back, every bit is kept; from the
/// other storages the rounded values come back. With `kTrainable` the parameters return, without
/// gradients until the next backward pass.
///
///     set_storage(decoder, Storage::kBfloat16);   // after loading or training, before inference
///
/// Pointers to parameters are no longer valid afterwards. If memory runs out, each layer is stored
/// either way and can be used; another call goes on with the others.
/// \throws StateError   as `expect_storable`; nothing has changed then.
template <class Layer>
void set_storage(Layer& layer, Storage storage) {
  expect_storable(layer, storage);
  detail::SetStorage<typename Layer::Scalar> walk(storage);
  walk("", layer);
}

/// Fetches the value of each parameter of `layer` that is still elsewhere, see Parameter::rows.
template <class Layer>
void settle(Layer& layer) {
  detail::Settle<typename Layer::Scalar> walk;
  walk("", layer);
}

/// Whether all weights of `layer` are parameters: none is stored for inference.
template <class Layer>
bool is_trainable(Layer& layer) {
  detail::FindStored<typename Layer::Scalar> walk;
  walk("", layer);
  return walk.all_trainable;
}

/// Freezes each parameter whose name matches `pattern`, in which '*' stands for any characters:
///
///     freeze(decoder, "*.router.*");
///
/// Optimizers leave a frozen parameter's value alone. The weights of linear maps get no gradient
/// while they are frozen, which saves a third of their work; other parameters, all small but the
/// embedding, do.
/// \return              How many parameters matched.
/// \throws ConfigError  if none does.
template <class Layer>
Index freeze(Layer& layer, std::string_view pattern, bool frozen = true) {
  detail::Freeze<typename Layer::Scalar> walk(pattern, frozen);
  walk("", layer);
  if (walk.count == 0) {
    throw_error<ConfigError>("freeze: no parameter matches '", pattern, "', expected at least one");
  }
  return walk.count;
}

/// The opposite of `freeze`.
template <class Layer>
Index unfreeze(Layer& layer, std::string_view pattern) {
  return freeze(layer, pattern, false);
}

}  // namespace weir
