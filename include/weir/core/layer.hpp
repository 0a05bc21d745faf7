// SPDX-License-Identifier: MIT
/// \file
/// What it takes to be a layer.
#pragma once

#include <concepts>

#include <weir/core/cache_state.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/core/walk.hpp>

namespace weir {

/// A map from [tokens, d_in] to [tokens, d_out] with a hand-written derivative.
///
///     const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;
///     const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache);    adds to gradients, returns dL/dx
///     static void visit(Self& self, Visit& visit);                one line per member, see Walk
///
/// `forward` is const: whatever `backward` will need goes into a `Cache` that the caller owns. One
/// layer can therefore serve many threads, each with its own cache. The cache is the workspace too:
/// results live in it until the next call with that cache. If the cache is kept, the next pass
/// allocates nothing.
///
/// `pass` says whether the pass trains, and more; see Pass. A `CacheState` in the cache lets
/// `backward` refuse a cache that does not fit.
template <class L>
concept Layer = std::floating_point<typename L::Scalar> &&
    std::default_initializable<typename L::Cache> &&
    requires(const L& layer, L& trained, MatrixIn<typename L::Scalar> x, const Pass& pass,
             typename L::Cache& cache, Walk<typename L::Scalar>& walk) {
  { layer.forward(x, pass, cache) } -> std::same_as<const Matrix<typename L::Scalar>&>;
  { trained.backward(x, cache) } -> std::same_as<const Matrix<typename L::Scalar>&>;
  L::visit(trained, walk);
};

/// The output of `layer` for x, for callers that keep no cache.
template <Layer L>
Matrix<typename L::Scalar> infer(const L& layer, MatrixIn<typename L::Scalar> x,
                                 const Pass& pass = {}) {
  typename L::Cache cache;
  return layer.forward(x, pass, cache);
}

}  // namespace weir
