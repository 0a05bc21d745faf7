// SPDX-License-Identifier: MIT
/// \file
/// Token ids for tests, and the slow way to generate text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/sampling.hpp>

namespace weir::test {

/// `count` ids below `vocab`, the same for the same seed.
inline std::vector<Index> random_ids(Index count, Index vocab, std::uint64_t seed) {
  Rng rng(seed);
  std::vector<Index> ids(static_cast<std::size_t>(count));
  for (Index& id : ids) id = rng.below(vocab);
  return ids;
}

/// The texts one after the other.
template <class... Texts>
std::vector<Index> joined(std::vector<Index> text, const Texts&... more) {
  (text.insert(text.end(), more.begin(), more.end()), ...);
  return text;
}

/// What `generate` has to yield for one conversation: the whole sequence is computed anew for each
/// token.
inline std::vector<Index> generate_slowly(const Decoder<double>& model, std::vector<Index> ids,
                                          Index count, const Sampling& sampling, Rng rng) {
  const auto prompt = static_cast<std::ptrdiff_t>(ids.size());
  Sampler<double> sampler;
  for (Index i = 0; i < count; ++i) {
    ids.push_back(sampler.sample(infer(model, ids).bottomRows(1), sampling, rng, ids));
  }
  return {ids.begin() + prompt, ids.end()};
}

}  // namespace weir::test
