// SPDX-License-Identifier: MIT
/// \file
/// What multi-head latent attention keeps of the tokens it has seen
/// (DeepSeek-AI 2024, arXiv:2405.04434).
#pragma once

#include <string_view>

#include <weir/attention/paged_rows.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The latents (after their norm) and the keys of positions (already rotated) of one sequence in
/// one layer, side by side in a row per token: kv_rank + rope_dim numbers, whatever the number of
/// heads. Rows lie in pages, which copies share as those of a KvCache do.
template <class T>
class LatentCache {
 public:
  /// How many tokens are held, which is the position of the next one.
  Index length() const { return rows_.count(); }
  bool empty() const { return rows_.empty(); }

  Index kv_rank() const { return kv_rank_; }
  Index rope_dim() const { return rows_.width() - kv_rank_; }

  /// [length, kv_rank + rope_dim]
  const PagedRows<T>& rows() const { return rows_; }
  /// A copy of the latents, [length, kv_rank].
  Matrix<T> latents() const { return rows_.matrix().leftCols(kv_rank_); }
  /// A copy of the keys, [length, rope_dim].
  Matrix<T> rope_keys() const { return rows_.matrix().rightCols(rope_dim()); }

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
    if (!empty()) expect_columns("LatentCache::append", "latents", latents, kv_rank_);
    kv_rank_ = latents.cols();
    rows_.append(latents, rope_keys);
  }

  /// Makes room for `length` tokens in all, so that appending up to there allocates nothing. Has no
  /// effect before the first token, which tells how wide rows are.
  void reserve(Index length) { rows_.reserve(length); }

  /// Forgets all tokens but the first `length`, as after a rejected draft. Keeps the memory.
  /// \throws ConfigError  unless 0 <= length <= this->length().
  void truncate(Index length) {
    expect_in<Index>("LatentCache::truncate", "length", length, 0, this->length());
    rows_.truncate(length);
  }

  /// Forgets all tokens. Keeps the memory.
  void clear() { truncate(0); }

 private:
  PagedRows<T> rows_;
  Index kv_rank_ = 0;
};

}  // namespace weir
