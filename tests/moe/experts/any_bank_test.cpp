// SPDX-License-Identifier: MIT
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>

#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::any_bank_test {

static_assert(ExpertBank<AnyBank<Glu<float>>>);
static_assert(ExpertBank<AnyBank<Linear<double>>>);

namespace {

/// y = a x: a layer of a user's own.
struct Scale {
  using Scalar = double;
  struct Cache {
    Matrix<double> x, y, dx;
  };

  const Matrix<double>& forward(MatrixIn<double> x, const Pass& /*pass*/, Cache& cache) const {
    cache.x = x;
    cache.y = a.value(0, 0) * x;
    return cache.y;
  }
  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    a.gradient()(0, 0) += dy.cwiseProduct(cache.x).sum();
    cache.dx = a.value(0, 0) * dy;
    return cache.dx;
  }
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("a", self.a);
  }

  Parameter<double> a;
};

std::vector<Scale> scales(const std::vector<double>& factors) {
  std::vector<Scale> experts;
  for (const double a : factors) experts.push_back({{Matrix<double>::Constant(1, 1, a)}});
  return experts;
}

/// A layer that keeps what it sees of the pass, and adds a random number to each row.
struct Probe {
  using Scalar = double;
  struct Cache {
    Pass pass;
    std::vector<Index> token_ids;
    Matrix<double> y, dx;
  };

  const Matrix<double>& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    pass.check("Probe", x.rows());
    cache.pass = pass;
    cache.token_ids.assign(pass.token_ids.begin(), pass.token_ids.end());
    cache.y = x;
    for (Index t = 0; pass.rng != nullptr && t < x.rows(); ++t) {
      cache.y.row(t).array() += pass.rng->uniform();
    }
    if (pass.record != nullptr) pass.record->add_loss("rows", static_cast<double>(x.rows()));
    return cache.y;
  }
  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    cache.dx = dy;
    return cache.dx;
  }
  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}
};

/// A dispatch of one expert for each token, of `experts`, with a weight of one.
Dispatch<double> dispatch_to(Index experts, const std::vector<Index>& chosen) {
  Assignments assignments;
  assignments.expert_count = experts;
  assignments.offsets.assign(1, 0);
  for (const Index e : chosen) {
    assignments.expert.push_back(e);
    assignments.kept.push_back(1);
    assignments.offsets.push_back(assignments.assignments());
  }
  Dispatch<double> dispatch;
  dispatch.build(assignments, std::vector<double>(chosen.size(), 1.0));
  return dispatch;
}

Dispatch<double> dispatch_of(const Routing<double>& routing) {
  Dispatch<double> dispatch;
  dispatch.build(routing);
  return dispatch;
}

Routing<double> route(const Matrix<double>& logits, Index k, const Pass& pass = {}) {
  return test::route(SoftmaxTopK<double>({.k = k}), logits, pass);
}

/// A mixture [tokens, 4] -> [tokens, 4] of two experts, with losses and a rule of its own.
auto small_mixture(Rng& rng) {
  return MoELayer(LinearRouter<double>(4, 2, rng, {.init_scale = 5.0}),
                  SigmoidTopK<double>(2, {.k = 1}), Dropless(), GluBank<double>(4, 2, 3, rng),
                  SwitchLoss<double>({.coefficient = 0.4}), ZLoss<double>({.coefficient = 0.2}),
                  BiasBalance<double>({.rate = 0.01}));
}

/// A mixture of three of those.
auto mixture_of_mixtures() {
  Rng rng(5);
  std::vector<decltype(small_mixture(rng))> experts;
  for (int e = 0; e < 3; ++e) experts.push_back(small_mixture(rng));
  return MoELayer(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}),
                  TopKSoftmax<double>({.k = 2}), Dropless(), AnyBank(std::move(experts), 4, 4),
                  SwitchLoss<double>({.coefficient = 0.3}));
}

std::vector<std::string> names_of(const PassRecord& record) {
  std::vector<std::string> names;
  for (const PassRecord::Loss& loss : record.losses()) names.push_back(loss.name);
  return names;
}

}  // namespace

