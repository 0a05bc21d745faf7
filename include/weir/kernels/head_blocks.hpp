// SPDX-License-Identifier: MIT
/// \file
/// A weight whose rows are divided among heads, each of which multiplies rows of its own.
#pragma once

#include <cstddef>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/list.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/arranged_rows.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/kernels/panel.hpp>

namespace weir::kernels {

/// The blocks W_h of a weight [heads * rows, cols], and for each head the product
///
///     out_h = x_h W_h^T,  or  out_h = x_h W_h  if it is transposed
///
/// All heads are computed at once. The weight belongs to another object, which also multiplies with
/// the whole. Packed for inference, the blocks are a copy of it.
template <class T>
class HeadBlocks {
 public:
  enum class Side { kRows, kTransposed };

  HeadBlocks() = default;
  HeadBlocks(Index heads, Side side) : heads_(heads), side_(side) {}

  /// Packs the blocks of `weight`, or forgets them for kTrainable.
  void set_storage(const Matrix<T>& weight, Storage storage);

  /// \param x       [heads * tokens, in], head after head.
  /// \param weight  The whole weight. It is read unless the blocks are packed.
  /// \param out     [tokens, heads * out_width]; each head sets the first columns of its own.
  /// \param plain   Workspace.
  void multiply(MatrixIn<T> x, const Matrix<T>& weight, MatrixOut<T> out, Index out_width,
                std::vector<Product<T>>& plain) const;

 private:
  void multiply_packed(MatrixIn<T> x, Index tokens, FunctionRef<T*(Index)> out_of,
                       Index out_row) const;

  Index heads_ = 0;
  Side side_ = Side::kRows;
  List<PackedWeight<T>> packed_;
};

template <class T>
void HeadBlocks<T>::set_storage(const Matrix<T>& weight, Storage storage) {
  packed_.clear();
  if (storage == Storage::kTrainable) return;
  const Index rows = weight.rows() / heads_;
  const bool transposed = side_ == Side::kTransposed;
  // All blocks share one memory, since the block of a head does not fill a huge page.
  const std::size_t bytes = PackedWeight<T>::bytes(transposed ? weight.cols() : rows,
                                                   transposed ? rows : weight.cols(), storage);
  SharedMemory memory(static_cast<std::size_t>(heads_) * bytes);
  packed_.reserve(heads_);
  Matrix<T> block;
  for (Index h = 0; h < heads_; ++h) {
    const auto of_head = weight.middleRows(h * rows, rows);
    if (transposed) {
      block = of_head.transpose();
    } else {
      block = of_head;
    }
    packed_.emplace_back(block, storage, &memory);
  }
}

template <class T>
void HeadBlocks<T>::multiply(MatrixIn<T> x, const Matrix<T>& weight, MatrixOut<T> out,
                             Index out_width, std::vector<Product<T>>& plain) const {
  const Index tokens = x.rows() / heads_;
  const auto out_of = [&](Index h) { return out.data() + h * out_width; };
  if (!packed_.empty()) return multiply_packed(x, tokens, out_of, out.outerStride());
  const Index rows = weight.rows() / heads_;
  const bool transposed = side_ == Side::kTransposed;
  plain.clear();
  for (Index h = 0; h < heads_; ++h) {
    plain.push_back({tokens, transposed ? weight.cols() : rows, x.cols(),
                     x.data() + h * tokens * x.outerStride(), x.outerStride(), 1,
                     weight.data() + h * rows * weight.cols(), transposed ? weight.cols() : 1,
                     transposed ? 1 : weight.cols(), out_of(h), out.outerStride()});
  }
  weir::multiply<T>(plain);
}

template <class T>
void HeadBlocks<T>::multiply_packed(MatrixIn<T> x, Index tokens, FunctionRef<T*(Index)> out_of,
                                    Index out_row) const {
  const RowFormat<T> format = packed_[0].row_format();
  const std::byte* const left = arranged_rows<HeadBlocks>(format, x);
  kernels::multiply_packed<T>(
      heads_,
      [&](Index h) -> PackedProduct<T> {
        return {left + h * tokens * format.bytes(), tokens, &packed_[h]};
      },
      [&](Index h, Index row, Index rows, Index j, Compute<T> compute) {
        const ToMatrix<T> to = {out_of(h), out_row, packed_[h].rows()};
        to(row, rows, j, compute);
      });
}

}  // namespace weir::kernels

#ifdef WEIR_COMPILED
extern template class weir::kernels::HeadBlocks<float>;
extern template class weir::kernels::HeadBlocks<double>;
#endif
