// SPDX-License-Identifier: MIT
/// \file
/// What it takes to be a layer.
#pragma once

#include <concepts>
#include <utility>

#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A map from [tokens, d_in] to [tokens, d_out] with a hand-written derivative.
///
///     Matrix<T> forward(MatrixIn<T> x) const;                  inference, keeps nothing
///     const Matrix<T>& forward(MatrixIn<T> x, Cache&) const;   the hot path
///     const Matrix<T>& backward(MatrixIn<T> dy, Cache&);       adds to gradients, returns dL/dx
///     static void visit(Self& self, Visit& visit);             one line per member
///
/// `forward` is const: whatever `backward` will need goes into a `Cache` that the caller owns. One
/// layer can therefore serve many threads, each with its own cache. The cache is the workspace too:
/// results live in it until the next call that is given it, and a cache that is kept makes the next
/// pass allocate nothing. A layer of a user's own may also return its results by value.
///
/// A layer that depends on more than the token matrix (padding, sequences, training or not) offers
/// `forward(x, pass, cache)` beside `forward(x, cache)`; `apply` calls the right one.
template <class L>
concept Layer = std::floating_point<typename L::Scalar> &&
    std::default_initializable<typename L::Cache> &&
    requires(const L& layer, L& trained, MatrixIn<typename L::Scalar> x, typename L::Cache& cache,
             Collector<typename L::Scalar>& collector) {
  { layer.forward(x) } -> std::same_as<Matrix<typename L::Scalar>>;
  { layer.forward(x, cache) } -> std::convertible_to<const Matrix<typename L::Scalar>&>;
  { trained.backward(x, cache) } -> std::convertible_to<const Matrix<typename L::Scalar>&>;
  L::visit(trained, collector);
};

/// A layer whose forward pass looks at the circumstances.
template <class L>
concept PassLayer = Layer<L> && requires(const L& layer, MatrixIn<typename L::Scalar> x,
                                         const Pass& pass, typename L::Cache& cache) {
  layer.forward(x, pass, cache);
};

/// `layer.forward(x, pass, cache)` where the layer takes a pass, else `layer.forward(x, cache)`.
template <Layer L>
decltype(auto) apply(const L& layer, MatrixIn<typename L::Scalar> x, const Pass& pass,
                     typename L::Cache& cache) {
  if constexpr (PassLayer<L>) {
    return layer.forward(x, pass, cache);
  } else {
    return layer.forward(x, cache);
  }
}

/// The result of a layer as something that stays: one by reference lives in the layer's cache, one
/// by value is moved to `place`.
template <class T>
const Matrix<T>& keep(Matrix<T>& /*place*/, const Matrix<T>& result) {
  return result;
}
template <class T>
const Matrix<T>& keep(Matrix<T>& place, Matrix<T>&& result) {
  place = std::move(result);
  return place;
}

}  // namespace weir