TEST_CASE("AnyBank runs each expert on its tokens", "[moe][experts][any_bank]") {
  const AnyBank<Scale> bank(scales({10.0, 1.0, -2.0}), 4, 4);
  CHECK(bank.experts() == 3);
  CHECK(bank.d_in() == 4);
  CHECK(bank.d_out() == 4);

  const Matrix<double> x = test::random_matrix(8, 4, 1);
  const std::vector<std::uint8_t> mask = {1, 1, 1, 0, 1, 1, 1, 1};
  Routing<double> routing = route(test::random_matrix(8, 3, 2), 2, {.mask = mask});
  if (GENERATE(false, true)) test::limit(FixedCapacity({.capacity = 2}), routing);
  const Dispatch<double> dispatch = dispatch_of(routing);

  const double factor[] = {10.0, 1.0, -2.0};
  Matrix<double> expected = Matrix<double>::Zero(8, 4);
  for (Index t = 0; t < 8; ++t) {
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      if (routing.kept[a] != 0) {
        expected.row(t) += routing.weight[a] * factor[routing.expert[a]] * x.row(t);
      }
    }
  }
  AnyBank<Scale>::Cache cache;
  CHECK(test::relative_error(bank.forward(x, dispatch, {.mask = mask}, cache), expected) < 1e-14);
}

TEST_CASE("AnyBank of Glu is GluBank", "[moe][experts][any_bank]") {
  constexpr Index kExperts = 3;
  std::vector<Matrix<double>> gate;
  std::vector<Matrix<double>> up;
  std::vector<Matrix<double>> down;
  std::vector<Glu<double>> experts;
  for (std::uint64_t e = 0; e < kExperts; ++e) {
    gate.push_back(test::random_matrix(5, 4, 10 + e));
    up.push_back(test::random_matrix(5, 4, 20 + e));
    down.push_back(test::random_matrix(4, 5, 30 + e));
    experts.emplace_back(gate.back(), up.back(), down.back());
  }
  GluBank<double> glu(gate, up, down);
  AnyBank<Glu<double>> any(experts, 4, 4);

  Routing<double> routing = route(test::random_matrix(9, kExperts, 2), 2);
  test::limit(FixedCapacity({.capacity = 5}), routing);
  const Dispatch<double> dispatch = dispatch_of(routing);
  const Matrix<double> x = test::random_matrix(9, 4, 3);
  const Matrix<double> dy = test::random_matrix(9, 4, 4);
  GluBank<double>::Cache glu_cache;
  AnyBank<Glu<double>>::Cache any_cache;
  CHECK(test::relative_error(any.forward(x, dispatch, kTraining, any_cache),
                             glu.forward(x, dispatch, kTraining, glu_cache)) < 1e-14);

  std::vector<double> glu_weight(18);
  std::vector<double> any_weight(18);
  CHECK(test::relative_error(any.backward(dy, dispatch, any_weight, any_cache),
                             glu.backward(dy, dispatch, glu_weight, glu_cache)) < 1e-14);
  for (std::size_t a = 0; a < 18; ++a) CHECK(any_weight[a] == Approx(glu_weight[a]));
  const auto expected = parameters(glu);
  const auto actual = parameters(any);
  REQUIRE(actual.size() == expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    CHECK(actual[i].name == expected[i].name);
    INFO(expected[i].name);
    CHECK(test::relative_error(actual[i].parameter->grad, expected[i].parameter->grad) < 1e-14);
  }
}

TEST_CASE("AnyBank gradients agree with finite differences", "[moe][experts][any_bank][gradient]") {
  Rng rng(5);
  SECTION("of layers that change the width") {
    std::vector<Linear<double>> experts;
    for (int e = 0; e < 3; ++e) experts.emplace_back(4, 2, rng, LinearConfig{.bias = true});
    MoELayer moe(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}),
                 SoftmaxTopK<double>({.k = 2}), Dropless(), AnyBank(experts, 4, 2));
    test::check_gradients(moe, test::random_matrix(6, 4, 3));
  }
  SECTION("of layers of a user's own") {
    MoELayer moe(LinearRouter<double>(4, 3, rng, {.init_scale = 5.0}),
                 SoftmaxTopK<double>({.k = 2}), Dropless(),
                 AnyBank(scales({1.0, -0.5, 2.0}), 4, 4));
    test::check_gradients(moe, test::random_matrix(6, 4, 3));
  }
}

