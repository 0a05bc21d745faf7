// SPDX-License-Identifier: MIT
/// \file
/// Tensors of four-bit numbers with shared exponents, as gpt-oss is published.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/dtype.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/mapped_file.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/tensor_source.hpp>
#include <weir/kernels/small_float.hpp>

namespace weir::io::detail {

/// A tensor [..., 32 n] from two: "x_blocks" [..., n, 16] of bytes, and "x_scales" [..., n] of
/// exponents e. Byte j of a block holds two numbers v of the kind E2M1, the first in its low half:
///
///     x_{2j} = 2^(e - 127) v(low),   x_{2j+1} = 2^(e - 127) v(high)     0 <= j < 16
///
/// (Open Compute Project, "Microscaling Formats (MX)", version 1.0; the layout is that of
/// openai/gpt-oss-20b.)
class Mxfp4Tensor final : public StoredTensor {
 public:
  static constexpr Index kBlock = 32;

  /// \throws FileError  unless both are bytes, and their shapes fit each other.
  Mxfp4Tensor(const std::string& path, const std::string& name, const Tensor& blocks,
              const Tensor& scales)
      : blocks_(blocks), scales_(scales), shape_(scales.shape) {
    std::vector<Index> expected = scales.shape;
    expected.push_back(kBlock / 2);
    if (blocks.dtype != Dtype::kU8 || scales.dtype != Dtype::kU8 || scales.shape.empty() ||
        blocks.shape != expected) {
      throw_error<FileError>(path, ": tensor '", name, "' is ", name_of(blocks.dtype), " ",
                             shape_text(blocks.shape), ", which its scales ", name_of(scales.dtype),
                             " ", shape_text(scales.shape), " do not fit");
    }
    shape_.back() *= kBlock;
  }

  const std::vector<Index>& shape() const override { return shape_; }
  void read(Index begin, Index count, float* to) const override { convert_from(begin, count, to); }
  void read(Index begin, Index count, double* to) const override { convert_from(begin, count, to); }
  void release(Index begin, Index count) const override {
    release_pages(blocks_.bytes.subspan(static_cast<std::size_t>(begin / 2),
                                        static_cast<std::size_t>(count / 2)));
  }

 private:
  template <class T>
  void convert_from(Index begin, Index count, T* to) const {
    const auto byte = [](const Tensor& tensor, Index i) {
      return std::to_integer<std::uint8_t>(tensor.bytes[static_cast<std::size_t>(i)]);
    };
    for (Index done = 0; done < count;) {
      const Index at = begin + done;
      const Index length = std::min(kBlock - at % kBlock, count - done);
      const T half_scale = std::ldexp(T(1), byte(scales_, at / kBlock) - 128);
      for (Index i = at; i < at + length; ++i) {
        const std::uint8_t pair = byte(blocks_, i / 2);
        const auto code = static_cast<std::size_t>(i % 2 == 0 ? pair & 15 : pair >> 4);
        to[i - begin] = half_scale * static_cast<T>(2.0F * kernels::E2M1::values()[code]);
      }
      done += length;
    }
  }

  const Tensor& blocks_;
  const Tensor& scales_;
  std::vector<Index> shape_;
};

}  // namespace weir::io::detail
