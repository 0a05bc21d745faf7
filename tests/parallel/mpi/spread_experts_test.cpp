// SPDX-License-Identifier: MIT
#include <algorithm>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/pretrained.hpp>
#include <weir/parallel/mpi/spread_experts.hpp>
#include <weir/presets/dbrx.hpp>
#include <weir/presets/grok_1.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/scaled.hpp>

#include "parallel/mpi/rank_folder.hpp"
#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::spread_experts_test {

namespace {

std::shared_ptr<ExpertChannels> make_channels() {
  return std::make_shared<ExpertChannels>(test::ranks());
}

/// Tokens of this rank: rank 1 has none.
std::vector<Index> own_ids(Index vocab) {
  std::vector<Index> ids;
  const Index count = test::ranks().rank() == 1 ? 0 : 5 + test::ranks().rank();
  for (Index t = 0; t < count; ++t) ids.push_back((7 * t + 3 * test::ranks().rank()) % vocab);
  return ids;
}

std::set<std::string> names_of(Decoder<float>& model) {
  std::set<std::string> names;
  for (const auto& [name, parameter] : parameters(model)) names.insert(name);
  return names;
}

/// Whether a parameter of that name is on this rank, by the number in "*.experts.N.*".
bool is_here(const std::string& name, const Placement& placement) {
  const std::string mark = ".experts.";
  const std::size_t at = name.find(mark);
  if (at == std::string::npos) return true;
  const Index expert = std::stoll(name.substr(at + mark.size()));
  return std::ranges::binary_search(placement.experts_on(test::ranks().rank()), expert);
}

/// What the whole model of a folder computes for this rank's tokens, and what it computes where
/// ranks have read their own experts, for all of them at once.
template <class Config>
void check_family(const Config& config, Storage storage) {
  const test::RankFolder folder;
  if (test::ranks().rank() == 0) {
    Rng rng(4);
    auto model = presets::make<float>(config, rng);
    io::save_pretrained(folder.path(), model, config, {.shard_bytes = 40'000});
  }
  test::wait_for_ranks();
  const io::LoadConfig how{.storage = storage};
  auto whole = io::load_family<Config, float>(folder.path(), how);
  const auto channels = make_channels();
  Index spread = 0;
  auto part = io::load_family<Config, float>(
      folder.path(), how, [&](Decoder<float>& model) { spread = spread_experts(model, channels); });
  CHECK(spread == config.shape.count_sparse(config.shape.layers));

  const Placement placement =
      Placement::contiguous(config.shape.experts, RankNodes::single(test::ranks().size()));
  std::set<std::string> expected;
  for (const std::string& name : names_of(whole.model)) {
    if (is_here(name, placement)) expected.insert(name);
  }
  CHECK(names_of(part.model) == expected);

  const std::vector<Index> ids = own_ids(config.shape.vocab);
  for (int again = 0; again < 2; ++again) {
    CHECK(infer(part.model, ids) == infer(whole.model, ids));
  }
}

}  // namespace

TEST_CASE("A rank reads its own experts, and all compute what the whole model does",
          "[parallel][mpi]") {
  const auto storage = GENERATE(Storage::kTrainable, Storage::kPacked, Storage::kInt8);
  check_family(presets::scaled(presets::mixtral_8x7b(), {.d_model = 32, .vocab = 40}), storage);
}

TEST_CASE("Experts that lie in one tensor, and those with another activation, are spread as well",
          "[parallel][mpi]") {
  SECTION("DBRX") {
    check_family(presets::scaled(presets::dbrx(), {.d_model = 48, .vocab = 40}), Storage::kPacked);
  }
  SECTION("Grok-1") {
    check_family(presets::scaled(presets::grok_1(), {.d_model = 48, .vocab = 40}),
                 Storage::kTrainable);
  }
}

TEST_CASE("Experts are spread where a placement has them, also in a model in memory",
          "[parallel][mpi]") {
  const auto config = presets::scaled(presets::mixtral_8x7b(), {.d_model = 32, .vocab = 40});
  Rng rng(4);
  auto whole = presets::make<float>(config, rng);
  const bool stored = GENERATE(false, true);
  if (stored) set_storage(whole, Storage::kPacked);
  auto part = whole;
  spread_experts(part, make_channels(), {.chunks = 3}, [](Index experts) {
    return Placement::round_robin(experts, RankNodes::single(test::ranks().size()));
  });
  const std::vector<Index> ids = own_ids(config.shape.vocab);
  CHECK(infer(part, ids) == infer(whole, ids));
}

TEST_CASE("Experts that are spread neither train nor change", "[parallel][mpi]") {
  Rng rng(1);
  GluBank<double> bank(4, 6, 5, rng);
  const auto channels = make_channels();
  const auto travel = [&](Index experts) {
    return std::make_shared<RankTravel<double>>(
        Placement::contiguous(experts, RankNodes::single(test::ranks().size())), channels,
        ExpertParallelConfig(), std::make_shared<RankTravel<double>::Cache>());
  };
  CHECK(test::message_of<ConfigError>([&] { bank.set_travel(nullptr); }) ==
        "GluBank::set_travel: travel is null, expected one for 6 experts");
  CHECK(test::message_of<ConfigError>([&] { bank.set_travel(travel(5)); }) ==
        "GluBank::set_travel: travel has another number of experts, expected one for 6 experts");
  bank.set_travel(travel(6));
  CHECK(bank.experts() == 6);
  CHECK(test::message_of<StateError>([&] { bank.set_travel(travel(6)); }) ==
        "GluBank::set_travel: the weights are fetched from a source or the experts are spread, "
        "expected all of them in memory here");
  CHECK(test::message_of<StateError>([&] { bank.remap_experts({.source = {0}}); }) ==
        "GluBank::remap_experts: the experts are spread, expected all of them here");
  GluBank<double>::Cache cache;
  const Matrix<double> x(0, 4);
  CHECK(test::message_of<StateError>([&] { bank.forward(x, {}, kTraining, cache); }) ==
        "GluBank::forward: the experts are spread for inference, expected ExpertParallel in a pass "
        "that trains");
}

}  // namespace weir::spread_experts_test
