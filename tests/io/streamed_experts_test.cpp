// SPDX-License-Identifier: MIT
#include <cstddef>
#include <string>
#include <thread>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/core/storage_rules.hpp>
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

namespace weir::io::streamed_experts_test {
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
  const auto storage =
      GENERATE(Storage::kPacked, Storage::kBfloat16, Storage::kInt4Dot, Storage::kFp8);
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

TEST_CASE("Streamed experts have the storage of their rule", "[io][experts]") {
  const test::Folder folder;
  Rng rng(3);
  const presets::MixtralConfig config = small_config();
  Decoder<float> trained = presets::make<float>(config, rng);
  save_pretrained(folder.path(), trained, config);
  const StorageRules rules = {{"layers.1.*experts", Storage::kMxFp4}, {"*experts", Storage::kInt8}};
  const auto resident = load_pretrained<float>(folder.path(), {.rules = rules});
  const auto streamed =
      load_pretrained<float>(folder.path(), {.rules = rules, .expert_bytes = 20'000});
  CHECK(infer(streamed.model, ids(20)) == infer(resident.model, ids(20)));
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

/// A model whose layers leave their tokens as they are, so that all layers get the same, but for
/// the sign that `signs` gives the input of each layer's mixture.
Decoder<float> constant_model(const presets::MixtralConfig& config,
                              const std::vector<float>& signs) {
  Rng rng(5);
  Decoder<float> model = presets::make<float>(config, rng);
  for (auto& [name, parameter] : parameters(model)) {
    if (name.ends_with("attention.output") || name.ends_with(".down")) parameter->value.setZero();
    for (std::size_t l = 0; l < signs.size(); ++l) {
      if (name == "layers." + std::to_string(l) + ".moe_norm.weight") {
        parameter->value.setConstant(signs[l]);
      }
    }
  }
  return model;
}

TEST_CASE("Predictions are counted, and those that come true", "[io][experts]") {
  const test::Folder folder;
  const presets::MixtralConfig config = small_config();  // 2 of 8 experts in each of 3 layers.
  const auto counts = [&](const std::vector<float>& signs) {
    Decoder<float> trained = constant_model(config, signs);
    save_pretrained(folder.path(), trained, config);
    // With room for a single expert, those that are predicted are never there.
    const auto streamed =
        load_pretrained<float>(folder.path(), {.storage = Storage::kPacked, .expert_bytes = 1});
    Decoder<float>::State state;
    Decoder<float>::Cache cache;
    for (const Index id : ids(10)) decode(streamed.model, std::vector<Index>{id}, state, cache);
    const ExpertStatistics s = streamed.experts->statistics();
    CHECK(s.misses == 10 * 3 * 2);
    CHECK(s.predicted == 10 * 2 * 2);
    return s.confirmed;
  };
  // The router of the next layer sees now what it will see then,
  CHECK(counts({1.0F, 1.0F, 1.0F}) == 10 * 2 * 2);
  // or the opposite, of which the best two of eight are others; so in one layer or in both.
  CHECK(counts({1.0F, 1.0F, -1.0F}) == 10 * 2);
  CHECK(counts({1.0F, -1.0F, -1.0F}) == 10 * 2);
  CHECK(counts({1.0F, -1.0F, 1.0F}) == 0);
}

TEST_CASE("Experts in memory and passes of many tokens are not predicted", "[io][experts]") {
  const test::Folder folder;
  const presets::MixtralConfig config = small_config();
  Decoder<float> trained = constant_model(config, {});
  save_pretrained(folder.path(), trained, config);
  const LoadConfig roomy{.storage = Storage::kPacked, .expert_bytes = 10'000'000};
  const auto streamed = load_pretrained<float>(folder.path(), roomy);
  infer(streamed.model, ids(9));
  CHECK(streamed.experts->statistics().predicted == 0);
  const auto others = load_pretrained<float>(folder.path(), roomy);
  infer(others.model, ids(1));
  const ExpertStatistics first = others.experts->statistics();
  CHECK(first.predicted == 2 * 2);
  CHECK(first.confirmed == 2 * 2);
  infer(others.model, ids(1));
  CHECK(others.experts->statistics().predicted == first.predicted);
}

TEST_CASE("Streamed experts do not train", "[io][experts]") {
  const test::Folder folder;
  Rng rng(3);
  const presets::MixtralConfig config = small_config();
  Decoder<float> trained = presets::make<float>(config, rng);
  save_pretrained(folder.path(), trained, config);
  CHECK_THROWS_WITH(
      load_pretrained<float>(folder.path(), {.expert_bytes = 1000}),
      "load_pretrained: expert_bytes = 1000 with storage = kTrainable, expected a storage for "
      "inference");
  auto streamed =
      load_pretrained<float>(folder.path(), {.storage = Storage::kPacked, .expert_bytes = 1000});
  CHECK_FALSE(is_trainable(streamed.model));
  // What cannot be stored otherwise as a whole stays as it is.
  const Matrix<float> expected = infer(streamed.model, ids(10));
  const std::size_t count = parameters(streamed.model).size();
  constexpr auto kRefusal =
      "GluBank::set_storage: the weights are fetched from a source, expected weights in memory";
  CHECK_THROWS_WITH(set_storage(streamed.model, Storage::kTrainable), kRefusal);
  CHECK_THROWS_WITH(set_storage(streamed.model, Storage::kBfloat16), kRefusal);
  CHECK_THROWS_WITH(set_storage(streamed.model, {{"*", Storage::kInt8}}), kRefusal);
  CHECK(parameters(streamed.model).size() == count);
  CHECK((infer(streamed.model, ids(10)) == expected));
  set_storage(streamed.model, Storage::kPacked);
  GluBank<float> bank(4, 2, 3, rng);
  CHECK_THROWS_WITH(bank.set_source(nullptr, Storage::kPacked),
                    "GluBank::set_source: source is null or storage kTrainable, expected a source "
                    "of weights stored for inference");
}

}  // namespace
}  // namespace weir::io::streamed_experts_test
