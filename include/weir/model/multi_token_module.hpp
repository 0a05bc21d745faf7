// SPDX-License-Identifier: MIT
/// \file
/// The parts of a module that predicts further tokens.
#pragma once

#include <concepts>

#include <weir/model/any_layer.hpp>
#include <weir/model/block.hpp>
#include <weir/nn/linear.hpp>

namespace weir {

/// One module of `MultiToken`, without what it shares with the main model.
template <std::floating_point T>
struct MultiTokenModule {
  AnyLayer<T> embedding_norm;
  AnyLayer<T> hidden_norm;
  Linear<T> projection;  ///< [d_model, 2 d_model]; its first d_model columns are the embedding's.
  Block<T> layer;
  AnyLayer<T> norm;  ///< The norm in front of the shared head.

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("embedding_norm", self.embedding_norm);
    visit("hidden_norm", self.hidden_norm);
    visit("projection", self.projection);
    visit("layer", self.layer);
    visit("norm", self.norm);
  }
};

}  // namespace weir
