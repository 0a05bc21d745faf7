// SPDX-License-Identifier: MIT
/// \file
/// Who sees what the weights of a model are multiplied with.
#pragma once

#include <cstdint>
#include <span>

#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Sees the rows that layers multiply with their weights in forward passes whose `Pass::inputs`
/// points here, as long as the weights are parameters.
class InputObserver {
 public:
  InputObserver() = default;
  InputObserver(const InputObserver&) = default;
  InputObserver& operator=(const InputObserver&) = default;
  virtual ~InputObserver() = default;

  /// May be called by several threads, for one weight by one at a time.
  /// \param x        [rows, inputs of the weight].
  /// \param mask     One byte for each row, 0 for one that is padding; or empty.
  virtual void see(const Parameter<float>& weight, MatrixIn<float> x,
                   std::span<const std::uint8_t> mask) = 0;
  virtual void see(const Parameter<double>& weight, MatrixIn<double> x,
                   std::span<const std::uint8_t> mask) = 0;
};

}  // namespace weir
