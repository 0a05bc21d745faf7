// SPDX-License-Identifier: MIT
/// \file
/// What attention layers expect of the states they continue.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>

namespace weir {

/// Whether `states` can continue the sequences of `pass`, in a layer's `decode`.
/// \throws StateError   unless there is one state for each sequence (without sequences, one), no
/// two
///                      the same.
/// \throws ConfigError  if a token is padding: a state has no place for it.
template <class State>
void expect_states(std::string_view where, const Pass& pass, std::span<State* const> states) {
  const std::size_t count =
      pass.sequences == nullptr ? 1 : static_cast<std::size_t>(pass.sequences->count());
  if (states.size() != count) {
    fail<StateError>(where, ": ", states.size(), " states, expected ", count,
                     " (one for each sequence)");
  }
  for (std::size_t s = 0; s < count; ++s) {
    if (states[s] == nullptr) fail<StateError>(where, ": states[", s, "] is null");
    for (std::size_t earlier = 0; earlier < s; ++earlier) {
      if (states[earlier] != states[s]) continue;
      fail<StateError>(where, ": states[", earlier, "] and states[", s,
                       "] are the same, expected one for each sequence");
    }
  }
  for (std::size_t t = 0; t < pass.mask.size(); ++t) {
    if (pass.mask[t] == 0) {
      fail<ConfigError>(where, ": token ", t, " is padding, expected none where tokens are kept");
    }
  }
}

}  // namespace weir
