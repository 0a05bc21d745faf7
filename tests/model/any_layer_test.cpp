// SPDX-License-Identifier: MIT
#include <cstdint>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/attention/grouped_query.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/rms_norm.hpp>

#include "support/allocations.hpp"
#include "support/caches.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"

namespace weir::any_layer_test {

namespace {

// A user's layer: y = a x^2, element by element.
class Square {
 public:
  using Scalar = double;

  struct Cache {
    CacheState state;
    Matrix<double> x, y, dx;
  };

  Square() { a_.value.setConstant(1, 1, 3.0); }

  const Matrix<double>& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    if (pass.training) cache.x = x;
    cache.y = a_.value(0, 0) * x.array().square();
    return cache.state.finish(*this, pass, cache.y);
  }

  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    cache.state.begin_backward("Square::backward", *this, dy);
    a_.gradient()(0, 0) += (dy.array() * cache.x.array().square()).sum();
    cache.dx = 2.0 * a_.value(0, 0) * dy.cwiseProduct(cache.x);
    return cache.dx;
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("a", self.a_);
  }

 private:
  Parameter<double> a_;
};

// A layer with all that AnyLayer passes on. It adds to each row how many rows came before it, in
// this pass or, when it decodes, in its sequence; padding yields zero.
class Counting {
 public:
  using Scalar = double;

  struct State {
    Index length = 0;
    void truncate(Index to) { length = to; }
  };

  struct Cache {
    CacheState state;
    Matrix<double> y, dx;
  };

  const Matrix<double>& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    if (pass.record != nullptr) pass.record->add_loss("count", 0.5 * pass.aux_scale);
    cache.y = count(x, 0);
    for (Index t = 0; t < x.rows(); ++t) {
      if (pass.is_padding(t)) cache.y.row(t).setZero();
    }
    return cache.state.finish(*this, pass, cache.y);
  }

  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    cache.state.begin_backward("Counting::backward", *this, dy);
    cache.dx = dy;
    return cache.dx;
  }

  const Matrix<double>& decode(MatrixIn<double> x, const Pass& pass, std::span<State* const> states,
                               Cache& cache) const {
    const Sequences one({x.rows()});
    const Sequences& sequences = pass.sequences == nullptr ? one : *pass.sequences;
    cache.y = x;
    for (std::size_t s = 0; s < states.size(); ++s) {
      const Index begin = sequences.begin(static_cast<Index>(s));
      const Index length = sequences.length(static_cast<Index>(s));
      cache.y.middleRows(begin, length) = count(x.middleRows(begin, length), states[s]->length);
      states[s]->length += length;
    }
    return cache.y;
  }

  void update_self() { ++updates; }

  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}

  int updates = 0;

 private:
  static Matrix<double> count(MatrixIn<double> x, Index before) {
    Matrix<double> y = x;
    for (Index t = 0; t < x.rows(); ++t) y.row(t).array() += static_cast<double>(before + t);
    return y;
  }
};

auto mixture(std::uint64_t seed) {
  Rng rng(seed);
  return MoELayer(LinearRouter<double>(4, 3, rng, {.init_scale = 1.0}),
                  SoftmaxTopK<double>({.k = 2}), Dropless(), GluBank<double>(4, 3, 5, rng),
                  SwitchLoss<double>({.coefficient = 0.3}));
}

using Mixture = decltype(mixture(0));

}  // namespace

static_assert(Layer<AnyLayer<double>>);
static_assert(DecodingLayer<AnyLayer<double>>);
static_assert(DecodingLayer<Counting>);
static_assert(!DecodingLayer<Square>);
static_assert(Layer<AnyLayer<float>>);
static_assert(std::is_nothrow_move_constructible_v<AnyLayer<double>>);

TEST_CASE("AnyLayer computes what the layer does", "[model][any_layer]") {
  Rng rng(1);
  Linear<double> linear(4, 3, rng, {.bias = true});
  AnyLayer<double> any = linear;
  const Matrix<double> x = test::random_matrix(5, 4, 2);
  const Matrix<double> dy = test::random_matrix(5, 3, 3);
  Linear<double>::Cache linear_cache;
  AnyLayer<double>::Cache cache;

  CHECK(infer(any, x) == infer(linear, x));
  CHECK(any.forward(x, kTraining, cache) == linear.forward(x, kTraining, linear_cache));
  CHECK(any.backward(dy, cache) == linear.backward(dy, linear_cache));
  const auto expected = parameters(linear);
  const auto actual = parameters(any);
  REQUIRE(actual.size() == 2);
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(actual[i].name == expected[i].name);
    CHECK(actual[i].parameter->grad == expected[i].parameter->grad);
  }
}

