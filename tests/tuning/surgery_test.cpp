// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/verbs.hpp>
#include <weir/io/checkpoint.hpp>
#include <weir/io/weights.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/experts/output_masking.hpp>
#include <weir/moe/experts/with_zero_experts.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/nn/glu.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/muon.hpp>
#include <weir/optim/sgd.hpp>
#include <weir/tuning/expert_parts.hpp>
#include <weir/tuning/expert_scores.hpp>
#include <weir/tuning/lora.hpp>
#include <weir/tuning/neuron_matching.hpp>
#include <weir/tuning/surgery.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::surgery_test {

namespace {

constexpr Index kModel = 6;
constexpr Index kHidden = 5;

template <class T>
auto mixture(Index experts, Index k, std::uint64_t seed = 3) {
  Rng rng(seed);
  return MoELayer(LinearRouter<T>(kModel, experts, rng, {.init_scale = 4.0}),
                  TopKSoftmax<T>({.k = k}), Dropless(), GluBank<T>(kModel, experts, kHidden, rng));
}

/// With a selection bias that a rule moves.
template <class T>
auto biased(Index experts, std::uint64_t seed = 3) {
  Rng rng(seed);
  return MoELayer(LinearRouter<T>(kModel, experts, rng, {.init_scale = 4.0}),
                  SigmoidTopK<T>(experts, {.k = 2}), Dropless(),
                  GluBank<T>(kModel, experts, kHidden, rng), BiasBalance<T>({.rate = 0.1}));
}

template <class T>
Matrix<T> tokens(std::uint64_t seed = 8, Index count = 40) {
  return test::random_matrix<T>(count, kModel, seed);
}

/// One step towards zero.
template <class L, class Optimizer>
void train(L& layer, Optimizer& optimizer, int steps, std::uint64_t seed = 20) {
  using T = typename L::Scalar;
  typename L::Cache cache;
  for (int step = 0; step < steps; ++step) {
    const Matrix<T> y =
        layer.forward(tokens<T>(seed + static_cast<std::uint64_t>(step)), kTraining, cache);
    layer.backward(y, cache);
    optimizer.step(layer);
  }
}

template <class L>
Matrix<typename L::Scalar> value_of(L& layer, const std::string& name) {
  for (const auto& [own, parameter] : parameters(layer)) {
    if (own == name) return parameter->value;
  }
  for (const auto& [own, buffer] : buffers(layer)) {
    if (own == name) return buffer->value;
  }
  return {};
}

}  // namespace

TEST_CASE("OutputChange is relative to the output, of all tokens and of the worst", "[tuning]") {
  Matrix<double> y(2, 2);
  y << 3.0, 4.0, 0.0, 12.0;  // Lengths 5 and 12.
  Matrix<double> moved = y;
  moved(0, 0) += 1.0;
  const OutputChange change = output_change<double>(y, moved);
  CHECK(change.relative == Approx(1.0 / 13.0));
  CHECK(change.largest == Approx(1.0 / 5.0));
  CHECK(change.tokens == 0.5);
  const OutputChange none = output_change<double>(Matrix<double>(0, 2), Matrix<double>(0, 2));
  CHECK((none.relative == 0.0 && none.tokens == 0.0));
  CHECK(test::message_of<ShapeError>([&] { output_change<double>(y, y.leftCols(1)); }) ==
        "output_change: after is [2, 1], expected [2, 2]");
}

