// SPDX-License-Identifier: MIT
/// \file
/// What optimizers remember, on its way to other ranks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/optim/parameter_states.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/shared_parameters.hpp>

namespace weir::detail {

template <class T>
void put_state(std::string& text, const SavedState<T>& state) {
  for (const auto& [what, matrix] : state.matrices) RankText::put(text, *matrix);
  for (const auto& [what, matrix] : state.halves) RankText::put(text, *matrix);
  RankText::put(text, std::int64_t{state.steps == nullptr ? 0 : *state.steps});
}

template <class T>
void take_state(RankText& text, const SavedState<T>& state) {
  for (const auto& [what, matrix] : state.matrices) text.take(*matrix);
  for (const auto& [what, matrix] : state.halves) text.take(*matrix);
  const auto steps = static_cast<Index>(text.template take<std::int64_t>());
  if (state.steps != nullptr) *state.steps = steps;
}

/// Moves the states of parameters to where they are needed now.
///
/// \param before   The parameters as they were: a state was with the owner, or with all of their
///                 ranks unless `sharded`.
/// \param now      The parameters as they are.
template <class T, class Optimizer>
void move_states(Channel& channel, Exchange& exchange, bool sharded,
                 const List<typename SharedParameters<T>::Entry>& before,
                 const List<typename SharedParameters<T>::Entry>& now, Optimizer& optimizer) {
  using Entry = typename SharedParameters<T>::Entry;
  constexpr auto kWhat = "moves of optimizer states";
  const Index me = channel.rank();
  const auto has = [&](const Entry& entry, Index rank) {
    return sharded ? entry.owner == rank : entry.is_on(rank);
  };
  // Calls `body(earlier, entry, r)` for each state that rank r needs and did not have.
  const auto for_each_move = [&](auto&& body) {
    for (const Entry& entry : now) {
      const auto earlier = std::find_if(before.begin(), before.end(),
                                        [&](const Entry& e) { return e.name == entry.name; });
      if (earlier == before.end()) continue;
      for (const Index r : entry.ranks) {
        if (has(entry, r) && !has(*earlier, r)) body(*earlier, entry, r);
      }
    }
  };
  std::vector<std::string> leaving(static_cast<std::size_t>(channel.size()));
  for_each_move([&](const Entry& earlier, const Entry& entry, Index r) {
    if (earlier.owner != me) return;
    put_state(leaving[static_cast<std::size_t>(r)], optimizer.saved_state(entry.name));
  });
  const std::vector<std::string> texts = all_to_all_texts(channel, exchange, kWhat, leaving);
  std::vector<RankText> readers;
  for (std::size_t r = 0; r < texts.size(); ++r) {
    readers.emplace_back(kWhat, texts[r], static_cast<Index>(r));
  }
  for_each_move([&](const Entry& earlier, const Entry& entry, Index r) {
    if (r != me) return;
    take_state<T>(readers[static_cast<std::size_t>(earlier.owner)],
                  optimizer.saved_state(entry.name));
  });
  for (const RankText& reader : readers) {
    if (!reader.is_empty()) reader.fail();
  }
  for (const Entry& earlier : before) {
    if (!has(earlier, me)) continue;
    const auto entry = std::find_if(now.begin(), now.end(),
                                    [&](const Entry& e) { return e.name == earlier.name; });
    if (entry == now.end() || !has(*entry, me)) optimizer.forget(earlier.name);
  }
}

}  // namespace weir::detail