TEST_CASE("AnyLayer's gradients agree with finite differences", "[model][any_layer][gradient]") {
  Rng rng(4);
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1, 1};
  const Sequences sequences({4, 2});
  const Pass pass{.sequences = &sequences, .mask = mask, .aux_scale = 0.7};
  std::vector<AnyLayer<double>> layers = {Linear<double>(4, 4, rng), RmsNorm<double>(4), Square(),
                                          mixture(5)};
  for (AnyLayer<double>& layer : layers) {
    test::check_gradients(layer, test::random_matrix(6, 4, 6), pass);
  }
}

TEST_CASE("AnyLayer copies the layer", "[model][any_layer]") {
  Rng rng(7);
  const Matrix<double> x = test::random_matrix(3, 4, 8);
  AnyLayer<double> original = Linear<double>(4, 4, rng);
  const Matrix<double> y = infer(original, x);

  AnyLayer<double> copy = original;
  CHECK(infer(copy, x) == y);
  parameters(copy)[0].parameter->value *= 2.0;
  CHECK(infer(copy, x) == 2.0 * y);
  CHECK(infer(original, x) == y);

  AnyLayer<double> assigned = Square();
  assigned = original;
  CHECK(infer(assigned, x) == y);
  parameters(assigned)[0].parameter->value *= 4.0;
  CHECK(infer(original, x) == y);

  AnyLayer<double>& itself = assigned;
  assigned = itself;
  CHECK(infer(assigned, x) == 4.0 * y);

  const Parameter<double>* weight = parameters(original)[0].parameter;
  AnyLayer<double> moved = std::move(original);
  CHECK(parameters(moved)[0].parameter == weight);
  original = copy;  // NOLINT(bugprone-use-after-move): assigning to it is allowed.
  CHECK(infer(original, x) == 2.0 * y);
}

TEST_CASE("A moved AnyLayer is the same layer, and a moved cache the same cache",
          "[model][any_layer]") {
  AnyLayer<double> original = Square();
  AnyLayer<double>::Cache filled;
  const Matrix<double> x = Matrix<double>::Constant(2, 2, 2.0);
  CHECK(original.forward(x, kTraining, filled) == Matrix<double>::Constant(2, 2, 12.0));  // 3 * 2^2

  AnyLayer<double> moved = std::move(original);
  AnyLayer<double>::Cache cache = std::move(filled);
  const Matrix<double>& dx = moved.backward(Matrix<double>::Ones(2, 2), cache);
  CHECK(dx == Matrix<double>::Constant(2, 2, 12.0));  // 2 * 3 * 2
}

TEST_CASE("AnyLayer gives the layer itself to those who know its type", "[model][any_layer]") {
  AnyLayer<double> any = Counting();
  REQUIRE(any.get<Counting>() != nullptr);
  CHECK(any.get<Square>() == nullptr);
  const AnyLayer<double>& read_only = any;
  CHECK(read_only.get<Counting>() == any.get<Counting>());
  CHECK(read_only.get<Square>() == nullptr);

  AnyLayer<double> moe = mixture(9);
  REQUIRE(moe.get<Mixture>() != nullptr);
  CHECK(moe.get<Mixture>()->experts() == 3);
}

TEST_CASE("AnyLayer hands on the pass, its record and update", "[model][any_layer]") {
  AnyLayer<double> any = Counting();
  AnyLayer<double>::Cache cache;
  PassRecord record;
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  const Pass pass{.mask = mask, .aux_scale = 4.0, .record = &record};
  const Matrix<double> y = any.forward(Matrix<double>::Zero(3, 1), pass, cache);
  CHECK(y.reshaped().transpose() == RowVector<double>{{0.0, 0.0, 2.0}});
  REQUIRE(record.losses().size() == 1);
  CHECK(record.losses()[0].name == "count");
  CHECK(record.losses()[0].value == 2.0);

  update(any);
  update(any);
  CHECK(any.get<Counting>()->updates == 2);
  AnyLayer<double> dense = Square();
  update(dense);  // Nothing to do.
}

