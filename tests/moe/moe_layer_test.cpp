// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/parallel.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/importance_loss.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/pass_dropped.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/linear.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/routing.hpp"
#include "support/same_draws.hpp"

namespace weir::moe_layer_test {

namespace {

constexpr Index kModel = 4;
constexpr Index kExperts = 3;

/// A decided router, so that a finite difference does not change a choice.
template <class T = double>
LinearRouter<T> router(Index d_model = kModel, Index experts = kExperts) {
  Rng rng(1);
  return {d_model, experts, rng, {.init_scale = 5.0}};
}

template <class T = double>
GluBank<T> glu_bank(Index d_model = kModel, Index experts = kExperts, Index d_hidden = 2) {
  Rng rng(2);
  return {d_model, experts, d_hidden, rng};
}

MlpBank<double> biased_mlp_bank() {
  std::vector<Matrix<double>> in;
  std::vector<Matrix<double>> out;
  std::vector<Matrix<double>> in_bias;
  std::vector<Matrix<double>> out_bias;
  for (std::uint64_t e = 0; e < kExperts; ++e) {
    in.push_back(test::random_matrix(3, kModel, 20 + e));
    out.push_back(test::random_matrix(kModel, 3, 30 + e));
    in_bias.push_back(test::random_matrix(1, 3, 40 + e));
    out_bias.push_back(test::random_matrix(1, kModel, 50 + e));
  }
  return {in, out, in_bias, out_bias};
}

AnyBank<Linear<double>> any_bank() {
  Rng rng(4);
  std::vector<Linear<double>> experts;
  for (Index e = 0; e < kExperts; ++e) {
    experts.emplace_back(kModel, kModel, rng, LinearConfig{.bias = true});
  }
  return {experts, kModel, kModel};
}

const SwitchLoss<double> kSwitchLoss({.coefficient = 0.3,
                                      .fraction = LoadFraction::kOfTokens,
                                      .scope = Scope::kSequence});
const ZLoss<double> kZLoss({.coefficient = 0.2});
const ImportanceLoss<double> kImportanceLoss({.coefficient = 0.4});

template <class Selector, class Capacity, class Bank>
auto layer(Selector selector, Capacity capacity, Bank bank) {
  return MoELayer(router(), selector, capacity, std::move(bank), kSwitchLoss, kZLoss);
}

auto simple_layer() {
  return layer(SoftmaxTopK<double>({.k = 2}), Dropless(), glu_bank());
}

/// The gradient of every parameter, in order.
template <class L>
std::vector<Matrix<double>> gradients(L& layer) {
  std::vector<Matrix<double>> all;
  for (auto& [name, parameter] : parameters(layer)) {
    all.push_back(parameter->gradient().template cast<double>());
  }
  return all;
}

/// Sets the threads back to one.
struct OneThreadAgain {
  OneThreadAgain() = default;
  OneThreadAgain(const OneThreadAgain&) = delete;
  OneThreadAgain& operator=(const OneThreadAgain&) = delete;
  ~OneThreadAgain() { set_threads(1); }
};

}  // namespace

static_assert(Layer<MoELayer<LinearRouter<float>, SoftmaxTopK<float>, Dropless, GluBank<float>>>);

// --- Derivatives --------------------------------------------------------------------------------

namespace {

template <class Router, class Selector, class Capacity, class Bank>
void check_composition(const Router& router, const Selector& selector, const Capacity& capacity,
                       const Bank& bank) {
  using Moe = MoELayer<Router, Selector, Capacity, Bank, SwitchLoss<double>, ZLoss<double>,
                       ImportanceLoss<double>>;
  test::SameDraws<Moe> layer{
      Moe(router, selector, capacity, bank, kSwitchLoss, kZLoss, kImportanceLoss)};
  const Sequences sequences({3, 0, 4});
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 0, 1, 1};
  test::check_gradients(
      layer, test::random_matrix(7, kModel, 6),
      {.training = true, .sequences = &sequences, .mask = mask, .aux_scale = 0.7});
}

template <class Router, class Selector, class Bank>
void check_capacities(const Router& router, const Selector& selector, const Bank& bank) {
  INFO("dropless");
  check_composition(router, selector, Dropless(), bank);
  for (const Scope scope : {Scope::kBatch, Scope::kSequence}) {
    for (const DropOrder order :
         {DropOrder::kRankMajor, DropOrder::kTokenMajor, DropOrder::kProbability}) {
      INFO("scope " << static_cast<int>(scope) << ", order " << static_cast<int>(order));
      check_composition(
          router, selector,
          CapacityFactor({.train = 0.6, .minimum = 1, .order = order, .scope = scope}), bank);
    }
  }
  INFO("dropped tokens passed through");
  check_composition(router, selector, FixedCapacity({.capacity = 1}), PassDropped(bank));
}

template <class Router>
void check_selectors(const Router& router) {
  INFO("SoftmaxTopK");
  check_capacities(router, SoftmaxTopK<double>({.k = 1}), glu_bank());
  check_capacities(router, SoftmaxTopK<double>({.k = 2, .renormalise = true}), glu_bank());
  check_capacities(router, SoftmaxTopK<double>({.k = 2, .scale = 2.5}), glu_bank());
  INFO("TopKSoftmax");
  check_capacities(router, TopKSoftmax<double>({.k = 2, .scale = 1.5}), glu_bank());
  INFO("SigmoidTopK");
  SigmoidTopK<double> sigmoid(kExperts, {.k = 2, .scale = 2.5});
  sigmoid.selection_bias().value << 0.1, -0.2, 0.3;
  check_capacities(router, sigmoid, glu_bank());
}

}  // namespace