TEST_CASE("AnyBank leaves experts without tokens alone", "[moe][experts][any_bank]") {
  AnyBank<Scale> bank(scales({1.0, 2.0, 3.0}), 4, 4);
  Matrix<double> logits = Matrix<double>::Zero(2, 3);
  logits.col(1).setOnes();
  const Dispatch<double> dispatch = dispatch_of(route(logits, 1));
  AnyBank<Scale>::Cache cache;
  bank.forward(test::random_matrix(2, 4, 1), dispatch, kTraining, cache);
  std::vector<double> d_weight(2);
  bank.backward(test::random_matrix(2, 4, 2), dispatch, d_weight, cache);
  const auto all = parameters(bank);
  REQUIRE(all.size() == 3);
  CHECK(all[1].name == "1.a");
  CHECK(all[0].parameter->grad.size() == 0);
  CHECK(all[1].parameter->grad.size() == 1);
  CHECK(all[2].parameter->grad.size() == 0);
}

TEST_CASE("AnyBank takes no tokens", "[moe][experts][any_bank]") {
  Rng rng(1);
  AnyBank<Linear<double>> bank({Linear<double>(4, 2, rng)}, 4, 2);
  const Dispatch<double> dispatch = dispatch_of(route(Matrix<double>(0, 1), 1));
  AnyBank<Linear<double>>::Cache cache;
  CHECK(bank.forward(Matrix<double>(0, 4), dispatch, kTraining, cache).cols() == 2);
  CHECK(bank.backward(Matrix<double>(0, 2), dispatch, {}, cache).cols() == 4);
}

TEST_CASE("AnyBank does not look at the cache of an expert without tokens",
          "[moe][experts][any_bank]") {
  Rng rng(1);
  AnyBank<Linear<double>> bank({Linear<double>(4, 4, rng), Linear<double>(4, 4, rng)}, 4, 4);
  AnyBank<Linear<double>>::Cache cache;
  bank.forward(test::random_matrix(3, 4, 1), dispatch_to(2, {0, 1, 1}), kTraining, cache);
  const Dispatch<double> first_only = dispatch_to(2, {0, 0});
  bank.forward(test::random_matrix(2, 4, 2), first_only, kTraining, cache);
  std::vector<double> d_weight(2);
  bank.backward(test::random_matrix(2, 4, 3), first_only, d_weight, cache);
  CHECK(bank.expert(0).weight().grad.size() == 16);
  CHECK(bank.expert(1).weight().grad.size() == 0);
}

TEST_CASE("AnyBank gives each expert a pass of its own rows", "[moe][experts][any_bank]") {
  const AnyBank<Probe> bank(std::vector<Probe>(3), 4, 4);
  const Sequences sequences({2, 3});
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 0};
  const std::vector<std::uint8_t> allowed = {1, 1, 1};
  const std::vector<Index> ids = {50, 51, 52, 53, 54};
  Rng rng(1);
  PassRecord record;
  const Pass pass{.training = true,
                  .sequences = &sequences,
                  .mask = mask,
                  .token_ids = ids,
                  .allowed = allowed,
                  .rng = &rng,
                  .aux_scale = 0.25,
                  .record = &record};
  AnyBank<Probe>::Cache cache;
  const Dispatch<double> dispatch = dispatch_to(3, {2, 0, 2, 2, 0});
  bank.forward(test::random_matrix(5, 4, 1), dispatch, pass, cache);
  for (const std::size_t e : {0U, 2U}) {
    const Pass& own = cache.experts[e].pass;
    CHECK(own.training);
    CHECK(own.aux_scale == 0.25);
    CHECK(own.sequences == nullptr);
    CHECK(own.mask.empty());
    CHECK(own.allowed.empty());
    CHECK(own.rng != &rng);
    CHECK(own.record != &record);
  }
  CHECK(cache.experts[0].token_ids == std::vector<Index>{51, 54});
  CHECK(cache.experts[2].token_ids == std::vector<Index>{50, 52, 53});
  CHECK(names_of(record) == std::vector<std::string>{"0.rows", "2.rows"});
  CHECK(record.losses()[1].value == 3.0);

  bank.forward(test::random_matrix(5, 4, 1), dispatch, {}, cache);
  const Pass& plain = cache.experts[2].pass;
  CHECK_FALSE(plain.training);
  CHECK(plain.rng == nullptr);
  CHECK(plain.record == nullptr);
  CHECK(plain.token_ids.empty());
}

