// SPDX-License-Identifier: MIT
/// \file
/// Whether `backward` refuses the caches that do not fit, and a cache serves pass after pass.
#pragma once

#include <string>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/verbs.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::test {

/// Whether two gradients are the same to the last bit; an empty one stands for zeros.
template <class T>
bool same_gradients(const Matrix<T>& a, const Matrix<T>& b) {
  if (a.size() == 0) return b.isZero(T(0));
  return b.size() == 0 ? a.isZero(T(0)) : a == b;
}

/// Gives a cache passes with more tokens and with fewer, and checks that it serves as a new one
/// after that, to the last bit.
template <class L>
void check_reused_caches(const L& layer, const Matrix<typename L::Scalar>& x) {
  using T = typename L::Scalar;
  L own = layer;
  const auto all_of = [&](typename L::Cache& cache) {
    zero_gradients(own);
    std::vector<Matrix<T>> all = {own.forward(x, kTraining, cache)};
    const Matrix<T> dy = all.front();
    all.push_back(own.backward(dy, cache));
    for (const auto& [name, parameter] : parameters(own)) all.push_back(parameter->grad);
    return all;
  };
  typename L::Cache fresh, used;
  const auto expected = all_of(fresh);
  const Matrix<T> more = random_matrix<T>(3 * x.rows() + 5, x.cols(), 91);
  const Matrix<T> dy = own.forward(more, kTraining, used);
  own.backward(dy, used);
  own.forward(random_matrix<T>(1, x.cols(), 92), Pass{}, used);
  const auto again = all_of(used);
  for (std::size_t i = 0; i < expected.size(); ++i) CHECK(same_gradients(expected[i], again[i]));
  own.forward(Matrix<T>(0, x.cols()), kTraining, used);
  own.backward(Matrix<T>(0, expected.front().cols()), used);
  CHECK(own.forward(x, kTraining, used) == expected.front());
}

/// Gives `layer.backward`, which calls itself `where`, every cache that it has to refuse: an empty
/// one, one of a pass that did not train, another layer's, one that is used up, one of a pass that
/// failed; and a gradient of the wrong shape. Then `check_reused_caches`.
template <class L>
void check_refused_caches(L& layer, const Matrix<typename L::Scalar>& x, const std::string& where) {
  using M = Matrix<typename L::Scalar>;
  const M dy = infer(layer, x);
  const M longer = M::Zero(dy.rows() + 1, dy.cols());
  const M wider = M::Zero(x.rows(), x.cols() + 1);
  const std::string empty = where + ": the cache is empty, expected a forward pass that succeeded";
  typename L::Cache cache;
  const auto refusal = [&](L& of) {
    return message_of<StateError>([&] { of.backward(dy, cache); });
  };
  CHECK(refusal(layer) == empty);

  layer.forward(x, Pass{}, cache);
  CHECK(refusal(layer) ==
        where + ": the forward pass did not train, expected one with pass.training = true");

  layer.forward(x, kTraining, cache);
  L other = layer;
  CHECK(refusal(other) ==
        where + ": the cache was filled by another layer, expected a forward pass of this one");
  CHECK(message_of<ShapeError>([&] { layer.backward(longer, cache); }) ==
        where + ": dy is " + shape_of(longer) + ", expected " + shape_of(dy));

  layer.backward(dy, cache);
  CHECK(refusal(layer) ==
        where +
            ": the cache was used by a backward pass already, expected a forward pass between "
            "the two");

  layer.forward(x, kTraining, cache);
  CHECK_THROWS_AS(layer.forward(wider, kTraining, cache), ShapeError);
  CHECK(refusal(layer) == empty);

  check_reused_caches(layer, x);
}

}  // namespace weir::test