TEST_CASE("MoELayer gradients agree with finite differences", "[moe][moe_layer][gradient]") {
  SECTION("with each selector and capacity") {
    check_selectors(router());
  }
  SECTION("with each selector and capacity, and jitter") {
    check_selectors(JitterRouter(router(), {.epsilon = 0.1}));
  }
  SECTION("with each bank and capacity") {
    check_capacities(router(), SoftmaxTopK<double>({.k = 2}), biased_mlp_bank());
    check_capacities(router(), SoftmaxTopK<double>({.k = 2}), any_bank());
  }
}

// --- What it computes ---------------------------------------------------------------------------

TEST_CASE("With k = experts MoELayer is the dense mixture", "[moe][moe_layer]") {
  std::vector<Glu<double>> experts;
  Rng rng(3);
  for (Index e = 0; e < kExperts; ++e) experts.emplace_back(kModel, 5, rng);
  const MoELayer moe(router(), SoftmaxTopK<double>({.k = kExperts}), Dropless(),
                     AnyBank(experts, kModel, kModel));

  const Matrix<double> x = test::random_matrix(6, kModel, 1);
  Matrix<double> p = infer(router(), x).array().exp();
  for (Index t = 0; t < 6; ++t) p.row(t) /= p.row(t).sum();
  Matrix<double> expected = Matrix<double>::Zero(6, kModel);
  for (Index e = 0; e < kExperts; ++e) {
    expected += p.col(e).asDiagonal() * infer(experts[static_cast<std::size_t>(e)], x);
  }
  CHECK(test::relative_error(infer(moe, x), expected) < 1e-14);
}

TEST_CASE("Permuting tokens permutes what MoELayer yields", "[moe][moe_layer]") {
  const auto moe = simple_layer();
  const Matrix<double> x = test::random_matrix(7, kModel, 1);
  Eigen::VectorXi order(7);
  order << 4, 2, 6, 0, 1, 5, 3;
  const Eigen::PermutationMatrix<Eigen::Dynamic> permutation(order);
  CHECK(test::relative_error(infer(moe, permutation * x), permutation * infer(moe, x)) < 1e-14);
}

TEST_CASE("MoELayer works with all tokens on one expert", "[moe][moe_layer]") {
  Matrix<double> weight = Matrix<double>::Zero(kExperts, kModel);
  weight.row(1).setConstant(5.0);
  Rng rng(3);
  std::vector<Glu<double>> experts;
  for (Index e = 0; e < kExperts; ++e) experts.emplace_back(kModel, 5, rng);
  MoELayer moe(LinearRouter<double>(weight), SoftmaxTopK<double>({.k = 1, .renormalise = true}),
               Dropless(), AnyBank(experts, kModel, kModel));
  const Matrix<double> x = test::random_matrix(6, kModel, 1).cwiseAbs();
  decltype(moe)::Cache cache;
  CHECK(test::relative_error(moe.forward(x, kTraining, cache), infer(experts[1], x)) < 1e-14);
  moe.backward(x, cache);
  CHECK(moe.report(cache).load == std::vector<Index>{0, 6, 0});
}

