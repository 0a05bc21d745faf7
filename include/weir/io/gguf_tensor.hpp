// SPDX-License-Identifier: MIT
/// \file
/// A tensor of a GGUF file.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/gguf_numbers.hpp>
#include <weir/io/gguf_type.hpp>

namespace weir::io {

/// One tensor of a GGUF file.
struct GgufTensor {
  GgufType type = GgufType::kF32;
  std::vector<Index> shape;          ///< Up to 4 lengths, row-major: the file has them backwards.
  std::span<const std::byte> bytes;  ///< Its blocks in the file.

  /// How many numbers it has; the reader has made sure that this fits an Index.
  Index size() const {
    Index count = 1;
    for (const Index length : shape) count *= length;
    return count;
  }
};

/// Converts `count` numbers of a tensor, in row-major order from its number `first` on. Calls for
/// different parts may run at the same time.
/// \param first, count  Multiples of `block_length(tensor.type)`.
/// \throws ConfigError  unless they are, and lie in the tensor.
template <class T>
void dequantise(const GgufTensor& tensor, Index first, Index count, T* to) {
  const Index block = block_length(tensor.type);
  if (first < 0 || count < 0 || first > tensor.size() - count || first % block != 0 ||
      count % block != 0) {
    throw_error<ConfigError>("dequantise: first = ", first, ", count = ", count,
                             ", expected multiples of ", block, " within ", tensor.size(),
                             " numbers");
  }
  const auto skipped = static_cast<std::size_t>(first / block) * block_bytes(tensor.type);
  dequantise(tensor.type, tensor.bytes.data() + skipped, count, to);
}

}  // namespace weir::io
