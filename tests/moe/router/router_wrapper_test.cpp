// SPDX-License-Identifier: MIT
// Routers around routers: nothing of the inner one is lost.
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/moe/balance/hierarchical_load_loss.hpp>
#include <weir/moe/balance/load_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/cosine_router.hpp>
#include <weir/moe/router/gumbel_router.hpp>
#include <weir/moe/router/hash_router.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/input_dropout_router.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/layer_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/router/noisy_router.hpp>
#include <weir/moe/router/router_wrapper.hpp>
#include <weir/moe/router/temperature_router.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/catch.hpp"
#include "support/fixed_noise.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/same_draws.hpp"

namespace weir::router_wrapper_test {

namespace {

const Matrix<double> kWeight = test::random_matrix(4, 3, 1);

/// A wrapper of a user's own, which changes nothing.
template <Router Inner>
class Plain : public RouterWrapper<Inner> {
 public:
  using T = typename Inner::Scalar;
  using typename RouterWrapper<Inner>::Cache;

  explicit Plain(Inner inner) : RouterWrapper<Inner>(std::move(inner)) {}

  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    return this->inner_.forward(x, pass, cache.inner);
  }
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    return this->inner_.backward(dy, cache.inner);
  }
};

using Noisy = NoisyRouter<double, test::FixedNoise>;

constexpr Index kTokens = 7;
constexpr Index kModel = 3;

Noisy noisy_router(Index experts, std::uint64_t seed) {
  return Noisy(test::random_matrix(experts, kModel, seed),
               test::random_matrix(experts, kModel, seed + 1), {},
               {test::random_matrix(kTokens, experts, seed + 2)});
}

HierarchicalRouter<Noisy> two_levels() {
  return {noisy_router(3, 10), noisy_router(9, 20)};
}

test::FixedNoise gumbel_noise(Index experts) {
  return {test::random_matrix(kTokens, experts, 30)};
}

/// A layer whose gradient is mostly that of the load.
template <class R>
auto load_layer(R router, double coefficient = 5.0) {
  Rng rng(2);
  GluBank<double> bank(kModel, router.experts(), 2, rng, {.init_scale = 0.1});
  return MoELayer(std::move(router), TopKSoftmax<double>({.k = 2}), Dropless(), std::move(bank),
                  LoadLoss<double>({.coefficient = coefficient}));
}

template <class R>
auto hierarchical_load_layer(R router) {
  Rng rng(3);
  GluBank<double> bank(kModel, router.experts(), 2, rng, {.init_scale = 0.1});
  return MoELayer(std::move(router),
                  HierarchicalTopK<double>({.groups = 3, .group_k = 2, .k = 2, .rest_k = 1}),
                  Dropless(), std::move(bank), HierarchicalLoadLoss<double>({.coefficient = 5.0}));
}

const Matrix<double> kX = test::random_matrix(kTokens, kModel, 4);

template <class L>
void check_with_same_draws(L layer, const Pass& pass = {}) {
  test::SameDraws<L> same{std::move(layer)};
  test::check_gradients(same, kX, pass);
}

/// The gradient of the router's first parameter in the loss of the load alone.
template <class R>
Matrix<double> load_gradient(R router) {
  auto layer = load_layer(std::move(router));
  typename decltype(layer)::Cache cache;
  Rng rng(5);
  const Matrix<double> y = layer.forward(kX, {.training = true, .rng = &rng}, cache);
  layer.backward(Matrix<double>::Zero(y.rows(), y.cols()), cache);
  return parameters(layer.router())[0].parameter->gradient();
}

template <class R>
Matrix<double> vectors_of(R router) {
  REQUIRE(router.expert_vectors() != nullptr);
  return router.expert_vectors()->value;
}

}  // namespace

static_assert(Router<Plain<NoisyRouter<float>>>);
static_assert(Router<Plain<HierarchicalRouter<LinearRouter<float>>>>);

// --- What a wrapper forwards --------------------------------------------------------------------

TEST_CASE("A RouterWrapper forwards everything", "[moe][router][router_wrapper]") {
  Plain router(noisy_router(4, 6));
  CHECK(router.d_model() == kModel);
  CHECK(router.experts() == 4);
  CHECK(router.groups() == 0);
  CHECK(router.expert_vectors() == &router.inner().weight());
  CHECK(std::as_const(router).expert_vectors() == &router.inner().weight());
  REQUIRE(parameters(router).size() == 2);
  CHECK(parameters(router)[1].name == "noise_weight");
  CHECK(Plain(two_levels()).groups() == 3);

  decltype(router)::Cache cache;
  router.forward(kX, kTraining, cache);
  REQUIRE(router.noise(cache).size() == 1);
  CHECK(router.noise(cache).data() == router.inner().noise(cache.inner).data());
  CHECK(load_gradient(router) == load_gradient(noisy_router(4, 6)));
  router.forward(kX, {}, cache);
  CHECK(router.noise(cache).empty());
}

