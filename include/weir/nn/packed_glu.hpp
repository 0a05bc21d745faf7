// SPDX-License-Identifier: MIT
/// \file
/// Gated feed-forward networks stored for inference, one or a whole bank at once.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>
#include <type_traits>

#include <weir/core/aligned.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
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

  /// \param storage  kPacked or kBfloat16.
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
  Scratch<T> x, hidden;
  Scratch<kernels::BFloat16> rounded_x, rounded_hidden;
};

namespace detail {

/// `packed_glu_forward` for an activation known at run time: compiled once for all of them.
template <class T>
void packed_glu_forward(Index rows, FunctionRef<const T*(Index)> row_of,
                        std::span<const PackedGluGroup<T>> groups,
                        void (*activation)(Index, const T*, T*), PackedGluCache<T>& cache,
                        MatrixOut<T> out) {
  if (groups.empty()) return;
  const kernels::PackedWeight<T>& one = groups[0].glu->gate_up;
  const auto count = static_cast<Index>(groups.size());
  const auto group_of = [&](Index g) -> const PackedGluGroup<T>& {
    return groups[static_cast<std::size_t>(g)];
  };
  one.with_arithmetic([&](auto arithmetic) {
    using Arithmetic = decltype(arithmetic);
    using Left = typename Arithmetic::Left;
    using Products = kernels::PackedProduct<Arithmetic>;
    constexpr Index kCols = kernels::Block<T>::kCols;
    constexpr Index kHalf = kCols / 2;
    const Index d_hidden = one.rows();
    const Index x_row = kernels::row_length<Arithmetic>(one.cols());
    const Index hidden_row = kernels::row_length<Arithmetic>(d_hidden);
    Left* x = nullptr;
    Left* hidden = nullptr;
    if constexpr (std::is_same_v<Left, T>) {
      x = cache.x.reserve(rows * x_row);
      hidden = cache.hidden.reserve(rows * hidden_row);
    } else {
      x = cache.rounded_x.reserve(rows * x_row);
      hidden = cache.rounded_hidden.reserve(rows * hidden_row);
    }
    kernels::arrange_rows<Arithmetic>(rows, one.cols(), row_of, x);

    const auto activate = [&](Index g, Index row, Index height, Index j,
                              kernels::Compute<T> compute) {
      auto& space = ThreadSpace<T, PackedGlu<T>>::of_this_thread();
      space.reserve((kernels::Cut::kMostRows + 1) * kCols);
      T* const sums = space.take(kernels::Cut::kMostRows * kCols);
      T* const activated = space.take(kCols);
      compute(sums, kCols, false);
      const Index width = std::min(kHalf, d_hidden - j * kHalf);
      const bool last = j * kHalf + width == d_hidden;
      Left* h = hidden + (group_of(g).first + row) * hidden_row + j * kHalf;
      for (Index i = 0; i < height; ++i, h += hidden_row) {
        const T* const gate = sums + i * kCols;
        activation(width, gate, activated);
        if constexpr (std::is_same_v<Left, T>) {
          loops::multiply(width, activated, gate + kHalf, h);
        } else {
          loops::multiply<T>(width, activated, gate + kHalf, activated);
          kernels::round_to_bfloat16(width, activated, h);
        }
        if (last) std::fill(h + width, h + width + hidden_row - d_hidden, Left());
      }
    };
    kernels::multiply_packed<Arithmetic>(
        count,
        [&](Index g) -> Products {
          const PackedGluGroup<T>& group = group_of(g);
          return {x + group.first * x_row, group.rows, &group.glu->gate_up};
        },
        activate);

    const kernels::ToMatrix<T> to = {out.data(), out.outerStride(), out.cols()};
    kernels::multiply_packed<Arithmetic>(
        count,
        [&](Index g) -> Products {
          const PackedGluGroup<T>& group = group_of(g);
          return {hidden + group.first * hidden_row, group.rows, &group.glu->down};
        },
        [&](Index g, Index row, Index height, Index j, kernels::Compute<T> compute) {
          to(group_of(g).first + row, height, j, compute);
        });
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
