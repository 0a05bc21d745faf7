// SPDX-License-Identifier: MIT
/// \file
/// Routings with noise, as noisy routers make them.
#pragma once

#include <utility>
#include <vector>

#include <weir/moe/routing.hpp>

namespace weir::test {

/// A routing that owns the noise it tells of.
template <class T>
struct NoisyRouting : Routing<T> {
  NoisyRouting(Routing<T> routing, std::vector<NoiseLevel<T>> own)
      : Routing<T>(std::move(routing)), levels(std::move(own)) {
    this->noise = levels;
  }
  NoisyRouting(NoisyRouting&&) = default;

  std::vector<NoiseLevel<T>> levels;
};

}  // namespace weir::test
