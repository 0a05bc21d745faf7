// SPDX-License-Identifier: MIT
/// \file
/// Which rank has, and writes, which tensor of a model that is spread over ranks. Needs weir::io.
#pragma once

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/io/file_error.hpp>
#include <weir/io/published_tensors.hpp>
#include <weir/io/tensor_layout.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/communicator.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/on_all_ranks.hpp>

namespace weir::io::detail {

/// How many numbers a tensor has.
inline Index size_of(const PublishedTensor& tensor) {
  return std::accumulate(tensor.shape.begin(), tensor.shape.end(), Index{1}, std::multiplies<>());
}

/// The tensors of a model, and which rank has and writes what of them; the same on all ranks.
class RankShares {
 public:
  /// Tells all ranks which matrices of the whole model this one has.
  /// \param layout   Of the whole model.
  /// \throws FileError  on all ranks, if no rank has a matrix, as "rank 0: ...".
  RankShares(Channel& channel, Exchange& exchange, const std::vector<NamedShape>& whole,
             const std::vector<bool>& mine, std::vector<PublishedTensor> layout)
      : layout_(std::move(layout)), holders_(whole.size()) {
    std::string marks;
    for (const bool has : mine) marks += has ? '1' : '0';
    const auto all = all_gather_texts(channel, exchange, "parts of a model", marks);
    for (std::size_t r = 0; r < all.size(); ++r) {
      if (all[r].size() == marks.size()) continue;
      throw_error<RankError>("parts of a model: rank ", r, " has a model of ", all[r].size(),
                             " matrices, expected ", marks.size(), " as rank ", channel.rank());
    }
    for (std::size_t m = 0; m < whole.size(); ++m) {
      for (Index r = 0; r < channel.size(); ++r) {
        if (all[static_cast<std::size_t>(r)][m] == '1') holders_[m].push_back(r);
      }
    }
    on_all_ranks(channel, exchange, [&] {
      for (std::size_t m = 0; m < whole.size(); ++m) {
        if (!holders_[m].empty()) continue;
        throw_error<FileError>("save_pretrained: no rank has '", whole[m].name, "', expected one");
      }
    });
    choose_writers(channel.size());
  }

  const std::vector<PublishedTensor>& layout() const { return layout_; }

  /// The numbers of the tensors that a rank writes; those that it has as a whole come first.
  std::vector<std::size_t> written_by(Index rank) const {
    std::vector<std::size_t> own, split;
    for (std::size_t t = 0; t < layout_.size(); ++t) {
      if (writer_[t] == rank) (is_split(t) ? split : own).push_back(t);
    }
    own.insert(own.end(), split.begin(), split.end());
    return own;
  }

  Index writer(std::size_t t) const { return writer_[t]; }

  /// Whether its writer has not all of a tensor.
  bool is_split(std::size_t t) const {
    return std::ranges::any_of(layout_[t].pieces, [&](const TensorPiece& piece) {
      return supplier(piece, writer_[t]) != writer_[t];
    });
  }

  /// The rank that a piece of a tensor comes from.
  Index supplier(const TensorPiece& piece, Index writer) const {
    const std::vector<Index>& holders = holders_[piece.matrix];
    return std::ranges::binary_search(holders, writer) ? writer : holders.front();
  }

 private:
  /// Of the ranks that have most of a tensor, the one that writes least so far, beginning with the
  /// largest tensors.
  void choose_writers(Index ranks) {
    const auto size = [&](std::size_t t) { return size_of(layout_[t]); };
    std::vector<std::size_t> order(layout_.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::ranges::stable_sort(order,
                             [&](std::size_t a, std::size_t b) { return size(a) > size(b); });
    writer_.resize(layout_.size());
    std::vector<Index> written(static_cast<std::size_t>(ranks), 0);
    for (const std::size_t t : order) {
      std::vector<Index> has(written.size(), 0);
      for (const TensorPiece& piece : layout_[t].pieces) {
        for (const Index r : holders_[piece.matrix]) {
          has[static_cast<std::size_t>(r)] += piece.rows * piece.cols;
        }
      }
      std::size_t best = 0;
      for (std::size_t r = 1; r < has.size(); ++r) {
        if (std::pair(has[r], -written[r]) > std::pair(has[best], -written[best])) best = r;
      }
      writer_[t] = static_cast<Index>(best);
      written[best] += size(t);
    }
  }

  std::vector<PublishedTensor> layout_;
  std::vector<std::vector<Index>> holders_;  // Of each matrix, in ascending order.
  std::vector<Index> writer_;                // Of each tensor.
};

/// Brings the numbers of a tensor that is split to its writer. All ranks call it.
/// \param tensors  Of the whole model; null where this rank has none.
/// \param numbers  Of the tensor, on its writer.
template <class T>
void collect_tensor(Channel& channel, Exchange& exchange, const RankShares& shares, std::size_t t,
                    const ModelTensors<T>& tensors, std::vector<T>& numbers) {
  const PublishedTensor& tensor = shares.layout()[t];
  const auto writer = static_cast<int>(shares.writer(t)), me = channel.rank();
  const auto ranks = static_cast<std::size_t>(channel.size());
  std::vector<Index> count(ranks, 0);  // Of the numbers that each rank supplies.
  for (const TensorPiece& piece : tensor.pieces) {
    count[static_cast<std::size_t>(shares.supplier(piece, writer))] += piece.rows * piece.cols;
  }
  constexpr auto kWidth = static_cast<Index>(sizeof(T));
  const Index mine = count[static_cast<std::size_t>(me)];
  exchange.begin(channel, "tensors to be saved", me == writer ? 0 : mine * kWidth,
                 me == writer ? (size_of(tensor) - mine) * kWidth : 0);
  if (me != writer) {
    auto* to = reinterpret_cast<T*>(exchange.outgoing());
    for (const TensorPiece& piece : tensor.pieces) {
      if (shares.supplier(piece, writer) != me) continue;
      const Matrix<T>& from = *tensors[piece.matrix].second;
      to = std::copy_n(from.data() + piece.first_row * piece.cols, piece.rows * piece.cols, to);
    }
    exchange.send(writer, 0, mine * kWidth);
    return exchange.finish();
  }
  std::vector<const T*> from(ranks, nullptr);
  Index offset = 0;
  for (int r = 0; r < channel.size(); ++r) {
    const Index bytes = r == me ? 0 : count[static_cast<std::size_t>(r)] * kWidth;
    from[static_cast<std::size_t>(r)] = reinterpret_cast<const T*>(exchange.incoming() + offset);
    exchange.receive(r, offset, bytes);
    offset += bytes;
  }
  exchange.finish();
  numbers.resize(static_cast<std::size_t>(size_of(tensor)));
  for (const TensorPiece& piece : tensor.pieces) {
    const auto supplier = static_cast<std::size_t>(shares.supplier(piece, writer));
    const T* rows = from[supplier];
    if (supplier == static_cast<std::size_t>(me)) {
      rows = tensors[piece.matrix].second->data() + piece.first_row * piece.cols;
    } else {
      from[supplier] += piece.rows * piece.cols;
    }
    for (Index i = 0; i < piece.rows; ++i) {
      T* const to = numbers.data() + piece.begin + i * piece.row_step;
      for (Index j = 0; j < piece.cols; ++j) to[j * piece.col_step] = *rows++;
    }
  }
}

}  // namespace weir::io::detail
