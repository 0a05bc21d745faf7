// SPDX-License-Identifier: MIT
/// \file
/// Tensors that are read from somewhere, a piece at a time.
#pragma once

#include <string>
#include <vector>

#include <weir/core/types.hpp>

namespace weir::io {

/// One tensor of a checkpoint, whose numbers are converted while they are read.
class StoredTensor {
 public:
  StoredTensor() = default;
  StoredTensor(const StoredTensor&) = delete;
  StoredTensor& operator=(const StoredTensor&) = delete;
  virtual ~StoredTensor() = default;

  virtual const std::vector<Index>& shape() const = 0;

  /// Converts the numbers [begin, begin + count) of the tensor, row-major. They begin and end with
  /// a row, or the tensor is not stored in blocks. May be called from several threads at once.
  virtual void read(Index begin, Index count, float* to) const = 0;
  virtual void read(Index begin, Index count, double* to) const = 0;

  /// Tells the system that the numbers [begin, begin + count) will not be read again soon.
  virtual void release(Index /*begin*/, Index /*count*/) const {}

  /// Tells the system that the numbers [begin, begin + count) will be read soon.
  virtual void prefetch(Index /*begin*/, Index /*count*/) const {}
};

/// The tensors of a checkpoint by name.
class TensorSource {
 public:
  TensorSource() = default;
  TensorSource(const TensorSource&) = delete;
  TensorSource& operator=(const TensorSource&) = delete;
  virtual ~TensorSource() = default;

  /// What messages call it.
  virtual const std::string& path() const = 0;

  virtual std::vector<std::string> names() const = 0;

  /// Lives as long as the source; null if there is none.
  virtual const StoredTensor* find(const std::string& name) const = 0;
};

}  // namespace weir::io
