// SPDX-License-Identifier: MIT
/// \file
/// Parameters of a test as a model, for optimizers.
#pragma once

#include <initializer_list>
#include <vector>

#include <weir/core/parameter.hpp>

namespace weir::test {

/// A model that consists of the parameters named, which live elsewhere.
template <class T>
struct ParameterSet {
  using Scalar = T;

  ParameterSet(std::initializer_list<NamedParameter<T>> list) : named(list) {}
  explicit ParameterSet(std::vector<NamedParameter<T>> list) : named(std::move(list)) {}

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (auto& [name, parameter] : self.named) visit(name, *parameter);
  }

  std::vector<NamedParameter<T>> named;
};

}  // namespace weir::test
