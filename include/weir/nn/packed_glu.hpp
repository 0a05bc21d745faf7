// SPDX-License-Identifier: MIT
/// \file
/// Gated feed-forward networks stored for inference, one or a whole bank at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <weir/core/aligned.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/arranged_rows.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/ops/activation.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The weights of one gated network, arranged so that an output of `gate` and the same output of
/// `up` are computed together.
template <class T>
struct PackedGlu {
  kernels::PackedWeight<T> gate_up, down;

  /// \param storage  Any but kTrainable.
  /// \param memory   With room for `bytes`.
  PackedGlu(const Matrix<T>& gate, const Matrix<T>& up, const Matrix<T>& out, Storage storage,
            SharedMemory& memory)
      : gate_up(gate, up, storage, &memory), down(out, storage, &memory) {}
  PackedGlu(const Parameter<T>& gate, const Parameter<T>& up, const Parameter<T>& out,
            Storage storage, SharedMemory& memory)
      : gate_up(gate, up, storage, &memory), down(out, storage, &memory) {}

  /// What the weights of one network take of a memory.
  static std::size_t bytes(Index d_in, Index d_hidden, Index d_out, Storage storage) {
    return kernels::PackedWeight<T>::bytes(d_hidden, d_in, storage, true) +
           kernels::PackedWeight<T>::bytes(d_out, d_hidden, storage);
  }

  void unpack(Matrix<T>& gate, Matrix<T>& up, Matrix<T>& out) const {
    gate_up.unpack(gate, &up);
    down.unpack(out);
  }
};

/// Rows that go through one network: `rows` of them from `first` on.
template <class T>
struct PackedGluGroup {
  const PackedGlu<T>* glu = nullptr;
  Index first = 0, rows = 0;
};

/// Workspace of `packed_glu_forward`.
template <class T>
struct PackedGluCache {
  Scratch<std::byte> x, hidden;  ///< As the weights take them.
  Scratch<T> exact_hidden;       ///< Where `hidden` takes whole rows.
};

namespace detail {

/// `packed_glu_forward` for an activation known at run time: compiled once for all of them.
template <class T>
void packed_glu_forward(Index rows, FunctionRef<const T*(Index)> row_of,
                        std::span<const PackedGluGroup<T>> groups,
                        void (*activation)(Index, const T*, T*), PackedGluCache<T>& cache,
                        MatrixOut<T> out) {
  if (groups.empty()) return;
  const auto count = static_cast<Index>(groups.size());
  const auto group_of = [&](Index g) -> const PackedGluGroup<T>& {
    return groups[static_cast<std::size_t>(g)];
  };
  constexpr Index kCols = kernels::Block<T>::kCols;
  constexpr Index kHalf = kCols / 2;
  const kernels::RowFormat<T> of_x = groups[0].glu->gate_up.row_format();
  const kernels::RowFormat<T> of_hidden = groups[0].glu->down.row_format();
  const Index d_hidden = of_hidden.cols;
  const bool by_rows = of_hidden.kind == kernels::RowKind::kInt8;
  std::byte* const x = cache.x.reserve(rows * of_x.bytes());
  std::byte* const hidden = cache.hidden.reserve(rows * of_hidden.bytes());
  T* const exact = cache.exact_hidden.reserve(by_rows ? rows * d_hidden : 0);
  kernels::arrange_rows<T>(of_x, rows, row_of, x);

  const auto activate = [&](Index g, Index row, Index height, Index j,
                            kernels::Compute<T> compute) {
    auto& space = ThreadSpace<T, PackedGlu<T>>::of_this_thread();
    space.reserve((kernels::Cut::kMostRows + 1) * kCols);
    T* const sums = space.take(kernels::Cut::kMostRows * kCols);
    T* const activated = space.take(kCols);
    compute(sums, kCols, false);
    const Index first = j * kHalf;
    const Index width = std::min(kHalf, d_hidden - first);
    for (Index i = 0; i < height; ++i) {
      const Index at = group_of(g).first + row + i;
      const T* const gate = sums + i * kCols;
      activation(width, gate, activated);
      T* const product = by_rows ? exact + at * d_hidden + first : activated;
      loops::multiply<T>(width, activated, gate + kHalf, product);
      if (!by_rows) of_hidden.write_part(product, first, width, hidden + at * of_hidden.bytes());
    }
  };
  kernels::multiply_packed<T>(
      count,
      [&](Index g) -> kernels::PackedProduct<T> {
        const PackedGluGroup<T>& group = group_of(g);
        return {x + group.first * of_x.bytes(), group.rows, &group.glu->gate_up};
      },
      activate);
  if (by_rows) {
    kernels::arrange_rows<T>(
        of_hidden, rows, [&](Index i) { return exact + i * d_hidden; }, hidden);
  }

  const kernels::ToMatrix<T> to = {out.data(), out.outerStride(), out.cols()};
  kernels::multiply_packed<T>(
      count,
      [&](Index g) -> kernels::PackedProduct<T> {
        const PackedGluGroup<T>& group = group_of(g);
        return {hidden + group.first * of_hidden.bytes(), group.rows, &group.glu->down};
      },
      [&](Index g, Index row, Index height, Index j, kernels::Compute<T> compute) {
        to(group_of(g).first + row, height, j, compute);
      });
}

}  // namespace detail

/// out = (act(x gate^T) * (x up^T)) down^T for groups of rows, each with the weights of its own
/// network. The activation is applied to sums that are still in the cache of their core.
///
/// \param rows      How many rows there are in all.
/// \param row_of    `row_of(i)` is where row i of x lies: gathered on the way.
/// \param groups    Their networks have one storage and one shape.
/// \param out       [rows, outputs].
template <Activation Act, class T>
void packed_glu_forward(Index rows, FunctionRef<const T*(Index)> row_of,
                        std::span<const PackedGluGroup<T>> groups, PackedGluCache<T>& cache,
                        MatrixOut<T> out) {
  detail::packed_glu_forward<T>(rows, row_of, groups, &Act::template value<T>, cache, out);
}

}  // namespace weir
