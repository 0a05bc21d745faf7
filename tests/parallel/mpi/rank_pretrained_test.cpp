// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/pretrained.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/mpi/rank_pretrained.hpp>
#include <weir/parallel/mpi/spread_experts.hpp>
#include <weir/presets/dbrx.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/scaled.hpp>

#include "parallel/mpi/rank_folder.hpp"
#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::rank_pretrained_test {

namespace {

namespace fs = std::filesystem;

presets::MixtralConfig small_mixtral() {
  return presets::scaled(presets::mixtral_8x7b(), {.d_model = 32, .vocab = 40});
}

template <class Config>
Decoder<float> make_model(const Config& config, std::uint64_t seed = 4) {
  Rng rng(seed);
  return presets::make<float>(config, rng);
}

std::shared_ptr<ExpertChannels> make_channels() {
  return std::make_shared<ExpertChannels>(test::ranks());
}

template <class Config>
Decoder<float> make_spread(const Config& config, std::uint64_t seed = 4) {
  Decoder<float> model = make_model(config, seed);
  spread_experts(model, make_channels());
  return model;
}

std::set<std::string> files_in(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) {
    names.insert(entry.path().filename().string());
  }
  return names;
}

void check_same(Decoder<float> a, Decoder<float> b) {
  const auto of_a = parameters(a), of_b = parameters(b);
  REQUIRE(of_a.size() == of_b.size());
  for (std::size_t i = 0; i < of_a.size(); ++i) {
    INFO(of_a[i].name);
    CHECK(of_a[i].name == of_b[i].name);
    CHECK(of_a[i].parameter->value == of_b[i].parameter->value);
  }
}

/// Saves a model of all ranks, and loads it on each alone.
template <class Config>
void check_family(const Config& config, std::int64_t shard_bytes) {
  const test::RankFolder folder;
  Channel channel(test::ranks());
  Decoder<float> part = make_spread(config);
  io::save_pretrained(channel, folder.path(), part, config, {.shard_bytes = shard_bytes});
  auto loaded = io::load_family<Config, float>(folder.path());
  CHECK(presets::settled(std::get<Config>(loaded.config).shape) == presets::settled(config.shape));
  Decoder<float> whole = make_model(config);
  check_same(loaded.model, whole);

  // The same tensors as one process saves.
  const io::CheckpointFolder tensors(folder.path());
  const fs::path alone = folder.path() / ("alone" + std::to_string(test::ranks().rank()));
  io::save_pretrained(alone, whole, config);
  CHECK(io::CheckpointFolder(alone).names() == tensors.names());
  CHECK(tensors.metadata().at("format") == "pt");
}

}  // namespace

TEST_CASE("A model that ranks save together is one folder that one process loads",
          "[parallel][mpi]") {
  const std::int64_t shard_bytes = GENERATE(1, 50'000, 5'000'000'000);
  check_family(small_mixtral(), shard_bytes);
  // Experts of all ranks in one tensor.
  check_family(presets::scaled(presets::dbrx(), {.d_model = 48, .vocab = 40}), shard_bytes);
}