TEST_CASE("AnyLayer decodes with the layer's state, or without", "[model][any_layer]") {
  const AnyLayer<double> counting = Counting();
  AnyLayer<double>::State state;
  AnyLayer<double>::Cache cache;
  const Matrix<double> two = Matrix<double>::Zero(2, 1);
  CHECK(decode(counting, two, state, cache)(1, 0) == 1.0);
  AnyLayer<double>::State branch = state;
  CHECK(decode(counting, two, state, cache)(1, 0) == 3.0);
  CHECK(decode(counting, two, state, cache)(1, 0) == 5.0);
  CHECK(decode(counting, two, branch, cache)(1, 0) == 3.0);

  const AnyLayer<double> square = Square();
  AnyLayer<double>::State none;
  AnyLayer<double>::Cache square_cache;
  CHECK(decode(square, Matrix<double>::Ones(1, 1), none, square_cache)(0, 0) == 3.0);
  CHECK_FALSE(none.own.has_value());
  none.truncate(7);  // Nothing to forget.
}

TEST_CASE("AnyLayer decodes several sequences at once", "[model][any_layer]") {
  const AnyLayer<double> counting = Counting();
  const AnyLayer<double> square = Square();
  AnyLayer<double>::State a, b, c;
  AnyLayer<double>::State* const states[] = {&a, &b, &c};
  AnyLayer<double>::Cache cache;
  const Sequences sequences({2, 0, 1});
  const Pass pass{.sequences = &sequences};
  const Matrix<double> x = Matrix<double>::Ones(3, 1);
  const auto decode = [&](const AnyLayer<double>& layer) {
    const Matrix<double> y = layer.decode(x, pass, states, cache);
    return RowVector<double>(y.reshaped().transpose());
  };
  CHECK(decode(counting) == RowVector<double>{{1.0, 2.0, 1.0}});
  CHECK(decode(counting) == RowVector<double>{{3.0, 4.0, 2.0}});
  a.truncate(1);
  c.truncate(0);
  b.truncate(0);
  CHECK(decode(counting) == RowVector<double>{{2.0, 3.0, 1.0}});

  AnyLayer<double>::State none[3];
  AnyLayer<double>::State* const no_states[] = {&none[0], &none[1], &none[2]};
  AnyLayer<double>::Cache square_cache;
  CHECK(square.decode(x, pass, no_states, square_cache) == Matrix<double>::Constant(3, 1, 3.0));
  CHECK_FALSE(none[0].own.has_value());
}

TEST_CASE("AnyLayer refuses the state of a layer of another type", "[model][any_layer]") {
  Rng rng(10);
  const AnyLayer<double> counting = Counting();
  const AnyLayer<double> attention =
      GroupedQueryAttention<double>(rng, {.d_model = 4, .heads = 1, .kv_heads = 1});
  AnyLayer<double>::State state;
  AnyLayer<double>::Cache cache;
  AnyLayer<double>::Cache attention_cache;
  const Matrix<double> x = test::random_matrix(2, 4, 11);
  decode(counting, x, state, cache);
  CHECK(test::message_of<StateError>([&] { decode(attention, x, state, attention_cache); }) ==
        "AnyLayer::decode: the state is of another layer, expected an empty one or one that this "
        "layer has filled");
  CHECK(decode(counting, x, state, cache)(0, 0) == x(0, 0) + 2.0);
}

TEST_CASE("AnyLayer tells a record what a mixture did, and nothing of others",
          "[model][any_layer]") {
  const AnyLayer<double> moe = mixture(12);
  AnyLayer<double>::Cache cache;
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  const Matrix<double> x = test::random_matrix(5, 4, 13);
  moe.forward(x, {.record = &record}, cache);
  REQUIRE(record.reports().size() == 1);
  const LayerReport& report = record.reports()[0].report;
  CHECK(report.tokens == 5);
  CHECK(report.assignments == 10);
  REQUIRE(report.losses.size() == 1);
  CHECK(report.losses[0].first == "switch");
  CHECK(report.losses[0].second == record.aux_loss());
  CHECK(record.aux_loss() > 0.0);

  record.clear();
  const AnyLayer<double> dense = Square();
  dense.forward(x, {.record = &record}, cache);
  CHECK(record.reports().empty());
  CHECK(record.losses().empty());
}