TEST_CASE("Removing an expert is switching it off, for any bank and within wrappers", "[tuning]") {
  const auto check = [](auto layer) {
    using L = decltype(layer);
    using T = typename L::Scalar;
    const Matrix<T> x = tokens<T>();
    const std::vector<Index> excluded = {2};
    const Matrix<T> masked = infer(layer, x, {.allowed = all_but(4, excluded)});
    ExpertSurgery surgery(layer, x);
    const OutputChange off = surgery.without(excluded);
    const OutputChange change = surgery.remove(2);
    CHECK(test::relative_error(infer(layer, x), masked) < 1e-12);
    CHECK(change.relative > 0.01);
    CHECK(change.relative == Approx(off.relative));
    CHECK(change.tokens == off.tokens);
    CHECK((change.tokens > 0.0 && change.tokens < 1.0));
    CHECK(surgery.experts() == 3);
  };
  Rng rng(2);
  const auto router = [&] { return LinearRouter<double>(kModel, 4, rng, {.init_scale = 4.0}); };
  SECTION("GluBank") {
    check(mixture<double>(4, 2));
  }
  SECTION("a selection bias") {
    check(biased<double>(4));
  }
  SECTION("behind AnyLayer and beside shared experts") {
    check(AnyLayer<double>(SharedExperts(mixture<double>(4, 2), Glu<double>(kModel, 3, rng))));
  }
  SECTION("MlpBank") {
    check(MoELayer(router(), TopKSoftmax<double>({.k = 2}), Dropless(),
                   MlpBank<double, Silu>(kModel, 4, kHidden, rng, {.bias = true})));
  }
  SECTION("ClampedGluBank and wrappers") {
    check(MoELayer(JitterRouter(router()), TopKSoftmax<double>({.k = 2}), Dropless(),
                   OutputMasking(ClampedGluBank<double>(kModel, 4, kHidden, rng)),
                   SwitchLoss<double>()));
  }
}

TEST_CASE("Exchanging experts changes no output, twice nothing at all", "[tuning]") {
  auto layer = biased<double>(5);
  auto before = layer;
  const Matrix<double> x = tokens<double>();
  ExpertSurgery surgery(layer, x);
  CHECK(surgery.swap(1, 4).relative < 1e-14);
  CHECK(value_of(layer, "experts.1.up") == value_of(before, "experts.4.up"));
  CHECK(value_of(layer, "router.weight").row(4) == value_of(before, "router.weight").row(1));
  surgery.swap(1, 4);
  for (const auto& [name, parameter] : parameters(before)) {
    CHECK(value_of(layer, name) == parameter->value);
  }
}

TEST_CASE("A cold expert changes no output on the tokens at hand, and learns", "[tuning]") {
  Rng rng(5);
  const Matrix<double> x = tokens<double>();
  const auto check = [&](auto layer, const std::vector<Index>& others) {
    const Matrix<double> y = infer(layer, x);
    ExpertSurgery surgery(layer, x);
    CHECK(surgery.add_cold(rng).relative < 1e-14);
    CHECK(surgery.experts() == 5);
    CHECK(test::relative_error(infer(layer, x), y) < 1e-14);
    for (const char* const name : {"experts.4.down", "experts.4.out"}) {
      CHECK(value_of(layer, name).isZero(0.0));  // True of none.
    }
    const bool glu = value_of(layer, "experts.4.gate").size() > 0;
    CHECK_FALSE(value_of(layer, glu ? "experts.4.up" : "experts.4.in").isZero(0.0));
    CHECK(value_of(layer, "router.bias")(0, 0) == 0.0);
    CHECK(value_of(layer, "router.bias")(0, 4) < 0.0);
    // Where tokens have to go to it.
    const auto only = all_but(5, others);
    typename decltype(layer)::Cache cache;
    layer.forward(x, {.training = true, .allowed = only}, cache);
    layer.backward(x, cache);
    for (const auto& [name, parameter] : parameters(layer)) {
      if (name == "experts.4.down" || name == "experts.4.out") CHECK(parameter->grad.norm() > 0.0);
    }
  };
  check(mixture<double>(4, 2), {0, 1, 2});
  check(biased<double>(4), {0, 1, 2});
  Rng init(1);
  check(MoELayer(LinearRouter<double>(kModel, 4, init, {.bias = true, .init_scale = 4.0}),
                 TopKSoftmax<double>({.k = 1}), Dropless(),
                 MlpBank<double, Silu>(kModel, 4, kHidden, init, {.bias = true})),
        {0, 1, 2, 3});
}

