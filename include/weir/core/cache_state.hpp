// SPDX-License-Identifier: MIT
/// \file
/// Which layer a cache belongs to, and whether a backward pass may follow.
#pragma once

#include <cstdint>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A member of every layer's cache. It knows which layer's forward pass filled the cache. It makes
/// `backward` refuse a cache that is empty, belongs to another layer, comes from a pass that did
/// not train, or was used by a backward pass already.
///
///     const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
///       cache.state.begin();
///       ...
///       return cache.state.finish(*this, pass, cache.y);
///     }
///     const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
///       cache.state.begin_backward("MyLayer::backward", *this, dy);
///       ...
///     }
///
/// A layer that is moved between its forward and its backward pass counts as another one.
class CacheState {
 public:
  /// The cache holds no pass until `finish`, so that a forward pass that throws leaves none.
  void begin() { stage_ = Stage::kEmpty; }

  /// The forward pass of `layer` succeeded with the result `y`, which is returned.
  template <class Layer, class Result>
  const Result& finish(const Layer& layer, const Pass& pass, const Result& y) {
    owner_ = &layer;
    rows_ = y.rows();
    cols_ = y.cols();
    stage_ = pass.training ? Stage::kTrained : Stage::kInferred;
    return y;
  }

  /// Whether the last forward pass succeeded.
  bool is_filled() const { return stage_ != Stage::kEmpty; }

  /// Marks the cache as used.
  /// \param where    The name of the function, for messages.
  /// \param dy       The gradient of the result.
  /// \param name     What `layer` calls it, for messages.
  /// \throws StateError   unless the last forward pass with this cache was one of `layer`,
  ///                      succeeded, trained, and has had no backward pass.
  /// \throws ShapeError   if dy does not have the shape of the result.
  template <class Layer, class Gradient>
  void begin_backward(std::string_view where, const Layer& layer, const Gradient& dy,
                      std::string_view name = "dy") {
    expect_backward(where, &layer);
    expect_shape(where, name, dy, rows_, cols_);
    stage_ = Stage::kSpent;
  }

 private:
  enum class Stage : std::uint8_t { kEmpty, kInferred, kTrained, kSpent };

  void expect_backward(std::string_view where, const void* layer) const {
    if (stage_ == Stage::kEmpty) {
      throw_error<StateError>(where,
                              ": the cache is empty, expected a forward pass that succeeded");
    }
    if (owner_ != layer) {
      throw_error<StateError>(
          where,
          ": the cache was filled by another layer, expected a forward pass of this "
          "one");
    }
    if (stage_ == Stage::kInferred) {
      throw_error<StateError>(
          where, ": the forward pass did not train, expected one with pass.training = true");
    }
    if (stage_ == Stage::kSpent) {
      throw_error<StateError>(
          where,
          ": the cache was used by a backward pass already, expected a forward pass "
          "between the two");
    }
  }

  const void* owner_ = nullptr;
  Index rows_ = 0;
  Index cols_ = 0;
  Stage stage_ = Stage::kEmpty;
};

}  // namespace weir
