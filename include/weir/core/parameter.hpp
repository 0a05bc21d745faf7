// SPDX-License-Identifier: MIT
/// \file
/// Trainable tensors and other saved state.
#pragma once

#include <string>

#include <weir/core/precision.hpp>
#include <weir/core/types.hpp>
#include <weir/core/zeros.hpp>

namespace weir {

/// The rows of a matrix that are read from elsewhere, some at a time.
template <class T>
class RowReader {
 public:
  RowReader() = default;
  RowReader(const RowReader&) = delete;
  RowReader& operator=(const RowReader&) = delete;
  virtual ~RowReader() = default;

  /// Writes the rows [first, first + count) to `to`, one behind the other. May be called by several
  /// threads at once.
  virtual void read(Index first, Index count, T* to) const = 0;
};

/// A trainable matrix and the gradient of the loss with respect to it.
template <class T>
struct Parameter {
  Matrix<T> value;
  Matrix<T> grad = {};  ///< Empty until the first backward pass; accumulates.
  bool frozen = false;  ///< A frozen parameter keeps its value; optimizers skip it.
  /// What computes products with it, see `set_precision`; null in full precision. Only floats are
  /// ever rounded.
  const RoundedProducts* rounded = nullptr;

  /// Not null only while a model is being loaded: then `value` has its shape and no numbers yet.
  /// They are still elsewhere, from where `set_storage` fetches them, or else `settle`.
  const RowReader<T>* rows = nullptr;
  bool fresh = false;    ///< The gradient was empty before this step, see `discard`.
  bool reached = false;  ///< Whether `gradient` was called since the last step.

  Precision precision() const { return rounded == nullptr ? Precision::kFull : rounded->precision; }

  /// Whether an optimizer moves it.
  bool learns() const { return !frozen && grad.size() > 0; }

  /// The gradient, zeroed and sized like `value` on first use, to be added to.
  Matrix<T>& gradient() {
    reached = true;
    if (grad.size() == 0) {
      set_zero_in_parallel(grad, value.rows(), value.cols());
      fresh = true;
    }
    return grad;
  }

  /// Makes the gradient what it was after the last step: zero, or empty if there was none.
  void discard_gradient() {
    if (fresh) grad.resize(0, 0);
    set_zero_in_parallel(grad);
    reached = false;
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