TEST_CASE("A router's weights keep full precision, wrapped or not",
          "[moe][router][router_wrapper]") {
  Rng rng(7);
  LayerRouter router(Linear<float>(5, 4, rng), 5, 4);
  const Matrix<float> weight = router.layer().weight().value;
  set_storage(router, Storage::kBfloat16);
  REQUIRE(parameters(router).size() == 1);
  CHECK(router.layer().weight().value == weight);
}

// --- Vectors of experts -------------------------------------------------------------------------

TEST_CASE("The vectors of a router's experts are the rows of its weight",
          "[moe][router][expert_vectors]") {
  CHECK(vectors_of(LinearRouter<double>(kWeight)) == kWeight);
  CHECK(vectors_of(LinearRouter<double>(kWeight, Matrix<double>::Ones(1, 4))) == kWeight);
  CHECK(vectors_of(NoisyRouter<double>(kWeight, Matrix<double>::Ones(4, 3))) == kWeight);
  Rng rng(1);
  CosineRouter<double> cosine(3, 4, rng, {.d_projection = 5});
  CHECK(vectors_of(cosine) == cosine.embedding().value);
  CosineRouter<double> square(4, 4, rng, {.d_projection = 4});  // The projection is [4, 4], too.
  CHECK(vectors_of(square) == square.embedding().value);
}

TEST_CASE("The vectors of the experts of a router around another are the inner router's",
          "[moe][router][expert_vectors]") {
  const LinearRouter<double> linear(kWeight);
  CHECK(vectors_of(JitterRouter(linear)) == kWeight);
  CHECK(vectors_of(InputDropoutRouter(linear)) == kWeight);
  CHECK(vectors_of(TemperatureRouter(linear)) == kWeight);
  CHECK(vectors_of(GumbelRouter(linear)) == kWeight);
  CHECK(vectors_of(LayerRouter(linear, 3, 4)) == kWeight);
  CHECK(vectors_of(TemperatureRouter(JitterRouter(linear))) == kWeight);
  CHECK(vectors_of(HierarchicalRouter(linear, JitterRouter(linear))) == kWeight);
}

TEST_CASE("The vectors of a router's experts are as const as the router",
          "[moe][router][expert_vectors]") {
  LinearRouter<double> linear(kWeight);
  const LinearRouter<double>& fixed = linear;
  CHECK(linear.expert_vectors() == &linear.weight());
  CHECK(fixed.expert_vectors() == &linear.weight());
  static_assert(std::is_same_v<decltype(linear.expert_vectors()), Parameter<double>*>);
  static_assert(std::is_same_v<decltype(fixed.expert_vectors()), const Parameter<double>*>);
}

TEST_CASE("A router without vectors of its experts has none", "[moe][router][expert_vectors]") {
  HashRouter<double> hash(3, 4, modulo_hash_table(10, 4));
  CHECK(hash.expert_vectors() == nullptr);
  CHECK(JitterRouter(hash).expert_vectors() == nullptr);
}

// --- Noise through one wrapper or several -------------------------------------------------------

TEST_CASE("GumbelRouter tells the logits without normal noise with its own noise on them",
          "[moe][router][router_wrapper][gumbel_router]") {
  const Noisy inner = noisy_router(4, 6);
  const GumbelRouter<Noisy, test::FixedNoise> router(inner, {.scale = 0.5}, gumbel_noise(4));
  decltype(router)::Cache cache;
  const Matrix<double> logits = router.forward(kX, kTraining, cache);
  const Matrix<double> clean = kX * inner.weight().value.transpose();
  const auto noise = router.noise(cache);
  REQUIRE(noise.size() == 1);
  CHECK(test::relative_error(noise[0].clean, clean + 0.5 * gumbel_noise(4).values) <= 1e-14);
  CHECK(noise[0].deviation == inner.noise(cache.inner)[0].deviation);
  const Matrix<double> drawn = test::random_matrix(kTokens, 4, 8).cwiseProduct(noise[0].deviation);
  CHECK(test::relative_error(logits - noise[0].clean, drawn) <= 1e-14);
  router.forward(kX, {}, cache);
  CHECK(router.noise(cache).empty());
}

