// SPDX-License-Identifier: MIT
/// \file
/// What multi-head latent attention keeps of the tokens it has seen
/// (DeepSeek-AI 2024, arXiv:2405.04434).
#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>

#include <weir/attention/latent_pages.hpp>
#include <weir/attention/pages.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The latents (after their norm) and the keys of positions (already rotated) of one sequence in
/// one layer, side by side in a row per token: kv_rank + rope_dim numbers, whatever the number of
/// heads. Rows lie in pages (LatentPages), which copies share as those of a KvCache do.
template <class T>
class LatentCache {
 public:
  LatentCache() = default;
  explicit LatentCache(CacheStorage storage) { layout_.storage = storage; }

  CacheStorage storage() const { return layout_.storage; }

  /// How many tokens are held, which is the position of the next one.
  Index length() const { return pages_.count(); }
  bool empty() const { return pages_.empty(); }
  /// What a token takes, scales included; 0 before the first one.
  Index bytes_per_token() const { return pages_.page_bytes() / Pages::kRows; }

  Index kv_rank() const { return layout_.kv_rank; }
  Index rope_dim() const { return layout_.rope_dim; }

  /// What is held, and how it lies there.
  const Pages& pages() const { return pages_; }
  const LatentPages<T>& layout() const { return layout_; }

  /// The rows as attention takes them, [length, kv_rank + rope_dim].
  Matrix<T> matrix() const {
    Matrix<T> copy(length(), layout_.width());
    copy_to(copy);
    return copy;
  }
  void copy_to(MatrixOut<T> to) const;
  /// The latents of these, [length, kv_rank].
  Matrix<T> latents() const { return matrix().leftCols(kv_rank()); }
  /// The keys of positions, [length, rope_dim].
  Matrix<T> rope_keys() const { return matrix().rightCols(rope_dim()); }

  /// \throws ShapeError   if there are rows, and not of these widths.
  void expect_widths(std::string_view where, Index kv_rank, Index rope_dim) const {
    const auto expect_width = [&](std::string_view name, Index width, Index expected) {
      if (empty() || width == expected) return;
      detail::fail_shape(where, name, length(), width, detail::shape_text(length(), expected));
    };
    expect_width("latents", this->kv_rank(), kv_rank);
    expect_width("rope_keys", this->rope_dim(), rope_dim);
  }

  /// Adds the rows of the next tokens. The first call after construction or `clear` decides how
  /// wide they are.
  /// \param latents    [tokens, kv_rank]
  /// \param rope_keys  [tokens, rope_dim]
  /// \throws ShapeError   if the widths are not those of what is held, or the rows differ.
  void append(MatrixIn<T> latents, MatrixIn<T> rope_keys) {
    expect_shape("LatentCache::append", "rope_keys", rope_keys, latents.rows(),
                 empty() ? rope_keys.cols() : rope_dim());
    if (!empty()) expect_columns("LatentCache::append", "latents", latents, kv_rank());
    if (empty()) layout_ = {layout_.storage, latents.cols(), rope_keys.cols()};
    pages_.append(latents.rows(), layout_.page_bytes(),
                  [&](std::byte* page, Index first, Index end, Index row) {
                    for (Index i = first; i < end; ++i, ++row) {
                      layout_.put(page, i, latents.data() + row * latents.outerStride(),
                                  rope_keys.data() + row * rope_keys.outerStride());
                    }
                  });
  }

  /// Makes room for `length` tokens in all, so that appending up to there allocates nothing. Has no
  /// effect before the first token, which tells how wide rows are.
  void reserve(Index length) { pages_.reserve(length); }

  /// Forgets all tokens but the first `length`, as after a rejected draft. Keeps the memory.
  /// \throws ConfigError  unless 0 <= length <= this->length().
  void truncate(Index length) {
    expect_in<Index>("LatentCache::truncate", "length", length, 0, this->length());
    pages_.truncate(length);
  }

  /// Forgets all tokens. Keeps the memory.
  void clear() { truncate(0); }

 private:
  Pages pages_;
  LatentPages<T> layout_;
};

template <class T>
void LatentCache<T>::copy_to(MatrixOut<T> to) const {
  constexpr Index kRows = Pages::kRows;
  const Index pages = (length() + kRows - 1) / kRows;
  parallel_rows(pages, 4 * kRows * layout_.width(), [&](Index begin, Index end) {
    auto& space = ThreadSpace<T, LatentCache>::of_this_thread();
    space.reserve(layout_.unpacked_size());
    T* const place = space.take(layout_.unpacked_size());
    for (Index p = begin; p < end; ++p) {
      const Index rows = std::min(kRows, length() - p * kRows);
      const std::byte* const page = element(pages_.pages(), p).get();
      const T* from = layout_.unpacked(page, rows, place);
      for (Index i = 0; i < rows; ++i, from += layout_.row_size()) {
        std::copy_n(from, layout_.width(), to.data() + (p * kRows + i) * to.outerStride());
      }
    }
  });
}

}  // namespace weir