TEST_CASE("What an expert of AnyBank draws depends on no other expert and no thread",
          "[moe][experts][any_bank]") {
  const AnyBank<Probe> bank(std::vector<Probe>(3), 4, 4);
  const auto run = [&](const std::vector<Index>& chosen, std::uint64_t seed) {
    Rng rng(seed);
    AnyBank<Probe>::Cache cache;
    const auto tokens = static_cast<Index>(chosen.size());
    Matrix<double> y =
        bank.forward(Matrix<double>::Zero(tokens, 4), dispatch_to(3, chosen), {.rng = &rng}, cache);
    CHECK(rng.position() == 3);
    return y;
  };
  const Matrix<double> y = run({1, 1, 0, 2, 0, 2}, 7);
  // Expert 0 without tokens, and with more; expert 1 without.
  CHECK(run({1, 1, 1, 2, 1, 2}, 7).row(5) == y.row(5));
  CHECK(run({0, 0, 0, 2, 0, 2}, 7).row(5) == y.row(5));
  CHECK(run({1, 1, 0, 2, 0, 2}, 8).row(5) != y.row(5));
  CHECK(y.row(0) != y.row(1));
  CHECK(y.row(0) != y.row(2));
  CHECK(y.row(0) != y.row(3));
  const test::Threads threads(3);
  CHECK(run({1, 1, 0, 2, 0, 2}, 7) == y);
}

TEST_CASE("Experts of AnyBank know whether the pass trains", "[moe][experts][any_bank]") {
  Rng rng(1);
  AnyBank<Linear<double>> bank({Linear<double>(4, 2, rng)}, 4, 2);
  const Dispatch<double> dispatch = dispatch_to(1, {0, 0});
  AnyBank<Linear<double>>::Cache cache;
  std::vector<double> d_weight(2);
  bank.forward(test::random_matrix(2, 4, 1), dispatch, {}, cache);
  CHECK(test::message_of<StateError>(
            [&] { bank.backward(test::random_matrix(2, 2, 1), dispatch, d_weight, cache); }) ==
        "Linear::backward: the forward pass did not train, expected one with pass.training = true");
}

TEST_CASE("A mixture of mixtures differentiates the losses that it records",
          "[moe][experts][any_bank][gradient]") {
  auto moe = mixture_of_mixtures();
  const Matrix<double> x = test::random_matrix(10, 4, 3);
  PassRecord record;
  decltype(moe)::Cache cache;
  moe.forward(x, {.training = true, .record = &record}, cache);
  CHECK(names_of(record) == std::vector<std::string>{"experts.0.switch", "experts.0.z",
                                                     "experts.1.switch", "experts.1.z",
                                                     "experts.2.switch", "experts.2.z", "switch"});
  CHECK(record.aux_loss("z") > 0.0);
  const auto& losses = moe.report(cache).losses;
  REQUIRE(losses.size() == 7);
  double sum = 0.0;
  for (const auto& [name, value] : losses) sum += value;
  CHECK(record.aux_loss() == Approx(sum));

  test::check_gradients(moe, x);
  test::check_gradients(moe, x, {.aux_scale = 0.25});

  // Without auxiliary losses nothing reaches the inner routers: their one weight is constant.
  zero_gradients(moe);
  moe.forward(x, {.training = true, .aux_scale = 0.0}, cache);
  moe.backward(test::random_matrix(10, 4, 4), cache);
  for (const auto& [name, parameter] : parameters(moe)) {
    INFO(name);
    const bool inner_router = name.find("experts.") == 0 && name.find("router") != name.npos;
    CHECK(parameter->gradient().isZero(1e-14) == inner_router);
  }
}