TEST_CASE("With one expert for each token, a clone gets none and a split shares", "[tuning]") {
  Rng rng(5);
  auto layer = mixture<double>(4, 1);
  const Matrix<double> x = tokens<double>(8, 400);
  ExpertSurgery surgery(layer, x);
  const std::vector<double> before = surgery.use();
  CHECK(surgery.clone(2).relative == 0.0);
  CHECK(surgery.use()[4] == 0.0);
  surgery.remove(4);
  // Both halves are the same network, and a token has a weight of 1 with one expert.
  const OutputChange change = surgery.split(2, rng, 0.02);
  const std::vector<double> after = surgery.use();
  CHECK(change.tokens < 0.1);
  CHECK(after[2] + after[4] == Approx(before[2]).epsilon(0.1));
  CHECK(after[4] > 0.3 * before[2]);
  CHECK(after[4] < 0.7 * before[2]);
}

TEST_CASE("Assignments are the best there are", "[tuning][golden]") {
  Matrix<double> value(3, 3);
  value << 7, 5, 11, 5, 4, 1, 9, 3, 2;  // 11 + 4 + 9 is the largest sum.
  CHECK(best_assignment(value) == std::vector<Index>{2, 1, 0});
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const Index n = 1 + static_cast<Index>(seed % 6);
    const Matrix<double> random = test::random_matrix(n, n, seed);
    std::vector<Index> order(static_cast<std::size_t>(n));
    std::iota(order.begin(), order.end(), Index{0});
    const auto sum = [&](const std::vector<Index>& p) {
      double total = 0.0;
      for (std::size_t i = 0; i < p.size(); ++i) total += random(static_cast<Index>(i), p[i]);
      return total;
    };
    double best = sum(order);
    while (std::next_permutation(order.begin(), order.end())) best = std::max(best, sum(order));
    CHECK(sum(best_assignment(random)) == Approx(best));
  }
  CHECK(best_assignment(Matrix<double>(0, 0)).empty());
  CHECK(test::message_of<ShapeError>([] { best_assignment(Matrix<double>::Zero(2, 3)); }) ==
        "best_assignment: value is [2, 3], expected [2, 2]");
  CHECK(test::message_of<NonFiniteError>([] {
          best_assignment(Matrix<double>::Constant(2, 2, std::nan("")));
        }) == "best_assignment: value is not finite, expected finite numbers");
}

TEST_CASE("Merging an expert with itself in another order of neurons gives it back", "[tuning]") {
  auto layer = mixture<double>(4, 2);
  const Matrix<double> x = tokens<double>();
  // Expert 3 becomes expert 1 with its neurons shuffled.
  const std::vector<Index> order = {3, 0, 4, 1, 2};
  auto one = expert_parts("test", layer, 1);
  auto three = expert_parts("test", layer, 3);
  for (std::size_t p = 0; p < one.size(); ++p) {
    three[p].parameter->value = with_neurons(one[p].parameter->value, one[p].axis, order);
  }
  const Matrix<double> gate = one[0].parameter->value;
  ExpertSurgery surgery(layer, x);
  const std::vector<double> use = {1.0, 3.0, 1.0, 5.0};
  CHECK(surgery.merge({1, 3}, use).relative < 1e-13);
  CHECK(test::relative_error(value_of(layer, "experts.1.gate"), gate) < 1e-14);
  CHECK(value_of(layer, "experts.3.gate") == value_of(layer, "experts.1.gate"));
}

