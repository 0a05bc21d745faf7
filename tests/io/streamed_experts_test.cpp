// SPDX-License-Identifier: MIT
#include <cstddef>
#include <string>
#include <thread>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/core/verbs.hpp>
#include <weir/io/expert_store.hpp>
#include <weir/io/pretrained.hpp>
#include <weir/io/streamed_experts.hpp>
#include <weir/presets/mixtral_8x7b.hpp>
#include <weir/presets/scaled.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::io {
namespace {

/// A store of experts that take `kBytes` each, and the numbers of those that had to be loaded.
class Loads {
 public:
  static constexpr std::size_t kBytes = 100;

  explicit Loads(std::size_t experts) : store_(experts * kBytes) {}

  void want(Index expert) {
    store_.get({0, expert}, kBytes, [&] {
      loaded_.push_back(expert);
      const Matrix<float> w = Matrix<float>::Constant(2, 2, static_cast<float>(expert));
      SharedMemory memory(PackedGlu<float>::bytes(2, 2, 2, Storage::kPacked));
      return PackedGlu<float>(w, w, w, Storage::kPacked, memory);
    });
  }

  /// The experts that `want` had to load.
  std::vector<Index> loaded(const std::vector<Index>& wanted) {
    loaded_.clear();
    for (const Index expert : wanted) want(expert);
    return loaded_;
  }

  const ExpertStore<float>& store() const { return store_; }

