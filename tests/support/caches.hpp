// SPDX-License-Identifier: MIT
/// \file
/// Whether `backward` refuses the caches that do not fit.
#pragma once

#include <string>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::test {

/// Gives `layer.backward`, which calls itself `where`, every cache that it has to refuse: an empty
/// one, one of a pass that did not train, another layer's, one that is used up, one of a pass that
/// failed; and a gradient of the wrong shape.
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
}

}  // namespace weir::test