TEST_CASE("A merged expert is the average by use, aligned to the dominant one", "[tuning]") {
  auto layer = mixture<double>(3, 2);
  auto before = layer;
  auto a = expert_parts("test", before, 0);
  auto b = expert_parts("test", before, 2);
  const auto order = match_neurons(a, b);
  // The best of all 120 orders, by the formula.
  const auto alike = [&](const std::vector<Index>& p) {
    double sum = 0.0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      sum += a[i].parameter->value.cwiseProduct(with_neurons(b[i].parameter->value, b[i].axis, p))
                 .sum();
    }
    return sum;
  };
  std::vector<Index> any = {0, 1, 2, 3, 4};
  double best = -1e9;
  do {
    best = std::max(best, alike(any));
  } while (std::next_permutation(any.begin(), any.end()));
  CHECK(alike(order) == Approx(best));

  ExpertSurgery surgery(layer, tokens<double>());
  const std::vector<double> use = {6.0, 1.0, 2.0};
  CHECK(surgery.merge({0, 2}, use).relative > 0.0);
  for (std::size_t i = 0; i < a.size(); ++i) {
    const Matrix<double> expected =
        0.75 * a[i].parameter->value + 0.25 * with_neurons(b[i].parameter->value, b[i].axis, order);
    CHECK(test::relative_error(value_of(layer, a[i].full_name), expected) < 1e-14);
  }
  CHECK(value_of(layer, "experts.1.gate") == value_of(before, "experts.1.gate"));
}

TEST_CASE("Experts are grouped by their logits, and ranked by scores", "[tuning]") {
  Matrix<double> logits(3, 4);
  logits << 1, 2, -1, 0.9,  //
      2, -1, -2, 2.1,       //
      0, 3, 0.1, 0.1;
  const std::vector<double> use = {5, 4, 1, 2};
  const auto groups = group_by_router<double>(logits, use, 2);
  CHECK(groups == std::vector<std::vector<Index>>{{0, 3}, {1, 2}});
  CHECK(most_important(use, 3) == std::vector<Index>{0, 1, 3});
  const std::vector<double> equal = {1, 1, 1};
  CHECK(most_important(equal, 2) == std::vector<Index>{0, 1});
  CHECK(test::message_of<ConfigError>([&] { most_important(use, 5); }) ==
        "most_important: count = 5, expected 1 <= count <= 4");
  CHECK(test::message_of<ConfigError>([&] { most_important(use, 0); }) ==
        "most_important: count = 0, expected 1 <= count <= 4");
  const std::vector<double> unknown = {1, std::nan("")};
  CHECK(test::message_of<NonFiniteError>([&] { most_important(unknown, 1); }) ==
        "most_important: score[1] is NaN, expected a number");
  CHECK(test::message_of<ShapeError>([&] { group_by_router<double>(logits, equal, 2); }) ==
        "group_by_router: use has 3 numbers, expected 4 (one per expert)");
  auto layer = mixture<double>(4, 2);
  const Matrix<double> weight = value_of(layer, "router.weight");
  CHECK(router_norms(layer)[2] == Approx(weight.row(2).norm()));
  CHECK(router_weight("test", layer).value == weight);
  Rng drawn(1);
  Glu<double> dense(kModel, kHidden, drawn);
  CHECK(test::message_of<ConfigError>([&] { router_weight("test", dense); }) ==
        "test: the layer has 0 weights of linear routers, expected 1");
  CHECK(test::message_of<ConfigError>([&] { router_norms(dense); }) ==
        "router_norms: the layer has 0 routers with a vector for each expert, expected 1");
  const Matrix<double> x = tokens<double>();
  CHECK(test::relative_error(router_logits("test", layer, x), infer(layer.router(), x)) < 1e-14);
}