TEST_CASE("MoELayer works with one expert, one token and none", "[moe][moe_layer]") {
  SECTION("one expert") {
    Rng rng(3);
    const Glu<double> expert(kModel, 5, rng);
    const MoELayer moe(router<double>(kModel, 1), SoftmaxTopK<double>({.k = 1}), Dropless(),
                       AnyBank<Glu<double>>({expert}, kModel, kModel));
    const Matrix<double> x = test::random_matrix(6, kModel, 1);
    CHECK(test::relative_error(infer(moe, x), infer(expert, x)) < 1e-14);
  }
  SECTION("one token is a row of many") {
    const auto moe = simple_layer();
    const Matrix<double> x = test::random_matrix(6, kModel, 1);
    CHECK(test::relative_error(infer(moe, x.row(2)), infer(moe, x).row(2)) < 1e-14);
  }
  SECTION("no tokens") {
    auto moe = simple_layer();
    decltype(moe)::Cache cache;
    PassRecord record;
    const Matrix<double>& y =
        moe.forward(Matrix<double>(0, kModel), {.training = true, .record = &record}, cache);
    CHECK(y.rows() == 0);
    CHECK(y.cols() == kModel);
    CHECK(record.aux_loss() == 0.0);
    const Matrix<double>& dx = moe.backward(Matrix<double>(0, kModel), cache);
    CHECK(dx.rows() == 0);
    CHECK(dx.cols() == kModel);
    for (const auto& grad : gradients(moe)) CHECK(grad.isZero(0.0));
  }
}

TEST_CASE("A dropped token yields zero, or weight times itself", "[moe][moe_layer]") {
  Matrix<double> weight = Matrix<double>::Zero(kExperts, kModel);
  weight.row(1).setConstant(0.5);
  const Matrix<double> x = test::random_matrix(3, kModel, 1).cwiseAbs();
  const auto with = [&](auto capacity, auto bank) {
    return infer(MoELayer(LinearRouter<double>(weight), SoftmaxTopK<double>({.k = 1}), capacity,
                          std::move(bank)),
                 x);
  };
  const Matrix<double> all = with(Dropless(), glu_bank());
  const FixedCapacity one({.capacity = 1});
  const Matrix<double> zero = with(one, glu_bank());
  CHECK(test::relative_error(zero.row(0), all.row(0)) < 1e-14);
  CHECK(zero.bottomRows(2).isZero(0.0));

  const Matrix<double> pass = with(one, PassDropped(glu_bank()));
  CHECK(test::relative_error(pass.row(0), all.row(0)) < 1e-14);
  for (Index t = 1; t < 3; ++t) {
    const double top = std::exp(0.5 * x.row(t).sum());
    CHECK(test::relative_error(pass.row(t), top / (top + 2.0) * x.row(t)) < 1e-14);
  }
}

// --- Padding and micro-batches ------------------------------------------------------------------

TEST_CASE("Padding yields zero and changes nothing, even if it is NaN", "[moe][moe_layer]") {
  const auto check = [](auto moe, double filling) {
    const Matrix<double> x = test::random_matrix(5, kModel, 1);
    const Matrix<double> dy = test::random_matrix(5, kModel, 2);
    const std::vector<Index> real = {0, 1, 3, 4, 5};
    const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1, 0};
    Matrix<double> padded_x = Matrix<double>::Constant(7, kModel, filling);
    Matrix<double> padded_dy = padded_x;
    for (std::size_t i = 0; i < real.size(); ++i) {
      padded_x.row(real[i]) = x.row(static_cast<Index>(i));
      padded_dy.row(real[i]) = dy.row(static_cast<Index>(i));
    }

    typename decltype(moe)::Cache cache;
    const Matrix<double> y = moe.forward(x, kTraining, cache);
    const double expected_loss = test::aux_loss(moe, x, kTraining);
    const Matrix<double> dx = moe.backward(dy, cache);
    const auto expected = gradients(moe);
    zero_gradients(moe);
    const Pass padded{.training = true, .mask = mask};
    const Matrix<double> padded_y = moe.forward(padded_x, padded, cache);
    CHECK(test::aux_loss(moe, padded_x, padded) == Approx(expected_loss));
    const Matrix<double> padded_dx = moe.backward(padded_dy, cache);

    CHECK(test::relative_error(padded_y(real, Eigen::all), y) < 1e-14);
    CHECK(test::relative_error(padded_dx(real, Eigen::all), dx) < 1e-14);
    for (const Index t : {2, 6}) {
      CHECK(padded_y.row(t).isZero(0.0));
      CHECK(padded_dx.row(t).isZero(0.0));
    }
    const auto actual = gradients(moe);
    for (std::size_t i = 0; i < actual.size(); ++i) {
      CHECK(test::relative_error(actual[i], expected[i]) < 1e-13);
    }
    CHECK(moe.report(cache).tokens == 5);
  };
  for (const double filling : {7.0, std::numeric_limits<double>::quiet_NaN()}) {
    check(simple_layer(), filling);
    check(layer(SoftmaxTopK<double>({.k = 2}), CapacityFactor({.train = 0.6, .minimum = 0}),
                glu_bank()),
          filling);
    check(layer(SigmoidTopK<double>(kExperts), FixedCapacity({.capacity = 2}),
                PassDropped(biased_mlp_bank())),
          filling);
    check(layer(TopKSoftmax<double>({.k = 2}), Dropless(), any_bank()), filling);
  }
}

