// SPDX-License-Identifier: MIT
/// \file
/// Text from a decoder, token by token.
#pragma once

#include <concepts>
#include <functional>
#include <span>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/sampling.hpp>

namespace weir {

/// Continues the sequence that `state` holds by `prompt`, then by up to `count` tokens drawn one
/// after the other, each from the logits that follow all tokens before it. The prompt is computed
/// at once, and nothing twice. In the end `state` holds prompt and new tokens, so that the next
/// prompt, the next turn of a conversation, goes on behind them.
///
/// \param prompt    At least one token; with a state, what has been added since.
/// \param count     May be 0: then only the prompt is added to the state.
/// \param on_token  Called with each new token, before the next is computed; false makes it the
///                  last one, as a token that ends the text should be. Empty: `count` tokens.
/// \return          The new tokens, the last one included.
/// \throws ConfigError     if the prompt is empty or has an id out of range, count is negative, or
///                         a setting of `sampling` is out of range; `state` is as it was.
/// \throws NonFiniteError  if the model yields NaN. `state` cannot be continued.
template <std::floating_point T>
std::vector<Index> generate(const Decoder<T>& model, std::span<const Index> prompt, Index count,
                            const Sampling& sampling, Rng& rng, typename Decoder<T>::State& state,
                            const std::function<bool(Index)>& on_token = {}) {
  if (prompt.empty()) fail<ConfigError>("generate: prompt is empty, expected at least one token");
  expect_at_least<Index>("generate", "count", count, 0);
  sampling.check();

  Sampler<T> sampler;
  typename Decoder<T>::Cache cache;
  const Matrix<T>* logits = &model.decode(prompt, state, cache, true);
  std::vector<Index> tokens;
  bool more = true;
  while (more && static_cast<Index>(tokens.size()) < count) {
    const Index token = sampler.sample(*logits, sampling, rng);
    tokens.push_back(token);
    more = !on_token || on_token(token);
    logits = &model.decode({&token, 1}, state, cache, true);
  }
  return tokens;
}

/// The same for a sequence that begins with `prompt` and is not continued.
template <std::floating_point T>
std::vector<Index> generate(const Decoder<T>& model, std::span<const Index> prompt, Index count,
                            const Sampling& sampling, Rng& rng,
                            const std::function<bool(Index)>& on_token = {}) {
  typename Decoder<T>::State state;
  return generate(model, prompt, count, sampling, rng, state, on_token);
}

}  // namespace weir
