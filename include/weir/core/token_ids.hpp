// SPDX-License-Identifier: MIT
/// \file
/// Token ids as callers have them.
#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <vector>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// The target of a token that has none.
inline constexpr Index kNoTarget = -100;

/// A view of token ids, which may be `int`, as tokenizers give them, or `Index`. Everything that a
/// std::span of one of the two can view converts to it.
class TokenIds {
 public:
  TokenIds() = default;

  template <class Ids>
  // NOLINTNEXTLINE(google-explicit-constructor)
  requires std::convertible_to<const Ids&, std::span<const int>> TokenIds(const Ids& ids) {
    const std::span<const int> span = ids;
    ints_ = span.data();
    count_ = static_cast<Index>(span.size());
  }

  template <class Ids>
  // NOLINTNEXTLINE(google-explicit-constructor)
  requires std::convertible_to<const Ids&, std::span<const Index>> TokenIds(const Ids& ids) {
    const std::span<const Index> span = ids;
    indices_ = span.data();
    count_ = static_cast<Index>(span.size());
  }

  Index count() const { return count_; }
  Index operator[](Index t) const { return ints_ != nullptr ? Index(ints_[t]) : indices_[t]; }

  /// Sets `list` to these ids.
  void copy_to(List<Index>& list) const {
    list.resize(count_);
    for (Index t = 0; t < count_; ++t) list[t] = (*this)[t];
  }

  /// Adds these ids to the end of `list`.
  void append_to(std::vector<Index>& list) const {
    for (Index t = 0; t < count_; ++t) list.push_back((*this)[t]);
  }

 private:
  const int* ints_ = nullptr;       // Null if the ids are `Index`.
  const Index* indices_ = nullptr;  // Null if they are `int`.
  Index count_ = 0;
};

}  // namespace weir