TEST_CASE("Without its output, an expert's part is missing and the others keep their weights",
          "[tuning]") {
  auto layer = mixture<double>(4, 2);
  const Matrix<double> x = tokens<double>();
  const Matrix<double> y = infer(layer, x);
  ExpertSurgery surgery(layer, x);
  const OutputChange change = surgery.without_output(1);
  // Worked out from the routing.
  using Moe = decltype(layer);
  Moe::Cache cache;
  layer.forward(x, {}, cache);
  Matrix<double> part = Matrix<double>::Zero(40, kModel);
  for (Index t = 0; t < 40; ++t) {
    for (Index i = cache.routing.first(t); i < cache.routing.last(t); ++i) {
      if (cache.routing.expert[i] != 1) continue;
      const auto hidden = [&](const std::string& name) -> Matrix<double> {
        return x.row(t) * value_of(layer, name).transpose();
      };
      const Matrix<double> gate = hidden("experts.1.gate");
      const Matrix<double> act = gate.array() / (1.0 + (-gate.array()).exp());
      part.row(t) = cache.routing.weight[i] * act.cwiseProduct(hidden("experts.1.up")) *
                    value_of(layer, "experts.1.down").transpose();
    }
  }
  CHECK(change.relative == Approx(part.norm() / y.norm()));
  CHECK(infer(layer, x) == y);
  const std::vector<Index> excluded = {1};
  CHECK(surgery.without(excluded).relative != Approx(change.relative));
}

TEST_CASE("An expert is replaced by values", "[tuning]") {
  auto layer = mixture<double>(3, 2);
  auto other = mixture<double>(3, 2, 99);
  ExpertSurgery surgery(layer, tokens<double>());
  // By way of a file, which has them in the order of their names.
  const test::Folder folder;
  io::save_matrices(folder.path() / "expert", ExpertSurgery(other, tokens<double>()).values(2));
  auto values = io::load_matrices<double>(folder.path() / "expert");
  REQUIRE(values.size() == 3);
  CHECK(surgery.replace(0, values).relative > 0.0);
  CHECK(value_of(layer, "experts.0.down") == value_of(other, "experts.2.down"));
  CHECK(surgery.replace(0, values).relative == 0.0);
  const auto before = layer;
  auto fewer = values;
  fewer.erase(fewer.begin());
  CHECK(test::message_of<ConfigError>([&] { surgery.replace(0, fewer); }) ==
        "ExpertSurgery::replace: there is no 'down', expected one for experts.0.down");
  values[1].second.resize(2, 2);
  CHECK(test::message_of<ShapeError>([&] { surgery.replace(0, values); }) ==
        "ExpertSurgery::replace: experts.0.gate is [2, 2], expected [5, 6]");
  CHECK(infer(layer, tokens<double>()) == infer(before, tokens<double>()));
}

TEST_CASE("An optimizer's memory follows the experts", "[tuning]") {
  const auto check = [](auto optimizer) {
    auto layer = biased<double>(4);
    train(layer, optimizer, 5);
    auto before = optimizer;
    const auto state = [](auto& of, const std::string& name, std::size_t i) {
      std::vector<Matrix<double>> filled;  // Muon has those of AdamW too, one kind of them empty.
      for (const auto& [what, matrix] : of.saved_state(name).matrices) {
        if (matrix->size() > 0) filled.push_back(*matrix);
      }
      for (const auto& [what, matrix] : of.saved_state(name).halves) {
        if (matrix->size() > 0) filled.push_back(matrix->template cast<double>());
      }
      return i < filled.size() ? filled[i] : Matrix<double>();
    };
    ExpertSurgery surgery(layer, tokens<double>(), optimizer, "");
    Rng rng(1);
    surgery.keep({3, 0, 0});
    surgery.add_cold(rng);
    CHECK(state(optimizer, "experts.0.up", 0) == state(before, "experts.3.up", 0));
    CHECK(state(optimizer, "experts.1.up", 0) == state(before, "experts.0.up", 0));
    CHECK(state(optimizer, "experts.2.up", 0) == state(before, "experts.0.up", 0));
    const Matrix<double> router = state(optimizer, "router.weight", 0);
    const Matrix<double> old = state(before, "router.weight", 0);
    REQUIRE(router.rows() == 4);
    CHECK(router.row(0) == old.row(3));
    CHECK(router.row(2) == old.row(0));
    CHECK(router.row(3).isZero(0.0));
    CHECK(state(optimizer, "experts.3.up", 0).size() == 0);
    Index* const steps = optimizer.saved_state("experts.0.up").steps;
    if (steps != nullptr) CHECK(*steps == *before.saved_state("experts.3.up").steps);
    CHECK(value_of(layer, "selector.bias").cols() == 4);
    train(layer, optimizer, 3, 60);
    // The router has a bias by now, of which the next cold expert has no memory either.
    surgery.add_cold(rng);
    const Matrix<double> bias = state(optimizer, "router.bias", 0);
    if (bias.size() > 0) CHECK(bias(0, bias.cols() - 1) == 0.0);
    train(layer, optimizer, 3, 60);
  };
  SECTION("AdamW") {
    check(AdamW<double>());
  }
  SECTION("AdamW that leaves experts for later") {
    check(AdamW<double>({.lazy = true}));
  }
  SECTION("AdamW with moments of 16 bits") {
    check(AdamW<double>({.bfloat16_moments = true}));
  }
  SECTION("Muon") {
    check(Muon<double>());
  }
  SECTION("Sgd") {
    check(Sgd<double>({.momentum = 0.9}));
  }
}