TEST_CASE("One batch has the gradients of its micro-batches", "[moe][moe_layer]") {
  auto moe = simple_layer();
  const Matrix<double> x = test::random_matrix(12, kModel, 1);
  const Matrix<double> dy = test::random_matrix(12, kModel, 2);
  decltype(moe)::Cache cache;

  const Sequences four = Sequences::uniform(4, 3);
  PassRecord record;
  const Matrix<double> y =
      moe.forward(x, {.training = true, .sequences = &four, .record = &record}, cache);
  const double whole_loss = record.aux_loss();
  const Matrix<double> dx = moe.backward(dy, cache);
  const auto expected = gradients(moe);

  zero_gradients(moe);
  record.clear();
  for (const auto& [first, count] : {std::pair<Index, Index>{0, 1}, {1, 3}}) {
    const Sequences part = Sequences::uniform(count, 3);
    const double share = static_cast<double>(count) / 4.0;
    const Matrix<double>& part_y = moe.forward(
        x.middleRows(3 * first, 3 * count),
        {.training = true, .sequences = &part, .aux_scale = share, .record = &record}, cache);
    CHECK(test::relative_error(part_y, y.middleRows(3 * first, 3 * count)) < 1e-12);
    const Matrix<double>& part_dx = moe.backward(dy.middleRows(3 * first, 3 * count), cache);
    CHECK(test::relative_error(part_dx, dx.middleRows(3 * first, 3 * count)) < 1e-12);
  }
  CHECK(record.aux_loss() == Approx(whole_loss).epsilon(1e-12));
  const auto actual = gradients(moe);
  for (std::size_t i = 0; i < actual.size(); ++i) {
    CHECK(test::relative_error(actual[i], expected[i]) < 1e-12);
  }
}

// --- Threads and memory -------------------------------------------------------------------------

TEST_CASE("MoELayer gives the same bits with two threads as with one", "[moe][moe_layer]") {
  constexpr Index kTokens = 333;
  constexpr Index kWide = 96;
  const OneThreadAgain restore;
  const Matrix<float> x = test::random_matrix<float>(kTokens, kWide, 1);
  const Matrix<float> dy = test::random_matrix<float>(kTokens, kWide, 2);
  std::vector<std::uint8_t> mask(kTokens, 1);
  mask[100] = 0;

  const auto check = [&](const auto& original) {
    const auto run = [&](int count) {
      set_threads(count);
      auto moe = original;
      Rng rng(7);
      typename decltype(moe)::Cache cache;
      std::vector<Matrix<float>> results;
      PassRecord record;
      results.push_back(
          moe.forward(x, {.training = true, .mask = mask, .rng = &rng, .record = &record}, cache));
      results.push_back(moe.backward(dy, cache));
      results.push_back(Matrix<float>::Constant(1, 1, static_cast<float>(record.aux_loss())));
      for (auto& [name, parameter] : parameters(moe)) results.push_back(parameter->gradient());
      return results;
    };
    const auto one = run(1);
    const auto two = run(2);
    for (std::size_t i = 0; i < one.size(); ++i) {
      CHECK(std::memcmp(one[i].data(), two[i].data(),
                        static_cast<std::size_t>(one[i].size()) * sizeof(float)) == 0);
    }
  };
  Rng rng(3);
  const auto wide_router = JitterRouter(router<float>(kWide, 4));
  check(MoELayer(wide_router, SoftmaxTopK<float>({.k = 2}), CapacityFactor({.train = 1.0}),
                 GluBank<float>(kWide, 4, 160, rng), SwitchLoss<float>(), ZLoss<float>(),
                 ImportanceLoss<float>()));
  check(MoELayer(wide_router, SigmoidTopK<float>(4), Dropless(),
                 MlpBank<float>(kWide, 4, 160, rng, {.bias = true}), SwitchLoss<float>()));
  std::vector<Glu<float>> experts;
  for (int e = 0; e < 4; ++e) experts.emplace_back(kWide, 160, rng);
  check(MoELayer(wide_router, TopKSoftmax<float>({.k = 2}), FixedCapacity({.capacity = 150}),
                 PassDropped(AnyBank(experts, kWide, kWide))));
}

