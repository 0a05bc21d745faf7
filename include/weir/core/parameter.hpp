// SPDX-License-Identifier: MIT
/// \file
/// Trainable tensors and other saved state.
#pragma once

#include <string>

#include <weir/core/types.hpp>

namespace weir {

/// A trainable matrix and the gradient of the loss with respect to it.
template <class T>
struct Parameter {
  Matrix<T> value;
  Matrix<T> grad = {};  ///< Empty until the first backward pass; accumulates.
  bool frozen = false;  ///< A frozen parameter keeps its value; optimizers skip it.
  bool fresh = false;   ///< The gradient was empty before this step, see `discard`.

  /// Whether an optimizer moves it.
  bool learns() const { return !frozen && grad.size() > 0; }

  /// The gradient, zeroed and sized like `value` on first use.
  Matrix<T>& gradient() {
    if (grad.size() == 0) {
      grad.setZero(value.rows(), value.cols());
      fresh = true;
    }
    return grad;
  }

  /// Makes the gradient what it was after the last step: zero, or empty if there was none.
  void discard_gradient() {
    if (fresh) grad.resize(0, 0);
    grad.setZero();
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

}  // namespace weir
