// SPDX-License-Identifier: MIT
#include <cstddef>
#include <map>
#include <random>
#include <utility>
#include <vector>

#include <weir/io/bpe_merges.hpp>

#include "support/catch.hpp"

namespace weir::bpe_merges_tokenizer_test {
using io::BpeMerges;

namespace {

using Ids = std::vector<Index>;
using Rules = std::map<std::pair<Index, Index>, std::pair<Index, Index>>;  // To rank and result.

/// The definition: merges the leftmost pair of the lowest rank until there is none.
Ids merged_slowly(Ids ids, const Rules& rules) {
  while (true) {
    std::size_t best = ids.size();
    for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
      const auto rule = rules.find({ids[i], ids[i + 1]});
      if (rule == rules.end()) continue;
      if (best == ids.size() || rule->second.first < rules.at({ids[best], ids[best + 1]}).first) {
        best = i;
      }
    }
    if (best == ids.size()) return ids;
    ids[best] = rules.at({ids[best], ids[best + 1]}).second;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

}  // namespace

TEST_CASE("BpeMerges does what its definition says", "[io][tokenizer]") {
  std::mt19937 random(7);
  const auto below = [&](Index n) {
    return static_cast<Index>(random() % static_cast<std::uint32_t>(n));
  };
  for (int round = 0; round < 300; ++round) {
    const Index letters = 1 + below(3);
    Rules rules;
    BpeMerges merges;
    Index tokens = letters;
    for (Index i = 0; i < 12; ++i) {
      const std::pair pair(below(tokens), below(tokens));
      // Some ranks are equal, as those of tiktoken, some merges make a token that is there.
      const std::pair result(below(12), below(4) == 0 ? below(tokens) : tokens++);
      CHECK(merges.add(pair.first, pair.second, result.first, result.second) ==
            rules.emplace(pair, result).second);
    }
    Ids word;
    const Index length = below(30);
    for (Index i = 0; i < length; ++i) word.push_back(below(letters));
    Ids ids = {99, 98};
    ids.insert(ids.end(), word.begin(), word.end());
    merges.apply(ids, 2);

    Ids expected = merged_slowly(word, rules);
    expected.insert(expected.begin(), {99, 98});
    CHECK(ids == expected);
  }
}

TEST_CASE("BpeMerges takes long words in its stride", "[io][tokenizer]") {
  constexpr Index kLetters = 1 << 17;
  BpeMerges merges;
  for (Index i = 0; i < 10; ++i) merges.add(i, i, i, i + 1);  // Doubles up to 1024 letters.
  Ids ids(kLetters, 0);
  merges.apply(ids, 0);
  CHECK(ids == Ids(kLetters / 1024, 10));
}

}  // namespace weir::bpe_merges_tokenizer_test
