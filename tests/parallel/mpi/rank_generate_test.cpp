// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include <weir/model/generate.hpp>
#include <weir/parallel/mpi/rank_generate.hpp>
#include <weir/parallel/mpi/spread_experts.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/scaled.hpp>

#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::rank_generate_test {

namespace {

Decoder<double> make_model() {
  const auto config = presets::scaled(presets::mixtral_8x7b(), {.d_model = 32, .vocab = 40});
  Rng rng(4);
  return presets::make<double>(config, rng);
}

/// Conversation i of the job.
Conversation<double> conversation(std::size_t i) {
  Conversation<double> one{.prompt = {},
                           .until = {.count = 3 + 4 * static_cast<Index>(i)},
                           .sampling = {.temperature = i % 2 == 0 ? 1.0 : 0.0},
                           .rng = Rng(i)};
  for (std::size_t t = 0; t <= i; ++t) one.prompt.push_back(static_cast<Index>((5 * t + i) % 40));
  return one;
}

}  // namespace

TEST_CASE("Conversations on many ranks get the tokens that one process draws", "[parallel][mpi]") {
  const auto count = GENERATE(as<std::size_t>{}, 0, 1, 2, 5);
  const Decoder<double> whole = make_model();
  std::vector<Conversation<double>> all;
  for (std::size_t i = 0; i < count; ++i) all.push_back(conversation(i));
  const std::vector<Generated> expected = generate<double>(whole, all);

  Decoder<double> part = make_model();
  spread_experts(part, std::make_shared<ExpertChannels>(test::ranks()));
  const auto ranks = static_cast<std::size_t>(test::ranks().size());
  std::vector<Conversation<double>> mine;
  std::vector<std::size_t> numbers;
  for (std::size_t i = static_cast<std::size_t>(test::ranks().rank()); i < count; i += ranks) {
    mine.push_back(conversation(i));
    numbers.push_back(i);
  }
  Channel channel(test::ranks());
  Index drawn = 0;
  const auto results = generate<double>(channel, part, mine, [&](Index tokens) { drawn = tokens; });
  REQUIRE(results.size() == numbers.size());
  Index total = 0;
  for (const Generated& one : expected) total += static_cast<Index>(one.tokens.size());
  CHECK(drawn == total);
  for (std::size_t i = 0; i < results.size(); ++i) {
    CHECK(results[i].tokens == expected[numbers[i]].tokens);
    CHECK(mine[i].state.length == all[numbers[i]].state.length);
  }
}

TEST_CASE("Conversations on many ranks have no adapters of their own", "[parallel][mpi]") {
  if (test::ranks().size() == 1) return;
  Channel channel(test::ranks());
  const Decoder<double> model = make_model();
  std::vector<Conversation<double>> mine = {conversation(0)};
  mine[0].adapters = "a";
  CHECK(test::message_of<ConfigError>([&] { generate<double>(channel, model, mine); }) ==
        "generate: adapters = 'a' of conversation 0, expected '*' on several ranks");
}

}  // namespace weir::rank_generate_test