TEST_CASE("The counter of allocations counts", "[moe][moe_layer]") {
  if (!test::allocations_are_counted()) return;
  CHECK(test::count_allocations([] {}) == 0);
  Matrix<float> matrix;
  CHECK(test::count_allocations([&] { matrix.setZero(9, 9); }) == 1);
  CHECK(test::count_allocations([&] { matrix.setZero(9, 9); }) == 0);
  std::vector<double> numbers;
  CHECK(test::count_allocations([&] { numbers.resize(9); }) == 1);
}

TEST_CASE("MoELayer allocates nothing once warm", "[moe][moe_layer]") {
  constexpr Index kTokens = 40;
  constexpr Index kWide = 24;
  std::vector<Matrix<float>> batches;
  for (std::uint64_t b = 0; b < 4; ++b) {
    batches.push_back(test::random_matrix<float>(kTokens, kWide, b));
  }
  const Sequences sequences({10, 14, 16});
  std::vector<std::uint8_t> mask(kTokens, 1);
  mask[3] = 0;

  const auto check = [&](auto moe, std::size_t different, bool padding) {
    Rng rng(7);
    Pass pass{.training = true, .sequences = &sequences, .rng = &rng, .aux_scale = 0.5};
    if (padding) pass.mask = mask;
    typename decltype(moe)::Cache cache;
    const auto step = [&] {
      for (std::size_t b = 0; b < different; ++b) {
        moe.forward(batches[b], pass, cache);
        moe.backward(batches[b], cache);
      }
    };
    step();
    step();
    CHECK(test::count_allocations(step) == 0);
  };
  Rng rng(3);
  const auto plain = router<float>(kWide, 4);
  const auto glu = glu_bank<float>(kWide, 4, 32);
  const MlpBank<float> mlp(kWide, 4, 32, rng, {.bias = true});
  const SwitchLoss<float> sequence_loss(
      {.fraction = LoadFraction::kOfTokens, .scope = Scope::kSequence});

  for (const bool padding : {false, true}) {
    check(MoELayer(plain, SoftmaxTopK<float>({.k = 2}), Dropless(), glu, SwitchLoss<float>(),
                   ZLoss<float>(), ImportanceLoss<float>()),
          4, padding);
    check(MoELayer(plain, TopKSoftmax<float>({.k = 2}), Dropless(), mlp, sequence_loss), 4,
          padding);
    check(MoELayer(plain, SigmoidTopK<float>(4), CapacityFactor({.train = 1.0}), glu,
                   BiasBalance<float>{}),
          4, padding);
    check(MoELayer(plain, SoftmaxTopK<float>({.k = 2, .renormalise = true}),
                   FixedCapacity({.capacity = 5}), PassDropped(mlp), ZLoss<float>()),
          4, padding);
    check(MoELayer(plain, SoftmaxTopK<float>({.k = 2, .renormalise = true}),
                   CapacityFactor({.train = 0.7, .order = DropOrder::kProbability}), glu),
          4, padding);
    check(MoELayer(JitterRouter(plain), SoftmaxTopK<float>({.k = 4}), Dropless(), glu), 4, padding);
    // A layer's own matrices follow the number of its tokens: the same routing in each step.
    std::vector<Glu<float>> experts;
    for (int e = 0; e < 4; ++e) experts.emplace_back(kWide, 32, rng);
    check(MoELayer(plain, SoftmaxTopK<float>({.k = 2}), Dropless(), AnyBank(experts, kWide, kWide)),
          1, padding);
  }
}

// --- Report, names, users' own parts ------------------------------------------------------------