 private:
  ExpertStore<float> store_;
  std::vector<Index> loaded_;
};

using Experts = std::vector<Index>;

TEST_CASE("The expert that was used least recently makes room", "[io][experts]") {
  Loads loads(3);
  CHECK(loads.loaded({0, 1, 2}) == Experts{0, 1, 2});
  CHECK(loads.loaded({3}) == Experts{3});  // Instead of 0.
  CHECK_FALSE(loads.store().holds({0, 0}));
  CHECK_FALSE(loads.store().holds({1, 1}));  // Another layer.
  CHECK(loads.loaded({1, 2, 3}).empty());
  const ExpertStatistics s = loads.store().statistics();
  CHECK(s.hits == 3);
  CHECK(s.misses == 4);
  CHECK(s.evictions == 1);
  CHECK(s.bytes == 300);
  CHECK(s.most_bytes == 300);
  CHECK(s.hit_rate() == Approx(3.0 / 7.0));
  CHECK(ExpertStatistics().hit_rate() == 0.0);
}

TEST_CASE("Experts that are used often stay while others pass by", "[io][experts]") {
  Loads loads(4);
  CHECK(loads.loaded({7, 7, 8, 8}) == Experts{7, 8});
  // A least-recently-used store of four would lose both.
  CHECK(loads.loaded({0, 1, 2, 3, 4, 5}) == Experts{0, 1, 2, 3, 4, 5});
  CHECK(loads.loaded({7, 8}).empty());
  // More of them than the 3/4 that they may have: the coldest goes back to the others.
  CHECK(loads.loaded({9, 9, 10, 10}) == Experts{9, 10});
  CHECK(loads.loaded({8, 9, 10}).empty());
}

TEST_CASE("An expert larger than the store is still given", "[io][experts]") {
  ExpertStore<float> store(1);
  for (int i = 0; i < 2; ++i) {
    const PackedGlu<float> glu = store.get({0, i}, 64, [] {
      const Matrix<float> w = Matrix<float>::Ones(2, 2);
      SharedMemory memory(PackedGlu<float>::bytes(2, 2, 2, Storage::kPacked));
      return PackedGlu<float>(w, w, w, Storage::kPacked, memory);
    });
    CHECK(glu.down.rows() == 2);
    CHECK(store.statistics().bytes == 64);
  }
  CHECK_THROWS_WITH(ExpertStore<float>(0), "ExpertStore: capacity = 0, expected >= 1");
}

presets::MixtralConfig small_config() {
  return presets::scaled(presets::mixtral_8x7b(), {.layers = 3, .experts = 8});
}

std::vector<Index> ids(Index count) {
  std::vector<Index> all;
  for (Index i = 0; i < count; ++i) all.push_back((i * i + 3 * i) % 251);
  return all;
}

TEST_CASE("Streamed experts give the bits of resident ones", "[io][experts]") {
  const test::Folder folder;
  Rng rng(3);
  const presets::MixtralConfig config = small_config();
  Decoder<float> trained = presets::make<float>(config, rng);
  save_pretrained(folder.path(), trained, config);
  const auto storage = GENERATE(Storage::kPacked, Storage::kBfloat16);
  const Decoder<float> resident = load_pretrained<float>(folder.path(), {.storage = storage}).model;
  const Matrix<float> expected = infer(resident, ids(40));
  const std::size_t one = PackedGlu<float>::bytes(config.shape.d_model, config.shape.d_hidden,
                                                  config.shape.d_model, storage);
  for (const std::size_t bytes : {std::size_t{1}, 3 * one, 6 * one, 100 * one}) {
    const auto streamed =
        load_pretrained<float>(folder.path(), {.storage = storage, .expert_bytes = bytes});
    REQUIRE(streamed.experts != nullptr);
    for (int repeat = 0; repeat < 2; ++repeat) {
      CHECK(infer(streamed.model, ids(40)) == expected);
      Decoder<float>::State own;
      Decoder<float>::State other;
      Decoder<float>::Cache cache;
      for (const Index id : ids(10)) {
        const std::vector<Index> next = {id};
        const Matrix<float> logits = decode(streamed.model, next, own, cache);
        CHECK(logits == decode(resident, next, other, cache));
      }
    }
    const ExpertStatistics s = streamed.experts->statistics();
    CHECK(s.most_bytes <= std::max(bytes, one));
    CHECK(s.misses > 0);
    if (bytes == 100 * one) {
      CHECK(s.evictions == 0);
      CHECK(s.misses <= 3 * 8);
      CHECK(s.hits > s.misses);
    } else {
      CHECK(s.evictions > 0);
      CHECK(s.predicted > 0);
    }
    CHECK(s.confirmed <= s.predicted);
    const Decoder<float> copy = streamed.model;
    CHECK(infer(copy, ids(40)) == expected);
  }
}

TEST_CASE("Threads share streamed experts", "[io][experts]") {
  const test::Folder folder;
  Rng rng(3);
  const presets::MixtralConfig config = small_config();
  Decoder<float> trained = presets::make<float>(config, rng);
  save_pretrained(folder.path(), trained, config);
  const auto streamed =
      load_pretrained<float>(folder.path(), {.storage = Storage::kPacked, .expert_bytes = 20'000});
  const Matrix<float> expected = infer(streamed.model, ids(20));
  std::vector<Matrix<float>> results(3);
  std::vector<std::thread> threads;
  for (Matrix<float>& result : results) {
    threads.emplace_back([&] {
      for (int i = 0; i < 5; ++i) result = infer(streamed.model, ids(20));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Matrix<float>& result : results) CHECK(result == expected);
}

TEST_CASE("Streamed experts do not train", "[io][experts]") {
  const test::Folder folder;
  Rng rng(3);
  const presets::MixtralConfig config = small_config();
  Decoder<float> trained = presets::make<float>(config, rng);
  save_pretrained(folder.path(), trained, config);
  CHECK_THROWS_WITH(
      load_pretrained<float>(folder.path(), {.expert_bytes = 1000}),
      "load_pretrained: expert_bytes = 1000 with storage = kTrainable, expected kPacked or "
      "kBfloat16");
  auto streamed =
      load_pretrained<float>(folder.path(), {.storage = Storage::kPacked, .expert_bytes = 1000});
  CHECK_FALSE(is_trainable(streamed.model));
  CHECK_THROWS_WITH(
      set_storage(streamed.model, Storage::kTrainable),
      "GluBank::set_storage: the weights are fetched from a source, expected weights in memory");
  GluBank<float> bank(4, 2, 3, rng);
  CHECK_THROWS_WITH(bank.set_source(nullptr, Storage::kPacked),
                    "GluBank::set_source: source is null or storage kTrainable, expected a source "
                    "of weights stored as kPacked or kBfloat16");
}

}  // namespace
}  // namespace weir::io
