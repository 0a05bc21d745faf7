// SPDX-License-Identifier: MIT
#include <cstdint>
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/core/pass.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

using namespace weir;

namespace {

/// Multiplies by two; by three in training, if it is told of it.
struct Plain {
  using Scalar = double;
  struct Cache {};
  Matrix<double> forward(MatrixIn<double> x) const { return 2.0 * x; }
  Matrix<double> forward(MatrixIn<double> x, Cache&) const { return 2.0 * x; }
  Matrix<double> backward(MatrixIn<double> dy, Cache&) { return 2.0 * dy; }
  template <class Self, class Visit>
  static void visit(Self&, Visit&) {}
};

struct Told : Plain {
  using Plain::forward;
  Matrix<double> forward(MatrixIn<double> x, const Pass& pass, Cache&) const {
    return (pass.training ? 3.0 : 2.0) * x;
  }
};

static_assert(Layer<Plain> && !PassLayer<Plain>);
static_assert(Layer<Told> && PassLayer<Told>);
static_assert(!Layer<int>);

}  // namespace

TEST_CASE("A default pass knows nothing", "[core][pass]") {
  const Pass pass;
  CHECK_FALSE(pass.training);
  CHECK(pass.sequences == nullptr);
  CHECK(pass.rng == nullptr);
  CHECK(pass.aux_scale == 1.0);
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

TEST_CASE("apply hands the pass to layers that take one", "[core][pass]") {
  const Matrix<double> x = Matrix<double>::Ones(1, 1);
  Plain::Cache cache;
  const Pass training{.training = true};
  CHECK(apply(Plain{}, x, training, cache)(0, 0) == 2.0);
  CHECK(apply(Told{}, x, training, cache)(0, 0) == 3.0);
  CHECK(apply(Told{}, x, {}, cache)(0, 0) == 2.0);
}