TEST_CASE("MoELayer reports its routing and each loss by name", "[moe][moe_layer]") {
  const MoELayer moe(router(), SigmoidTopK<double>(kExperts, {.k = 2}),
                     FixedCapacity({.capacity = 2, .scope = Scope::kBatch}), glu_bank(),
                     kSwitchLoss, BiasBalance<double>{}, kZLoss, kImportanceLoss);
  decltype(moe)::Cache cache;
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1};
  PassRecord record;
  moe.forward(test::random_matrix(6, kModel, 1),
              {.mask = mask, .aux_scale = 0.5, .record = &record}, cache);
  const LayerReport report = moe.report(cache);
  CHECK(report.tokens == 5);
  CHECK(report.assignments == 10);
  CHECK(report.load.size() == kExperts);
  CHECK(report.load[0] + report.load[1] + report.load[2] == 10);
  Index kept = 0;
  for (std::size_t e = 0; e < kExperts; ++e) {
    CHECK(report.kept[e] == std::min<Index>(2, report.load[e]));
    kept += report.kept[e];
  }
  CHECK(report.dropped == 10 - kept);

  REQUIRE(report.losses.size() == 3);
  CHECK(report.losses[0].first == "switch");
  CHECK(report.losses[0].second == 0.5 * test::loss_of(kSwitchLoss, cache.routing));
  CHECK(report.losses[1].first == "z");
  CHECK(report.losses[1].second == 0.5 * test::loss_of(kZLoss, cache.routing));
  CHECK(report.losses[2].first == "importance");
  CHECK(report.losses[2].second == 0.5 * test::loss_of(kImportanceLoss, cache.routing));
  CHECK(record.aux_loss() ==
        Approx(report.losses[0].second + report.losses[1].second + report.losses[2].second));
}

TEST_CASE("MoELayer computes losses only where somebody wants them", "[moe][moe_layer]") {
  auto moe = simple_layer();
  const Matrix<double> x = test::random_matrix(5, kModel, 1);
  decltype(moe)::Cache cache;
  const auto losses = [&] { return moe.report(cache).losses.size(); };
  moe.forward(x, {}, cache);
  CHECK(losses() == 0);
  moe.forward(x, kTraining, cache);  // For backward, though nobody asks.
  CHECK(losses() == 2);
  moe.forward(x, {.training = true, .aux_scale = 0.0}, cache);
  CHECK(losses() == 0);

  // Without losses nothing of them is differentiated.
  MoELayer bare(router(), SoftmaxTopK<double>({.k = 2}), Dropless(), glu_bank());
  decltype(bare)::Cache bare_cache;
  bare.forward(x, kTraining, bare_cache);
  CHECK(moe.backward(x, cache) == bare.backward(x, bare_cache));
}

TEST_CASE("The report tells what was trained with, also after backward and update",
          "[moe][moe_layer]") {
  MoELayer moe(router(), SigmoidTopK<double>(kExperts, {.k = 2}), Dropless(), glu_bank(),
               kSwitchLoss, BiasBalance<double>({.rate = 0.5}));
  decltype(moe)::Cache cache;
  const Matrix<double> x = test::random_matrix(5, kModel, 1);
  moe.forward(x, kTraining, cache);
  const LayerReport before = moe.report(cache);
  moe.backward(x, cache);
  CHECK(moe.report(cache).losses == before.losses);
  update(moe);
  CHECK(moe.report(cache).losses == before.losses);
  CHECK(moe.report(cache).load == before.load);
}