TEST_CASE("A run that is resumed after an operation is to the bit one that went on", "[tuning]") {
  const auto check = [](auto operate) {
    auto layer = biased<float>(4);
    AdamW<float> optimizer({.lazy = true});
    train(layer, optimizer, 4);
    {
      ExpertSurgery surgery(layer, tokens<float>(), optimizer, "");
      operate(surgery);
    }
    const test::Folder folder;
    io::save(folder.path(), layer, optimizer, {.rng = Rng(1), .position = 0, .notes = {}});
    // A model of the new shape, otherwise another.
    auto resumed = layer;
    for (auto& [name, parameter] : parameters(resumed)) parameter->value.setConstant(0.5F);
    for (auto& [name, buffer] : buffers(resumed)) buffer->value.setZero();
    AdamW<float> again({.lazy = true});
    io::load(folder.path(), resumed, again);
    train(layer, optimizer, 6, 90);
    train(resumed, again, 6, 90);
    for (const auto& [name, parameter] : parameters(layer)) {
      INFO(name);
      CHECK(value_of(resumed, name) == parameter->value);
    }
    for (const auto& [name, buffer] : buffers(layer)) {
      CHECK(value_of(resumed, name) == buffer->value);
    }
  };
  using Of = ExpertSurgery<decltype(biased<float>(4)), AdamW<float>>;
  Rng rng(7);
  SECTION("remove") {
    check([](Of& s) { s.remove(1); });
  }
  SECTION("clone") {
    check([](Of& s) { s.clone(1); });
  }
  SECTION("split") {
    check([&](Of& s) { s.split(1, rng); });
  }
  SECTION("add_cold") {
    check([&](Of& s) { s.add_cold(rng); });
  }
  SECTION("swap") {
    check([](Of& s) { s.swap(0, 3); });
  }
  SECTION("merge") {
    check([](Of& s) {
      const std::vector<double> use = {1, 2, 3, 4};
      s.merge({3, 1}, use);
    });
  }
  SECTION("replace") {
    check([](Of& s) { s.replace(2, s.values(0)); });
  }
}

TEST_CASE("Experts are changed where weights are stored and where they have adapters", "[tuning]") {
  const Matrix<float> x = tokens<float>();
  auto layer = mixture<float>(4, 2);
  Rng rng(3);
  add_lora(layer, "*", rng, {.rank = 2});
  for (auto& [name, parameter] : parameters(layer)) {
    if (matches_pattern("*.lora_B.*", name)) parameter->value.setConstant(0.1F);
  }
  const std::vector<Index> excluded = {0};
  for (const Storage storage : {Storage::kTrainable, Storage::kInt4}) {
    set_storage(layer, storage);
    auto copy = layer;
    const Matrix<float> masked = infer(copy, x, {.allowed = all_but(4, excluded)});
    ExpertSurgery surgery(copy, x);
    surgery.remove(0);
    CHECK(test::relative_error(infer(copy, x), masked) < 1e-5);
    CHECK(linear_weights(copy, "experts.*").size() == 9);
    surgery.clone(1);
    CHECK(surgery.experts() == 4);
  }
}

