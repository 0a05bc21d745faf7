// SPDX-License-Identifier: MIT
#include <cstdint>
#include <string>
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/core/pass.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::pass_test {

namespace {

/// Multiplies by two; by three in training.
struct Multiplies {
  using Scalar = double;
  struct Cache {
    CacheState state;
    Matrix<double> y, dx;
  };
  const Matrix<double>& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    if (x.cols() == 0) throw_error<ShapeError>("no columns");
    cache.y = (pass.training ? 3.0 : 2.0) * x;
    return cache.state.finish(*this, pass, cache.y);
  }
  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    cache.state.begin_backward("Multiplies::backward", *this, dy);
    cache.dx = 3.0 * dy;
    return cache.dx;
  }
  template <class Self, class Visit>
  static void visit(Self&, Visit&) {}
};

static_assert(Layer<Multiplies>);
static_assert(!Layer<int>);

}  // namespace

TEST_CASE("A default pass knows nothing", "[core][pass]") {
  const Pass pass;
  CHECK_FALSE(pass.training);
  CHECK(pass.sequences == nullptr);
  CHECK(pass.rng == nullptr);
  CHECK(pass.aux_scale == 1.0);
  CHECK(pass.record == nullptr);
  CHECK_FALSE(pass.has_aux_losses());
  CHECK_FALSE(pass.is_padding(1000));
  pass.check("here", 7);
}

TEST_CASE("A mask marks padding with zeros", "[core][pass]") {
  const std::vector<std::uint8_t> mask = {1, 0, 255};
  const Pass pass{.mask = mask};
  CHECK_FALSE(pass.is_padding(0));
  CHECK(pass.is_padding(1));
  CHECK_FALSE(pass.is_padding(2));
  pass.check("here", 3);
}

TEST_CASE("A pass says what does not fit the tokens", "[core][pass]") {
  const std::vector<std::uint8_t> mask = {1, 0};
  const Pass masked{.mask = mask};
  CHECK(test::message_of<ShapeError>([&] { masked.check("MoELayer::forward", 3); }) ==
        "MoELayer::forward: pass.mask has 2 entries, expected 3 (one per token)");
  const std::vector<Index> ids = {7, 8};
  const Pass named{.token_ids = ids};
  named.check("here", 2);
  CHECK(test::message_of<ShapeError>([&] { named.check("MoELayer::forward", 3); }) ==
        "MoELayer::forward: pass.token_ids has 2 entries, expected 3 (one per token)");
  const Sequences sequences({2, 3});
  const Pass packed{.sequences = &sequences};
  packed.check("here", 5);
  CHECK(test::message_of<ShapeError>([&] { packed.check("Attention::forward", 4); }) ==
        "Attention::forward: pass.sequences cover 5 tokens, expected 4");
}

TEST_CASE("Auxiliary losses are computed where they are differentiated or asked for",
          "[core][pass]") {
  PassRecord record;
  CHECK(kTraining.has_aux_losses());
  CHECK((Pass{.record = &record}).has_aux_losses());
  CHECK_FALSE((Pass{.training = true, .aux_scale = 0.0, .record = &record}).has_aux_losses());
}

TEST_CASE("A pass without a generator says who wanted one", "[core][pass]") {
  CHECK(test::message_of<ConfigError>([] { Pass{}.generator("RankPolicy"); }) ==
        "RankPolicy: pass.rng = null, expected a generator");
  CHECK(test::message_of<ConfigError>([] { kTraining.generator("NormalNoise"); }) ==
        "NormalNoise: pass.rng = null, expected a generator in training");
  Rng rng(1);
  CHECK(&Pass{.rng = &rng}.generator("x") == &rng);
}

TEST_CASE("infer runs a layer without a cache", "[core][layer]") {
  const Matrix<double> x = Matrix<double>::Ones(2, 1);
  CHECK(infer(Multiplies{}, x) == 2.0 * x);
  CHECK(infer(Multiplies{}, x, kTraining) == 3.0 * x);
}

TEST_CASE("A cache knows whose it is and where it stands", "[core][cache_state]") {
  Multiplies layer;
  Multiplies other;
  Multiplies::Cache cache;
  const Matrix<double> x = Matrix<double>::Ones(2, 3);
  const auto message = [&](Multiplies& of) {
    return test::message_of<StateError>([&] { of.backward(x, cache); });
  };
  const std::string empty =
      "Multiplies::backward: the cache is empty, expected a forward pass that succeeded";
  CHECK(message(layer) == empty);

  layer.forward(x, {}, cache);
  CHECK(message(layer) ==
        "Multiplies::backward: the forward pass did not train, expected one with pass.training = "
        "true");
  layer.forward(x, kTraining, cache);
  CHECK(message(other) ==
        "Multiplies::backward: the cache was filled by another layer, expected a forward pass of "
        "this one");
  CHECK(test::message_of<ShapeError>([&] { layer.backward(x.topRows(1), cache); }) ==
        "Multiplies::backward: dy is [1, 3], expected [2, 3]");
  CHECK(layer.backward(x, cache) == 3.0 * x);  // What was refused before has changed nothing.
  CHECK(message(layer) ==
        "Multiplies::backward: the cache was used by a backward pass already, expected a forward "
        "pass between the two");

  layer.forward(x, kTraining, cache);
  CHECK_THROWS_AS(layer.forward(Matrix<double>(2, 0), kTraining, cache), ShapeError);
  CHECK(message(layer) == empty);
}

}  // namespace weir::pass_test