TEST_CASE("Threads may report on one cache and run one layer side by side", "[moe][moe_layer]") {
  const auto moe = simple_layer();
  const Matrix<double> x = test::random_matrix(64, kModel, 1);
  std::remove_cvref_t<decltype(moe)>::Cache filled;
  const Matrix<double> expected = moe.forward(x, kTraining, filled);
  const auto& cache = filled;
  const LayerReport alone = moe.report(cache);
  std::vector<std::thread> threads;
  std::vector<int> good(4, 0);
  for (int& is_good : good) {
    threads.emplace_back([&] {
      std::remove_cvref_t<decltype(moe)>::Cache own;
      for (int i = 0; i < 20; ++i) {
        const LayerReport report = moe.report(cache);
        const bool same = moe.forward(x, kTraining, own) == expected;
        is_good += same && report.load == alone.load && report.losses == alone.losses ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(good == std::vector<int>(4, 20));
}

TEST_CASE("MoELayer names its parameters and buffers", "[moe][moe_layer]") {
  auto moe = layer(SigmoidTopK<double>(kExperts), Dropless(), glu_bank());
  const auto all = parameters(moe);
  REQUIRE(all.size() == 10);
  CHECK(all[0].name == "router.weight");
  CHECK(all[1].name == "experts.0.gate");
  CHECK(all[9].name == "experts.2.down");
  REQUIRE(buffers(moe).size() == 1);
  CHECK(buffers(moe)[0].name == "selector.bias");
  auto simple = simple_layer();
  CHECK(buffers(simple).empty());
}

namespace {

/// logits = x W^T
struct OwnRouter : RouterBase<double> {
  struct Cache {
    Matrix<double> x, logits, dx;
  };

  explicit OwnRouter(Matrix<double> w) : weight{std::move(w)} {}

  const Matrix<double>& forward(MatrixIn<double> x, const Pass& /*pass*/, Cache& cache) const {
    cache.x = x;
    cache.logits = x.lazyProduct(weight.value.transpose());
    return cache.logits;
  }
  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    weight.gradient() += dy.transpose().lazyProduct(cache.x);
    cache.dx = dy.lazyProduct(weight.value);
    return cache.dx;
  }
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight);
  }
  Index d_model() const { return weight.value.cols(); }
  Index experts() const { return weight.value.rows(); }

  Parameter<double> weight;
};

/// Half the sum of squares of logits, probabilities and weights: a gradient for each of them.
struct OwnLoss : BalancerBase {
  double forward(const Routing<double>& routing, Cache& /*cache*/) const {
    double sum = routing.logits.squaredNorm() + routing.probabilities.squaredNorm();
    for (const double w : routing.weight) sum += w * w;
    return 0.5 * sum;
  }
  void backward(const Routing<double>& routing, double scale, RoutingGradient<double>& gradient,
                Cache& /*cache*/) const {
    gradient.logits += scale * routing.logits;
    gradient.probabilities += scale * routing.probabilities;
    for (Index a = 0; a < routing.assignments(); ++a) {
      gradient.weights[a] += scale * routing.weight[a];
    }
  }
};

}  // namespace

TEST_CASE("MoELayer takes parts of a user's own", "[moe][moe_layer][gradient]") {
  const OwnRouter own(test::random_matrix(kExperts, kModel, 4));
  MoELayer softmax(own, SoftmaxTopK<double>({.k = 2, .renormalise = true, .scale = 2.0}),
                   Dropless(), glu_bank(), OwnLoss{});
  const Matrix<double> x = test::random_matrix(5, kModel, 1);
  test::check_gradients(softmax, x, {.aux_scale = 0.3});
  MoELayer sigmoid(own, SigmoidTopK<double>(kExperts), Dropless(), glu_bank(), OwnLoss{});
  test::check_gradients(sigmoid, x, {.aux_scale = 0.3});

  decltype(softmax)::Cache cache;
  softmax.forward(x, kTraining, cache);
  REQUIRE(softmax.report(cache).losses.size() == 1);
  CHECK(softmax.report(cache).losses[0].first == "loss");
  update(softmax);
}

// --- Misuse -------------------------------------------------------------------------------------

TEST_CASE("MoELayer says which of its parts do not fit", "[moe][moe_layer]") {
  const auto make = [](Index d_model, Index experts, Index k, Index capacity, double coefficient) {
    MoELayer(router(), SoftmaxTopK<double>({.k = k}), FixedCapacity({.capacity = capacity}),
             glu_bank(d_model, experts), SwitchLoss<double>({.coefficient = coefficient}));
  };
  CHECK(test::message_of<ConfigError>([&] { make(kModel, 5, 1, 1, 0.0); }) ==
        "MoELayer: the bank has 5 experts, expected 3 as the router");
  CHECK(test::message_of<ConfigError>([&] { make(6, kExperts, 1, 1, 0.0); }) ==
        "MoELayer: the bank takes 6 features, expected 4 as the router");
  CHECK(test::message_of<ConfigError>([&] { make(kModel, kExperts, 4, 1, 0.0); }) ==
        "SoftmaxTopK: k = 4, expected 1 <= k <= experts = 3");
  CHECK(test::message_of<ConfigError>([&] { make(kModel, kExperts, 1, 0, 0.0); }) ==
        "FixedCapacity: capacity = 0, expected >= 1");
  CHECK(test::message_of<ConfigError>([&] { make(kModel, kExperts, 1, 1, -2.0); }) ==
        "SwitchLoss: coefficient = -2, expected a finite number >= 0");
}

TEST_CASE("MoELayer says what is wrong with a pass", "[moe][moe_layer]") {
  auto moe = simple_layer();
  const Matrix<double> x = test::random_matrix(5, kModel, 1);
  decltype(moe)::Cache cache;
  CHECK(test::message_of<ShapeError>([&] { infer(moe, test::random_matrix(5, 3, 1)); }) ==
        "MoELayer::forward: x is [5, 3], expected [tokens, 4]");
  const std::vector<std::uint8_t> mask(4, 1);
  CHECK(test::message_of<ShapeError>([&] { moe.forward(x, {.mask = mask}, cache); }) ==
        "MoELayer::forward: pass.mask has 4 entries, expected 5 (one per token)");
  const Sequences sequences({2, 4});
  CHECK(test::message_of<ShapeError>([&] { moe.forward(x, {.sequences = &sequences}, cache); }) ==
        "MoELayer::forward: pass.sequences cover 6 tokens, expected 5");

  const std::string empty =
      "MoELayer::backward: the cache is empty, expected a forward pass that succeeded";
  CHECK(test::message_of<StateError>([&] { moe.backward(x, cache); }) == empty);
  moe.forward(x, kTraining, cache);
  CHECK(test::message_of<ShapeError>([&] { moe.backward(x.topRows(4), cache); }) ==
        "MoELayer::backward: dy is [4, 4], expected [5, 4]");

  // State may be overwritten between passes, from a file for example, and is looked at in each.
  MoELayer biased(router(), SigmoidTopK<double>(kExperts), Dropless(), glu_bank());
  decltype(biased)::Cache biased_cache;
  biased.forward(x, kTraining, biased_cache);
  biased.selector().selection_bias().value.resize(1, 5);
  CHECK(test::message_of<ConfigError>([&] { biased.forward(x, kTraining, biased_cache); }) ==
        "SigmoidTopK: the bias is [1, 5], expected [1, 3]");
  CHECK(test::message_of<StateError>([&] { biased.backward(x, biased_cache); }) == empty);
}

TEST_CASE("MoELayer refuses caches that do not fit", "[moe][moe_layer]") {
  auto moe = simple_layer();
  auto other = simple_layer();
  const Matrix<double> x = test::random_matrix(5, kModel, 1);
  decltype(moe)::Cache cache;
  moe.forward(x, {}, cache);
  CHECK(test::message_of<StateError>([&] { moe.backward(x, cache); }) ==
        "MoELayer::backward: the forward pass did not train, expected one with pass.training = "
        "true");
  moe.forward(x, kTraining, cache);
  CHECK(test::message_of<StateError>([&] { other.backward(x, cache); }) ==
        "MoELayer::backward: the cache was filled by another layer, expected a forward pass of "
        "this one");
  moe.backward(x, cache);
  CHECK(test::message_of<StateError>([&] { moe.backward(x, cache); }) ==
        "MoELayer::backward: the cache was used by a backward pass already, expected a forward "
        "pass between the two");
}

TEST_CASE("A cache of MoELayer can be moved between forward and backward", "[moe][moe_layer]") {
  auto moe = simple_layer();
  const Matrix<double> x = test::random_matrix(5, kModel, 1);
  decltype(moe)::Cache cache;
  moe.forward(x, kTraining, cache);
  const Matrix<double> expected = moe.backward(x, cache);
  moe.forward(x, kTraining, cache);
  decltype(moe)::Cache moved = std::move(cache);
  CHECK(moe.backward(x, moved) == expected);
}

TEST_CASE("MoELayer refuses logits that are not finite and stays usable", "[moe][moe_layer]") {
  const Matrix<double> weight = Matrix<double>::Ones(kExperts, kModel);
  MoELayer moe(LinearRouter<double>(weight), SoftmaxTopK<double>({.k = 2}), Dropless(), glu_bank());
  const Matrix<double> x = test::random_matrix(5, kModel, 1);
  decltype(moe)::Cache cache;
  const Matrix<double> y = moe.forward(x, kTraining, cache);

  Matrix<double> bad = x;
  bad(3, 2) = std::numeric_limits<double>::infinity();
  CHECK(test::message_of<NonFiniteError>([&] { moe.forward(bad, kTraining, cache); }) ==
        "SoftmaxTopK: logits[3, 0] = inf, expected a finite number");
  bad(3, 2) = std::numeric_limits<double>::quiet_NaN();
  CHECK_THROWS_AS(moe.forward(bad, kTraining, cache), NonFiniteError);
  CHECK_THROWS_AS(moe.backward(x, cache), StateError);

  CHECK(moe.forward(x, kTraining, cache) == y);
  moe.backward(x, cache);
}

}  // namespace weir::moe_layer_test
