// SPDX-License-Identifier: MIT
/// \file
/// Layers that continue sequences token by token.
#pragma once

#include <concepts>
#include <cstddef>
#include <span>
#include <string_view>
#include <type_traits>

#include <weir/core/cache_storage.hpp>
#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A layer whose output for a token depends on the tokens before it. `decode` continues several
/// sequences at once: their new tokens are the rows of x, packed as `pass.sequences` says (one
/// sequence if that is null). `states` holds what the layer knows of each sequence, at first
/// `State{}`, or `State(storage)` where a state can be made with a CacheStorage.
/// `state.truncate(length)` makes a state forget all tokens but the first `length`.
template <class L>
concept DecodingLayer = Layer<L> && std::semiregular<typename L::State> &&
    requires(const L& layer, MatrixIn<typename L::Scalar> x, const Pass& pass,
             std::span<typename L::State* const> states, typename L::State& state, Index length,
             typename L::Cache& cache) {
  { layer.decode(x, pass, states, cache) } -> std::same_as<const Matrix<typename L::Scalar>&>;
  state.truncate(length);
};

/// A state without tokens, which stores what it keeps like that, if such states can.
template <class State>
State state_with([[maybe_unused]] CacheStorage storage) {
  // An aggregate would take it for its first member.
  if constexpr (std::constructible_from<State, CacheStorage> && !std::is_aggregate_v<State>) {
    return State(storage);
  } else {
    return State{};
  }
}

/// Continues one sequence by the tokens x [new tokens, d_model].
template <DecodingLayer L>
const Matrix<typename L::Scalar>& decode(const L& layer, MatrixIn<typename L::Scalar> x,
                                         typename L::State& state, typename L::Cache& cache) {
  typename L::State* const states[] = {&state};
  return layer.decode(x, Pass{}, states, cache);
}

/// Checks that `states` can continue the sequences of `pass`, in a layer's `decode`.
/// \throws StateError   unless there is one state for each sequence (without sequences, one), and
///                      all are different.
/// \throws ConfigError  if a token is padding: a state has no place for it.
template <class State>
void expect_states(std::string_view where, const Pass& pass, std::span<State* const> states) {
  const std::size_t count =
      pass.sequences == nullptr ? 1 : static_cast<std::size_t>(pass.sequences->count());
  if (states.size() != count) {
    throw_error<StateError>(where, ": ", states.size(), " states, expected ", count,
                            " (one for each sequence)");
  }
  for (std::size_t s = 0; s < count; ++s) {
    if (states[s] == nullptr) throw_error<StateError>(where, ": states[", s, "] is null");
    for (std::size_t earlier = 0; earlier < s; ++earlier) {
      if (states[earlier] != states[s]) continue;
      throw_error<StateError>(where, ": states[", earlier, "] and states[", s,
                              "] are the same, expected one for each sequence");
    }
  }
  for (std::size_t t = 0; t < pass.mask.size(); ++t) {
    if (pass.mask[t] == 0) {
      throw_error<ConfigError>(where, ": token ", t,
                               " is padding, expected none where tokens are kept");
    }
  }
}

}  // namespace weir
