// SPDX-License-Identifier: MIT
/// \file
/// How keys and values of heads lie in the pages of a cache.
#pragma once

#include <algorithm>
#include <cstddef>

#include <weir/attention/cache_codes.hpp>
#include <weir/attention/pages.hpp>
#include <weir/core/aligned.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Keys and values of some tokens in one head, as codes, which are numbers of type T or have scales
/// beside them: number d of key i is keys[i * key_row + d * key_step], times key_scales[i].
template <class T, class Code = T>
struct KeyValueBlock {
  const Code* keys = nullptr;
  Index key_row = 0, key_step = 1;
  const Code* values = nullptr;
  Index value_row = 0;
  const T* key_scales = nullptr;  ///< Null where there are none.
  const T* value_scales = nullptr;

  /// The same from the token `i` on.
  KeyValueBlock from(Index i) const {
    KeyValueBlock block = *this;
    block.keys += i * key_row;
    block.values += i * value_row;
    if (key_scales != nullptr) block.key_scales += i;
    if (value_scales != nullptr) block.value_scales += i;
    return block;
  }
};

/// A page has one head behind the other, each in one piece: its scales, if there are any, the keys
/// as [key_dim, kRows] and the values as [kRows, value_dim]. So one query, which goes through
/// tokens head by head, reads memory from front to back, and finds the numbers of as many tokens
/// side by side as a register holds.
template <class T>
struct HeadPages {
  static constexpr Index kRows = Pages::kRows;

  CacheStorage storage = CacheStorage::kFull;
  Index heads = 0;
  Index key_dim = 0, value_dim = 0;

  CodeMatrix<T> key_codes() const { return {storage, kRows}; }
  CodeMatrix<T> value_codes() const {
    const bool full = storage == CacheStorage::kFull;
    return {storage, full ? value_dim : CodeMatrix<T>::padded(value_dim)};
  }

  Index page_bytes() const { return heads * head_bytes(); }

  /// The places of a head.
  struct Head {
    T* key_scales;
    T* value_scales;
    std::byte* keys;
    std::byte* values;
  };
  Head at(std::byte* page, Index head) const {
    std::byte* const begin = page + head * head_bytes();
    auto* const scales = reinterpret_cast<T*>(begin);
    std::byte* const keys = begin + 2 * scale_bytes();
    return {scales, scales + kRows, keys, keys + key_bytes()};
  }

  /// Writes the keys and values of a head to the places from `first` to `end`.
  /// \param keys      The first of them; `key_stride` apart. Values in the same way.
  void put(std::byte* page, Index head, Index first, Index end, const T* keys, Index key_stride,
           const T* values, Index value_stride) const {
    const Head to = at(page, head);
    const CodeMatrix<T> of_keys = key_codes();
    const CodeMatrix<T> of_values = value_codes();
    for (Index i = first; i < end; ++i, keys += key_stride, values += value_stride) {
      const T key_scale = of_keys.scale_of(keys, key_dim);
      const T value_scale = of_values.scale_of(values, value_dim);
      if (of_keys.has_scales()) {
        to.key_scales[i] = key_scale;
        to.value_scales[i] = value_scale;
      }
      of_keys.put_column(to.keys, i, keys, key_dim, key_scale);
      of_values.put_row(to.values, i, 0, values, value_dim, value_scale);
    }
  }

  /// The rows of a page, as codes of the storage.
  template <class Code>
  KeyValueBlock<T, Code> block(const Page& page, Index head) const {
    const Head from = at(page.get(), head);
    const bool scales = key_codes().has_scales();
    return {reinterpret_cast<const Code*>(from.keys),
            1,
            kRows,
            reinterpret_cast<const Code*>(from.values),
            value_codes().cols,
            scales ? from.key_scales : nullptr,
            scales ? from.value_scales : nullptr};
  }

  /// How many numbers `unpacked` needs.
  Index unpacked_size() const { return kRows * (key_dim + value_codes().cols); }

  /// The rows of a page with codes of type T: in place, or unpacked to `space`.
  KeyValueBlock<T> unpacked(const Page& page, Index head, T* space) const {
    KeyValueBlock<T> result = block<T>(page, head);
    if (storage == CacheStorage::kFull) return result;
    const Head from = at(page.get(), head);
    T* const values = space + kRows * key_dim;
    key_codes().unpack(from.keys, key_dim, space);
    value_codes().unpack(from.values, kRows, values);
    result.keys = space;
    result.values = values;
    return result;
  }

 private:
  static Index whole_lines(Index bytes) {
    constexpr auto kLine = static_cast<Index>(CacheLineAllocator<std::byte>::kLine);
    return (bytes + kLine - 1) / kLine * kLine;
  }
  Index scale_bytes() const {
    return key_codes().has_scales() ? kRows * static_cast<Index>(sizeof(T)) : 0;
  }
  Index key_bytes() const { return whole_lines(key_dim * key_codes().row_bytes()); }
  Index value_bytes() const { return whole_lines(kRows * value_codes().row_bytes()); }
  Index head_bytes() const { return 2 * scale_bytes() + key_bytes() + value_bytes(); }
};

}  // namespace weir