TEST_CASE("Ranks write about as much as each other, and leave other files alone",
          "[parallel][mpi]") {
  const test::RankFolder folder;
  Channel channel(test::ranks());
  const presets::MixtralConfig config = small_mixtral();
  Decoder<float> other = make_spread(config, 5);
  io::save_pretrained(channel, folder.path() / "", other, config, {.shard_bytes = 20'000});
  CHECK(files_in(folder.path()).size() > 10);
  test::wait_for_ranks();
  if (test::ranks().rank() == 0) {
    std::ofstream(folder.path() / "tokenizer.json") << "{}";
    fs::create_directory(folder.path() / "more");
    std::ofstream(folder.path() / "more" / "notes.txt") << "kept";
  }
  test::wait_for_ranks();
  Decoder<float> part = make_spread(config);
  io::save_pretrained(channel, folder.path(), part, config);

  std::set<std::string> expected = {"config.json", "tokenizer.json", "more"};
  const auto ranks = static_cast<std::size_t>(test::ranks().size());
  std::uintmax_t least = UINTMAX_MAX, most = 0;
  for (std::size_t r = 0; r < ranks; ++r) {
    const std::string name = io::detail::shard_name(r, ranks);
    expected.insert(name);
    least = std::min(least, fs::file_size(folder.path() / name));
    most = std::max(most, fs::file_size(folder.path() / name));
  }
  if (ranks > 1) expected.insert("model.safetensors.index.json");
  CHECK(files_in(folder.path()) == expected);
  CHECK(static_cast<double>(most) < 1.7 * static_cast<double>(least));
  CHECK(fs::exists(folder.path() / "more" / "notes.txt"));
  CHECK_FALSE(fs::exists(folder.path().string() + ".partial"));
  Decoder<float> whole = make_model(config);
  check_same(io::load_family<presets::MixtralConfig, float>(folder.path()).model, whole);
}

TEST_CASE("A model that was trained on ranks is saved by them", "[parallel][mpi]") {
  const presets::MixtralConfig config = small_mixtral();
  const presets::ModelShape& shape = config.shape;
  const auto channels = make_channels();
  Rng rng(4);
  presets::Parts<float> parts = presets::usual_parts<float>(shape, config.norm_epsilon, rng);
  parts.mixture = [&] {
    return MoELayer(LinearRouter<float>(shape.d_model, shape.experts, rng),
                    TopKSoftmax<float>({.k = shape.k}), Dropless(),
                    ExpertParallel(presets::gated_experts<float>(shape, rng),
                                   Placement::round_robin(
                                       shape.experts, RankNodes::single(channels->counts.size())),
                                   channels));
  };
  Decoder<float> model = presets::compose<float>(shape, parts, rng);
  DataParallel<float> together(test::ranks());
  together.agree(model);
  AdamW<float> optimizer({.learning_rate = 1e-2});
  const std::vector<Index> ids = {1, 2, 3, 4, 5 + test::ranks().rank()};
  Decoder<float>::Cache cache;
  for (int step = 0; step < 2; ++step) {
    const Matrix<float> logits = model.forward(ids, kTraining, cache);
    model.backward(logits, cache);
    together.reduce(model);
    together.step(optimizer, model);
  }
  const test::RankFolder folder;
  io::save_pretrained(together.channel(), folder.path(), model, io::ModelConfig(config));
  auto loaded = io::load_family<presets::MixtralConfig, float>(folder.path());
  CHECK(infer(loaded.model, ids) == infer(model, ids));
}

TEST_CASE("What cannot be saved by all ranks leaves the folder as it was", "[parallel][mpi]") {
  const test::RankFolder folder;
  Channel channel(test::ranks());
  const presets::MixtralConfig config = small_mixtral();
  Decoder<float> part = make_spread(config);
  io::save_pretrained(channel, folder.path(), part, config);
  const auto files = files_in(folder.path());
  const Index last = test::ranks().size() - 1;

  Decoder<float> stored = part;
  if (test::ranks().rank() == last) set_storage(stored, Storage::kPacked);
  CHECK(test::message_of<io::FileError>(
            [&] { io::save_pretrained(channel, folder.path(), stored, config); })
            .starts_with("rank " + std::to_string(last) +
                         ": save_pretrained: weights are stored for inference"));
  presets::MixtralConfig wider = config;
  wider.shape.vocab = 41;
  CHECK(test::message_of<io::FileError>(
            [&] { io::save_pretrained(channel, folder.path(), part, wider); }) ==
        "rank 0: save_pretrained: 'embedding.weight' is [40, 32], expected a matrix of the "
        "whole model");
  CHECK(test::message_of<io::FileError>([&] {
          io::save_pretrained(channel, folder.path() / "config.json" / "x", part, config);
        }).starts_with("rank 0: "));
  CHECK_THROWS_AS(io::save_pretrained(channel, folder.path(), part, config, {.shard_bytes = 0}),
                  ConfigError);
  CHECK(files_in(folder.path()) == files);
  Decoder<float> whole = make_model(config);
  check_same(io::load_family<presets::MixtralConfig, float>(folder.path()).model, whole);
  test::wait_for_ranks();

  if (last == 0) return;
  const Communicator self(MPI_COMM_SELF);
  Channel alone(self);
  CHECK(test::message_of<io::FileError>([&] {
          io::save_pretrained(alone, folder.path() / std::to_string(test::ranks().rank()), part,
                              config);
        }).starts_with("rank 0: save_pretrained: no rank has 'layers.0.moe.experts."));
}

}  // namespace weir::rank_pretrained_test
