// SPDX-License-Identifier: MIT
/// \file
/// Trainable tensors, and one way to walk them: for optimizers, checkpoints
/// and tests alike.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>

namespace weir {

/// A trainable matrix and the gradient of the loss with respect to it.
template <class T>
struct Parameter {
  Matrix<T> value;
  Matrix<T> grad = {};  ///< Empty until the first backward pass; accumulates.
  bool frozen = false;  ///< A frozen parameter keeps its value; optimizers pass it by.

  /// The gradient, zeroed and sized like `value` on first use.
  Matrix<T>& gradient() {
    if (grad.size() == 0) grad.setZero(value.rows(), value.cols());
    return grad;
  }
};

/// State that is saved with the parameters and never trained by gradient,
/// such as the selection bias of loss-free balancing.
template <class T>
struct Buffer {
  Matrix<T> value;
};

/// A parameter under its checkpoint name, such as "experts.3.down".
template <class T>
struct NamedParameter {
  std::string name;
  Parameter<T>* parameter;
};

/// A buffer under its checkpoint name, such as "selector.bias".
template <class T>
struct NamedBuffer {
  std::string name;
  Buffer<T>* buffer;
};

/// Walks a layer tree. A layer hands its members over in a static `visit`, one
/// line each; members are parameters, buffers, layers or vectors of those.
template <class T>
class Collector {
 public:
  void operator()(std::string_view name, Parameter<T>& parameter) {
    parameters.push_back({path_ + std::string(name), &parameter});
  }

  void operator()(std::string_view name, Buffer<T>& buffer) {
    buffers.push_back({path_ + std::string(name), &buffer});
  }

  template <class Layer>
  void operator()(std::string_view name, Layer& layer) {
    const std::size_t parent = path_.size();
    path_.append(name).append(".");
    Layer::visit(layer, *this);
    path_.resize(parent);
  }

  /// Members are named `name.0`, `name.1`, ...
  template <class Member>
  void operator()(std::string_view name, std::vector<Member>& members) {
    for (std::size_t i = 0; i < members.size(); ++i) {
      (*this)(std::string(name) + "." + std::to_string(i), members[i]);
    }
  }

  std::vector<NamedParameter<T>> parameters;
  std::vector<NamedBuffer<T>> buffers;

 private:
  std::string path_;
};

/// Every parameter of `layer` under its dotted name, in checkpoint order. The
/// pointers stay valid as long as the layer lives and is not moved.
template <class Layer>
auto parameters(Layer& layer) {
  Collector<typename Layer::Scalar> collect;
  Layer::visit(layer, collect);
  return std::move(collect.parameters);
}

/// Every buffer of `layer`, likewise.
template <class Layer>
auto buffers(Layer& layer) {
  Collector<typename Layer::Scalar> collect;
  Layer::visit(layer, collect);
  return std::move(collect.buffers);
}

/// Sets every gradient of `layer` to zero.
template <class Layer>
void zero_gradients(Layer& layer) {
  for (auto& [name, parameter] : parameters(layer)) parameter->grad.setZero();
}

/// How many numbers `layer` trains.
template <class Layer>
Index parameter_count(Layer& layer) {
  Index count = 0;
  for (auto& [name, parameter] : parameters(layer)) count += parameter->value.size();
  return count;
}

}  // namespace weir
