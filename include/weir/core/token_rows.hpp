// SPDX-License-Identifier: MIT
/// \file
/// Which rows of a token matrix are tokens, and which of them belong together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <string_view>

#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Over which tokens a capacity or a loss is computed.
enum class Scope {
  kBatch,     ///< All tokens of the pass together.
  kSequence,  ///< Each sequence of the pass by itself.
};

/// A copy of what a pass says about its rows, padding and sequences, kept for the backward pass.
class TokenRows {
 public:
  /// Copies what `pass` says about its `tokens` rows.
  /// \throws ShapeError   if the pass does not fit them.
  void set(std::string_view where, const Pass& pass, Index tokens) {
    pass.check(where, tokens);
    mask_.assign(pass.mask.begin(), pass.mask.end());
    if (pass.sequences != nullptr) {
      sequences_ = *pass.sequences;
    } else {
      sequences_.clear();
      sequences_.append(tokens);
    }
  }

  Index count() const { return sequences_.tokens(); }
  const Sequences& sequences() const { return sequences_; }
  /// As in Pass: one byte per row, 0 for padding; empty if there is none.
  std::span<const std::uint8_t> mask() const { return mask_; }
  bool has_padding() const { return !mask_.empty(); }
  bool is_padding(Index token) const { return !mask_.empty() && mask_[token] == 0; }

  /// How many of the rows `begin` to `end` are not padding.
  Index real(Index begin, Index end) const {
    if (mask_.empty()) return end - begin;
    return end - begin - std::count(mask_.begin() + begin, mask_.begin() + end, std::uint8_t{0});
  }
  Index real() const { return real(0, count()); }

  /// How many sequences have rows that are not padding.
  double real_sequences() const {
    double found = 0.0;
    for_each_group(Scope::kSequence,
                   [&](Index begin, Index end) { found += real(begin, end) > 0 ? 1.0 : 0.0; });
    return found;
  }

  /// Calls `body(begin, end)` with the rows of each group that `scope` makes.
  template <class Body>
  void for_each_group(Scope scope, Body&& body) const {
    if (scope == Scope::kBatch) {
      body(Index(0), count());
    } else {
      for (Index s = 0; s < sequences_.count(); ++s) body(sequences_.begin(s), sequences_.end(s));
    }
  }

  /// Calls `body(token)` for each row that is not padding, on all threads. `cost` is that of one
  /// token, as in `parallel_rows`.
  template <class Body>
  void for_each_real(Index cost, Body&& body) const {
    parallel_rows(count(), cost, [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (!is_padding(t)) body(t);
      }
    });
  }

 private:
  List<std::uint8_t> mask_;
  Sequences sequences_;
};

}  // namespace weir
