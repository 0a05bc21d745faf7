// SPDX-License-Identifier: MIT
/// \file
/// How latents and keys of positions lie in the pages of a cache.
#pragma once

#include <algorithm>
#include <cstddef>

#include <weir/attention/cache_codes.hpp>
#include <weir/attention/head_pages.hpp>
#include <weir/attention/pages.hpp>
#include <weir/core/aligned.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// A page has a row [latent | key of position] for each token, all heads' key; its first part is
/// their value. Where numbers have scales, a latent is cut into parts of up to kShare numbers, each
/// with a scale of its own, and so is a key of position. (DeepSeek's kernels for narrow latents,
/// deepseek-ai/FlashMLA, give 128 numbers a scale, too.)
template <class T>
struct LatentPages {
  static constexpr Index kRows = Pages::kRows;
  static constexpr Index kShare = 128;

  CacheStorage storage = CacheStorage::kFull;
  Index kv_rank = 0, rope_dim = 0;

  Index width() const { return kv_rank + rope_dim; }
  /// Numbers from one unpacked row to the next.
  Index row_size() const { return codes().cols; }

  Index page_bytes() const { return scale_bytes() + kRows * codes().row_bytes(); }

  /// Writes a row to place `i`.
  void put(std::byte* page, Index i, const T* latent, const T* rope_key) const;

  /// How many numbers `unpacked` needs.
  Index unpacked_size() const { return kRows * row_size(); }

  /// The first `rows` rows of a page, `row_size()` numbers each: in place, or unpacked to `space`.
  const T* unpacked(const std::byte* page, Index rows, T* space) const;

  /// The same as keys and values of all heads.
  KeyValueBlock<T> block(const Page& page, Index rows, T* space) const {
    const T* const from = unpacked(page.get(), rows, space);
    return {from, row_size(), 1, from, row_size()};
  }

 private:
  CodeMatrix<T> codes() const {
    const bool full = storage == CacheStorage::kFull;
    return {storage, full ? width() : CodeMatrix<T>::padded(width())};
  }

  static Index shares(Index count) { return (count + kShare - 1) / kShare; }
  Index scale_count() const {
    return codes().has_scales() ? shares(kv_rank) + shares(rope_dim) : 0;
  }
  Index scale_bytes() const {
    return kRows * scale_count() * static_cast<Index>(sizeof(T));  // A multiple of cache lines.
  }

  /// Calls `body(first, count)` for the parts of a row that have a scale each.
  template <class Body>
  void for_each_share(Body&& body) const {
    for (Index i = 0; i < kv_rank; i += kShare) body(i, std::min(kShare, kv_rank - i));
    for (Index i = 0; i < rope_dim; i += kShare) {
      body(kv_rank + i, std::min(kShare, rope_dim - i));
    }
  }
};

template <class T>
void LatentPages<T>::put(std::byte* page, Index i, const T* latent, const T* rope_key) const {
  const CodeMatrix<T> to = codes();
  T* scale = reinterpret_cast<T*>(page) + i * scale_count();
  std::byte* const rows = page + scale_bytes();
  for_each_share([&](Index first, Index count) {
    const T* const from = first < kv_rank ? latent + first : rope_key + (first - kv_rank);
    const T of_share = to.scale_of(from, count);
    if (to.has_scales()) *scale++ = of_share;
    to.put_row(rows, i, first, from, count, of_share);
  });
}

template <class T>
const T* LatentPages<T>::unpacked(const std::byte* page, Index rows, T* space) const {
  const std::byte* const from = page + scale_bytes();
  if (storage == CacheStorage::kFull) return reinterpret_cast<const T*>(from);
  codes().unpack(from, rows, space);
  if (!codes().has_scales()) return space;
  const T* scale = reinterpret_cast<const T*>(page);
  for (Index i = 0; i < rows; ++i) {
    for_each_share([&](Index first, Index count) {
      T* const share = space + i * row_size() + first;
      loops::scale<T>(count, *scale++, share, share);
    });
  }
  return space;
}

}  // namespace weir
