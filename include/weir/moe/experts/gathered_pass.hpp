// SPDX-License-Identifier: MIT
/// \file
/// The pass of layers that run on rows which a bank has put together.
#pragma once

#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/dispatch.hpp>

namespace weir {

/// `pass` as that of `rows` other rows, of which row `row_of(s)` is a copy of the token of slot s.
/// They are no sequences and have no padding. What the pass says of allowed experts concerns the
/// layer that chose among the bank's experts, and is left out. Everything else stays.
/// \param token_ids  The memory for the ids of the rows, where the pass has ids.
template <class T, class RowOf>
Pass gathered_pass(const Pass& pass, const Dispatch<T>& dispatch, Index rows, RowOf&& row_of,
                   List<Index>& token_ids) {
  token_ids.clear();
  if (!pass.token_ids.empty()) {
    token_ids.assign(rows, 0);
    for (Index s = 0; s < dispatch.slots(); ++s) {
      token_ids[row_of(s)] = pass.token_ids[static_cast<std::size_t>(dispatch.token(s))];
    }
  }
  Pass gathered = pass;
  gathered.sequences = nullptr;
  gathered.mask = {};
  gathered.places = {};
  gathered.allowed = {};
  gathered.without_best = 0.0;
  gathered.token_ids = token_ids;
  return gathered;
}

}  // namespace weir