TEST_CASE("Operations that cannot be done change nothing", "[tuning]") {
  auto layer = mixture<double>(3, 2);
  const Matrix<double> x = tokens<double>();
  const Matrix<double> y = infer(layer, x);
  Rng rng(1);
  ExpertSurgery surgery(layer, x);
  const auto message = [&](const std::function<void()>& action) {
    const std::string text = test::message_of<ConfigError>(action);
    CHECK(infer(layer, x) == y);
    return text;
  };
  CHECK(message([&] { surgery.remove(3); }) ==
        "ExpertSurgery: expert = 3, expected 0 <= expert < 3");
  CHECK(message([&] { surgery.keep({1}); }) ==
        "TopKSoftmax: k = 2, expected 1 <= k <= experts = 1");
  CHECK(message([&] { surgery.keep({}); }) ==
        "MoELayer::change_experts: experts = 0, expected >= 1");
  CHECK(message([&] {
          surgery.keep({0, 7});
        }) == "MoELayer::change_experts: source[1] = 7, expected kCold or 0 <= source < 3");
  CHECK(message([&] {
          surgery.keep({0, 1, -1});
        }) == "MoELayer::change_experts: rng = null, expected a generator for cold experts");
  CHECK(message([&] { surgery.split(0, rng, 0.0); }) ==
        "ExpertSurgery::split: apart = 0, expected a finite number > 0");
  CHECK(message([&] { surgery.add_cold(rng, 0.0); }) ==
        "ExpertSurgery::add_cold: margin = 0, expected a finite number > 0");
  const std::vector<double> use = {1, 1, 1};
  CHECK(message([&] {
          surgery.merge({1, 1}, use);
        }) == "ExpertSurgery::merge: expert 1 is in the group twice");
  CHECK(message([&] { surgery.merge({}, use); }) ==
        "ExpertSurgery::merge: group = 0, expected >= 1");
  const std::vector<double> two = {1, 1};
  CHECK(message([&] {
          surgery.merge({1, 2}, two);
        }) == "ExpertSurgery::merge: use has 2 numbers, expected 3 (one per expert)");
  const std::vector<double> unused = {0, 0, 0};
  CHECK(message([&] {
          surgery.merge({1, 2}, unused);
        }) == "ExpertSurgery::merge: the sum of use = 0, expected a finite number > 0");
  add_lora(layer, "experts.1.up", rng);
  CHECK(test::message_of<StateError>([&] {
          surgery.merge({1, 2}, use);
        }) ==
        "ExpertSurgery::merge: expert 1 has an adapter, expected merge_lora and remove_lora "
        "before");
  set_storage(layer, Storage::kPacked);
  CHECK(test::message_of<StateError>([&] { surgery.add_cold(rng); }) ==
        "GluBank::remap_experts: the weights are stored for inference, expected "
        "Storage::kTrainable");

  Glu<double> dense(kModel, kHidden, rng);
  ExpertSurgery none(dense, x);
  CHECK(test::message_of<ConfigError>([&] { none.remap({.source = {0}}); }) ==
        "ExpertSurgery: the layer has 0 mixtures whose experts can be changed, expected 1");
  MoELayer zeros(LinearRouter<double>(kModel, 4, rng), TopKSoftmax<double>({.k = 2}), Dropless(),
                 WithZeroExperts(GluBank<double>(kModel, 3, kHidden, rng), rng, {.zero = 1}));
  ExpertSurgery of_zeros(zeros, x);
  CHECK(test::message_of<ConfigError>([&] { of_zeros.remove(0); }) ==
        "ExpertSurgery: the layer has 0 mixtures whose experts can be changed, expected 1");
}

}  // namespace weir::surgery_test
