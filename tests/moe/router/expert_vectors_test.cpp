// SPDX-License-Identifier: MIT
#include <type_traits>

#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/expert_vectors.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/input_dropout_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/temperature_router.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

using namespace weir;

namespace {

const Matrix<double> kWeight = test::random_matrix(4, 3, 1);

template <class R>
Matrix<double> vectors_of(R router) {
  REQUIRE(expert_vectors(router) != nullptr);
  return expert_vectors(router)->value;
}

}  // namespace

TEST_CASE("expert_vectors are the rows of a router's weight", "[moe][expert_vectors]") {
  CHECK(vectors_of(LinearRouter<double>(kWeight)) == kWeight);
  CHECK(vectors_of(LinearRouter<double>(kWeight, Matrix<double>::Ones(1, 4))) == kWeight);
  CHECK(vectors_of(NoisyRouter<double>(kWeight, Matrix<double>::Ones(4, 3))) == kWeight);
  Rng rng(1);
  CosineRouter<double> cosine(3, 4, rng, {.d_projection = 5});
  CHECK(vectors_of(cosine) == cosine.embedding().value);
  CosineRouter<double> square(4, 4, rng, {.d_projection = 4});  // The projection is [4, 4], too.
  CHECK(vectors_of(square) == square.embedding().value);
}

TEST_CASE("expert_vectors of a router around another are the inner router's",
          "[moe][expert_vectors]") {
  const LinearRouter<double> linear(kWeight);
  CHECK(vectors_of(JitterRouter(linear)) == kWeight);
  CHECK(vectors_of(InputDropoutRouter(linear)) == kWeight);
  CHECK(vectors_of(TemperatureRouter(linear)) == kWeight);
  CHECK(vectors_of(GumbelRouter(linear)) == kWeight);
  CHECK(vectors_of(TemperatureRouter(JitterRouter(linear))) == kWeight);
}

TEST_CASE("expert_vectors are those of the router itself, const as it is",
          "[moe][expert_vectors]") {
  LinearRouter<double> linear(kWeight);
  const LinearRouter<double>& fixed = linear;
  CHECK(expert_vectors(linear) == &linear.weight());
  CHECK(expert_vectors(fixed) == &linear.weight());
  static_assert(std::is_same_v<decltype(expert_vectors(linear)), Parameter<double>*>);
  static_assert(std::is_same_v<decltype(expert_vectors(fixed)), const Parameter<double>*>);
}

TEST_CASE("A router without vectors of its experts has none", "[moe][expert_vectors]") {
  HashRouter<double> hash(3, 4, modulo_hash_table(10, 4));
  CHECK(expert_vectors(hash) == nullptr);
}