TEST_CASE("Verbs reach the balancing rules and buffers of the layer in an AnyLayer",
          "[model][any_layer]") {
  Rng rng(14);
  AnyLayer<double> moe =
      MoELayer(LinearRouter<double>(4, 3, rng), SigmoidTopK<double>(3, {.k = 1}), Dropless(),
               GluBank<double>(4, 3, 5, rng), BiasBalance<double>({.rate = 0.5}));
  const auto kept = buffers(moe);
  REQUIRE(kept.size() == 1);
  CHECK(kept[0].name == "selector.bias");
  AnyLayer<double>::Cache cache;
  const Matrix<double> x = test::random_matrix(1, 4, 15);  // One token: one expert has it all.
  moe.backward(moe.forward(x, kTraining, cache), cache);
  CHECK(kept[0].buffer->value.isZero(0.0));
  update(moe);
  CHECK(kept[0].buffer->value.sum() == 0.5);  // -0.5 for one, +0.5 for the other two
}

TEST_CASE("AnyLayer makes experts of different kinds", "[model][any_layer][gradient]") {
  Rng rng(16);
  std::vector<AnyLayer<double>> experts = {Linear<double>(4, 4, rng), Square(), RmsNorm<double>(4)};
  MoELayer moe(LinearRouter<double>(4, 3, rng, {.init_scale = 1.0}), SoftmaxTopK<double>({.k = 2}),
               Dropless(), AnyBank<AnyLayer<double>>(std::move(experts), 4, 4));
  test::check_gradients(moe, test::random_matrix(6, 4, 17));
  CHECK(parameters(moe)[1].name == "experts.0.weight");
  CHECK(parameters(moe)[2].name == "experts.1.a");
}

TEST_CASE("AnyLayer refuses caches as the layer does", "[model][any_layer]") {
  Rng rng(19);
  AnyLayer<double> linear = Linear<double>(4, 4, rng);
  AnyLayer<double> square = Square();
  const Matrix<double> x = test::random_matrix(2, 4, 20);
  test::check_refused_caches(linear, x, "Linear::backward");

  // What a layer of another type has left counts as nothing.
  AnyLayer<double>::Cache cache;
  linear.forward(x, kTraining, cache);
  CHECK(test::message_of<StateError>([&] { square.backward(x, cache); }) ==
        "Square::backward: the cache is empty, expected a forward pass that succeeded");
}

TEST_CASE("One cache serves layers of several types in turn", "[model][any_layer]") {
  Rng rng(21);
  AnyLayer<double> linear = Linear<double>(4, 4, rng);
  AnyLayer<double> moe = mixture(22);
  const Matrix<double> x = test::random_matrix(5, 4, 23);
  AnyLayer<double>::Cache cache;
  const auto run = [&] {
    linear.forward(x, Pass{}, cache);
    moe.forward(x, Pass{}, cache);
  };
  run();
  run();
  CHECK(cache.own.size() == 2);
  CHECK(test::count_allocations(run) == 0);
  CHECK(linear.forward(x, Pass{}, cache) == infer(linear, x));
  CHECK(moe.forward(x, Pass{}, cache) == infer(moe, x));

  // Each type finds what it has left there, also in training.
  const Matrix<double> y = linear.forward(x, kTraining, cache);
  moe.forward(x, kTraining, cache);
  AnyLayer<double>::Cache linear_cache, moe_cache;
  linear.forward(x, kTraining, linear_cache);
  moe.forward(x, kTraining, moe_cache);
  CHECK(linear.backward(y, cache) == linear.backward(y, linear_cache));
  CHECK(moe.backward(y, cache) == moe.backward(y, moe_cache));

  // Of two layers of one type, the later takes the place of the earlier.
  AnyLayer<double> other = Linear<double>(4, 4, rng);
  linear.forward(x, kTraining, cache);
  other.forward(x, kTraining, cache);
  CHECK(cache.own.size() == 2);
  CHECK(test::message_of<StateError>([&] { linear.backward(y, cache); }) ==
        "Linear::backward: the cache was filled by another layer, expected a forward pass of this "
        "one");
}

TEST_CASE("AnyLayer takes zero tokens", "[model][any_layer]") {
  std::vector<AnyLayer<double>> layers = {Square(), Counting(), mixture(18)};
  for (AnyLayer<double>& layer : layers) {
    const Matrix<double> none(0, 4);
    AnyLayer<double>::Cache cache;
    CHECK(test::relative_error(infer(layer, none), none) == 0.0);
    CHECK(test::relative_error(layer.forward(none, kTraining, cache), none) == 0.0);
    CHECK(test::relative_error(layer.backward(none, cache), none) == 0.0);
  }
}

}  // namespace weir::any_layer_test