TEST_CASE("A mixture of mixtures reports each of them", "[moe][experts][any_bank]") {
  auto moe = mixture_of_mixtures();
  const Matrix<double> x = test::random_matrix(10, 4, 3);
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  moe.forward(x, {.record = &record}, *std::make_unique<decltype(moe)::Cache>());
  REQUIRE(record.reports().size() == 4);
  const std::vector<std::string> names = {"experts.0", "experts.1", "experts.2", ""};
  Index tokens = 0;
  for (std::size_t i = 0; i < 4; ++i) {
    CHECK(record.reports()[i].name == names[i]);
    if (i < 3) tokens += record.reports()[i].report.tokens;
  }
  CHECK(tokens == 20);
  CHECK(record.reports()[3].report.tokens == 10);
}

TEST_CASE("A mixture of mixtures is updated in all its parts", "[moe][experts][any_bank]") {
  auto moe = mixture_of_mixtures();
  const auto all = buffers(moe);
  REQUIRE(all.size() == 3);
  CHECK(all[1].name == "experts.1.selector.bias");
  const Matrix<double> x = test::random_matrix(11, 4, 3);
  decltype(moe)::Cache cache;
  moe.forward(x, kTraining, cache);
  moe.backward(x, cache);
  for (const auto& [name, buffer] : all) CHECK(buffer->value.isZero(0.0));
  update(moe);
  for (Index e = 0; e < 3; ++e) {
    const auto& routing = cache.bank.experts[static_cast<std::size_t>(e)].routing;
    RowVector<double> load = RowVector<double>::Zero(2);
    routing.add_load(0, routing.tokens(), load);
    const double sign = load[0] > load[1] ? -1.0 : load[0] < load[1] ? 1.0 : 0.0;
    const Matrix<double>& bias = all[static_cast<std::size_t>(e)].buffer->value;
    CHECK(bias(0, 0) == 0.01 * sign);
    CHECK(bias(0, 1) == -0.01 * sign);
  }
}

TEST_CASE("A mixture of mixtures gives the same bits for any number of threads",
          "[moe][experts][any_bank]") {
  const Matrix<double> x = test::random_matrix(300, 4, 3);
  const auto run = [&] {
    auto moe = mixture_of_mixtures();
    decltype(moe)::Cache cache;
    Rng rng(2);
    PassRecord record(PassRecord::Collects::kLossesAndReports);
    std::vector<Matrix<double>> results;
    for (int step = 0; step < 2; ++step) {
      const Pass pass{.training = true, .rng = &rng, .record = &record};
      results.push_back(moe.forward(x, pass, cache));
      results.push_back(moe.backward(x, cache));
      update(moe);
    }
    for (const auto& [name, parameter] : parameters(moe)) results.push_back(parameter->grad);
    for (const auto& [name, buffer] : buffers(moe)) results.push_back(buffer->value);
    Matrix<double> losses(1, std::ssize(record.losses()));
    for (Index i = 0; i < losses.cols(); ++i) {
      losses(0, i) = record.losses()[static_cast<std::size_t>(i)].value;
    }
    results.push_back(losses);
    return std::pair(results, names_of(record));
  };
  const auto one = run();
  const test::Threads threads(2);
  const auto two = run();
  CHECK(two.second == one.second);
  REQUIRE(two.first.size() == one.first.size());
  for (std::size_t i = 0; i < one.first.size(); ++i) CHECK(two.first[i] == one.first[i]);
}

TEST_CASE("AnyBank says what is wrong with its arguments", "[moe][experts][any_bank]") {
  CHECK(test::message_of<ConfigError>([] { AnyBank<Scale>({}, 4, 4); }) ==
        "AnyBank: experts = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([] { AnyBank<Scale>(scales({1.0}), 0, 4); }) ==
        "AnyBank: d_in = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([] { AnyBank<Scale>(scales({1.0}), 4, 0); }) ==
        "AnyBank: d_out = 0, expected >= 1");

  const AnyBank<Scale> bank(scales({1.0}), 4, 5);
  const Dispatch<double> dispatch = dispatch_of(route(Matrix<double>::Zero(3, 1), 1));
  AnyBank<Scale>::Cache cache;
  CHECK(test::message_of<ShapeError>([&] {
          bank.forward(test::random_matrix(3, 4, 1), dispatch, {}, cache);
        }) == "AnyBank::forward: an expert's output is [3, 4], expected [3, 5]");
}

}  // namespace weir::any_bank_test