TEST_CASE("TemperatureRouter divides logits without noise and deviations",
          "[moe][router][router_wrapper][temperature_router]") {
  const Noisy inner = noisy_router(4, 6);
  const TemperatureRouter router(inner, {.start = 4.0});
  decltype(router)::Cache cache;
  router.forward(kX, kTraining, cache);
  const auto of_inner = inner.noise(cache.inner);
  const auto noise = router.noise(cache);
  REQUIRE(noise.size() == 1);
  CHECK(test::relative_error(noise[0].clean, 0.25 * of_inner[0].clean) <= 1e-14);
  CHECK(noise[0].deviation == 0.25 * of_inner[0].deviation);
}

TEST_CASE("LoadLoss has the exact gradient through every router around a NoisyRouter",
          "[moe][router][router_wrapper][load_loss][gradient]") {
  const Noisy noisy = noisy_router(4, 6);
  const GumbelRouter<Noisy, test::FixedNoise> gumbel(noisy, {.scale = 0.5}, gumbel_noise(4));
  check_with_same_draws(load_layer(noisy));
  check_with_same_draws(load_layer(gumbel));
  check_with_same_draws(load_layer(LayerRouter(noisy, kModel, 4)));
  check_with_same_draws(load_layer(TemperatureRouter(noisy, {.start = 1.7})));
  check_with_same_draws(load_layer(JitterRouter(gumbel, {.epsilon = 0.3})));
  check_with_same_draws(load_layer(InputDropoutRouter(noisy, {.rate = 0.3})));
  check_with_same_draws(load_layer(GumbelRouter(
      TemperatureRouter(GumbelRouter(LayerRouter(noisy, kModel, 4)), {.start = 0.6}))));
}

TEST_CASE("LoadLoss has the same gradient through a router that changes nothing",
          "[moe][router][router_wrapper][load_loss]") {
  const Noisy noisy = noisy_router(4, 6);
  const Matrix<double> expected = load_gradient(noisy);
  CHECK(expected.norm() > 0.1);
  CHECK(load_gradient(LayerRouter(noisy, kModel, 4)) == expected);
  CHECK(load_gradient(JitterRouter(noisy, {.epsilon = 0.0})) == expected);
  CHECK(load_gradient(InputDropoutRouter(noisy, {.rate = 0.0})) == expected);
  CHECK(load_gradient(GumbelRouter(noisy, {.scale = 0.0})) == expected);
  CHECK(test::relative_error(load_gradient(TemperatureRouter(noisy)), expected) <= 1e-13);
  // The gradient with respect to the logits is tau times smaller, that of the loss the same.
  CHECK(test::relative_error(load_gradient(TemperatureRouter(noisy, {.start = 8.0})), expected) <=
        1e-12);
}

// --- Two levels of noise ------------------------------------------------------------------------

TEST_CASE("HierarchicalRouter tells the noise of both levels, around the logits without it",
          "[moe][router][hierarchical_router]") {
  const auto router = two_levels();
  decltype(two_levels())::Cache cache;
  const Matrix<double> z = router.forward(kX, kTraining, cache);
  const auto noise = router.noise(cache);
  REQUIRE(noise.size() == 2);
  const Noisy& groups = router.group_router();
  const Noisy& experts = router.expert_router();
  const Matrix<double> a_clean = kX * groups.weight().value.transpose();
  CHECK(test::relative_error(noise[0].clean, a_clean) <= 1e-14);
  CHECK(noise[0].deviation == groups.noise(cache.groups)[0].deviation);
  const Matrix<double> b_noise =
      test::random_matrix(kTokens, 9, 22).cwiseProduct(noise[1].deviation);
  CHECK(test::relative_error(noise[1].clean, z - b_noise) <= 1e-14);
  CHECK(noise[1].deviation == experts.noise(cache.experts)[0].deviation);
  router.forward(kX, {}, cache);
  CHECK(router.noise(cache).empty());
}

TEST_CASE("A level of a HierarchicalRouter that drew no noise has none of it",
          "[moe][router][hierarchical_router]") {
  const LinearRouter<double> quiet(test::random_matrix(3, kModel, 8));
  const HierarchicalRouter router(quiet, noisy_router(9, 20));
  decltype(router)::Cache cache;
  router.forward(kX, kTraining, cache);
  REQUIRE(router.noise(cache).size() == 2);
  CHECK(router.noise(cache)[0].deviation == Matrix<double>::Zero(kTokens, 3));
  CHECK(test::relative_error(router.noise(cache)[0].clean, infer(quiet, kX)) <= 1e-14);

  const HierarchicalRouter other(noisy_router(3, 20),
                                 LinearRouter<double>(kWeight.replicate(3, 1)));
  decltype(other)::Cache of_other;
  const Matrix<double> z = other.forward(kX, kTraining, of_other);
  REQUIRE(other.noise(of_other).size() == 2);
  CHECK(other.noise(of_other)[1].clean == z);
  CHECK(other.noise(of_other)[1].deviation == Matrix<double>::Zero(kTokens, 12));

  const HierarchicalRouter silent(quiet, quiet);
  decltype(silent)::Cache of_silent;
  silent.forward(kX, kTraining, of_silent);
  CHECK(silent.noise(of_silent).empty());
}

TEST_CASE("A HierarchicalRouter of three levels tells no noise",
          "[moe][router][hierarchical_router]") {
  const HierarchicalRouter below(noisy_router(3, 6),
                                 HierarchicalRouter(noisy_router(9, 10), noisy_router(18, 20)));
  decltype(below)::Cache cache;
  below.forward(kX, kTraining, cache);
  CHECK(below.noise(cache).empty());
  const HierarchicalRouter above(two_levels(), noisy_router(18, 6));
  decltype(above)::Cache other;
  const std::vector<std::uint8_t> allowed(18, 1);
  above.forward(kX, {.training = true, .allowed = allowed}, other);
  CHECK(above.noise(other).empty());
  check_with_same_draws(below);
  std::remove_const_t<decltype(below)> named = below;
  REQUIRE(parameters(named).size() == 6);
  CHECK(parameters(named)[0].name == "groups.weight");
  CHECK(parameters(named)[2].name == "experts.groups.weight");
  CHECK(parameters(named)[4].name == "experts.weight");
}

TEST_CASE("The groups' logits without noise are those of the allowed experts",
          "[moe][router][router_wrapper][hierarchical_router]") {
  // A group's logit is the logsumexp of those of its allowed experts, whatever was done to them;
  // it has the noise of the inner router's, times the scale.
  const std::vector<std::uint8_t> allowed = {1, 0, 1, 0, 0, 0, 1, 1, 1};
  const auto check = [&](const auto& router, double scale) {
    typename std::remove_cvref_t<decltype(router)>::Cache cache;
    const Matrix<double> z = router.forward(kX, {.training = true, .allowed = allowed}, cache);
    const auto noise = router.noise(cache);
    REQUIRE(noise.size() == 2);
    for (Index t = 0; t < kTokens; ++t) {
      for (const Index g : {0, 2}) {
        double sum = 0.0;
        for (Index e = 3 * g; e < 3 * g + 3; ++e) {
          if (allowed[static_cast<std::size_t>(e)] != 0) sum += std::exp(z(t, e));
        }
        const double eps = test::random_matrix(kTokens, 3, 12)(t, g);
        CHECK(std::log(sum) - noise[0].clean(t, g) == Approx(eps * noise[0].deviation(t, g)));
      }
      CHECK(noise[0].clean(t, 1) == -HUGE_VAL);
    }
    const Matrix<double> deviation = [&] {
      decltype(two_levels())::Cache own;
      const auto inner = two_levels();
      inner.forward(kX, kTraining, own);
      return Matrix<double>(inner.noise(own)[0].deviation);
    }();
    CHECK(test::relative_error(noise[0].deviation, scale * deviation) <= 1e-14);
  };
  const auto inner = two_levels();
  check(inner, 1.0);
  check(LayerRouter(inner, kModel, 9), 1.0);
  check(TemperatureRouter(inner, {.start = 1.6}), 1.0 / 1.6);
  check(GumbelRouter<HierarchicalRouter<Noisy>, test::FixedNoise>(inner, {}, gumbel_noise(9)), 1.0);
}

TEST_CASE("HierarchicalLoadLoss has the exact gradient through routers around two levels",
          "[moe][router][router_wrapper][hierarchical_load_loss][gradient]") {
  const std::vector<std::uint8_t> some = {1, 1, 0, 1, 1, 1, 0, 1, 1};
  const bool restricted = GENERATE(false, true);
  Pass pass{.aux_scale = 0.4};
  if (restricted) pass.allowed = some;
  const auto inner = two_levels();
  check_with_same_draws(hierarchical_load_layer(inner), pass);
  check_with_same_draws(hierarchical_load_layer(LayerRouter(inner, kModel, 9)), pass);
  check_with_same_draws(hierarchical_load_layer(TemperatureRouter(inner, {.start = 1.6})), pass);
  check_with_same_draws(hierarchical_load_layer(GumbelRouter(inner, {.scale = 0.5})), pass);
  check_with_same_draws(hierarchical_load_layer(JitterRouter(TemperatureRouter(
                            GumbelRouter(inner, {.scale = 0.5}), {.start = 0.7}))),
                        pass);
  check_with_same_draws(hierarchical_load_layer(HierarchicalRouter(
                            GumbelRouter(noisy_router(3, 10)),
                            TemperatureRouter(noisy_router(9, 20), {.start = 2.0}))),
                        pass);
}

}  // namespace weir::router_wrapper_test
