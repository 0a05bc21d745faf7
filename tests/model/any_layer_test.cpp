// SPDX-License-Identifier: MIT
#include <concepts>
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

#include "support/catch.hpp"
#include "support/gradient.hpp"

using namespace weir;

namespace {

// A user's layer that returns its results by value: y = a x^2, element by element.
class Square {
 public:
  using Scalar = double;

  struct Cache {
    Matrix<double> x;
  };

  Square() { a_.value.setConstant(1, 1, 3.0); }

  Matrix<double> forward(MatrixIn<double> x) const { return a_.value(0, 0) * x.array().square(); }

  Matrix<double> forward(MatrixIn<double> x, Cache& cache) const {
    cache.x = x;
    return forward(x);
  }

  Matrix<double> backward(MatrixIn<double> dy, Cache& cache) {
    a_.gradient()(0, 0) += (dy.array() * cache.x.array().square()).sum();
    return 2.0 * a_.value(0, 0) * dy.cwiseProduct(cache.x);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("a", self.a_);
  }

 private:
  Parameter<double> a_;
};

// A layer with all that AnyLayer passes on. It adds to each row how many rows came before it, in
// this pass or, decoding, in its sequence; padding yields zero.
class Counting {
 public:
  using Scalar = double;

  struct State {
    Index length = 0;
    void truncate(Index to) { length = to; }
  };

  struct Cache {
    double aux_loss = 0.0;
  };

  Matrix<double> forward(MatrixIn<double> x) const {
    Cache cache;
    return forward(x, cache);
  }
  Matrix<double> forward(MatrixIn<double> x, Cache& cache) const { return forward(x, {}, cache); }
  Matrix<double> forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    cache.aux_loss = 0.5 * pass.aux_scale;
    Matrix<double> y = count(x, 0);
    for (Index t = 0; t < x.rows(); ++t) {
      if (pass.is_padding(t)) y.row(t).setZero();
    }
    return y;
  }
  Matrix<double> backward(MatrixIn<double> dy, Cache& /*cache*/) { return dy; }

  Matrix<double> decode(MatrixIn<double> x, const Pass& pass, std::span<State* const> states,
                        Cache& cache) const {
    cache.aux_loss = 0.25;
    const Sequences one({x.rows()});
    const Sequences& sequences = pass.sequences == nullptr ? one : *pass.sequences;
    Matrix<double> y = x;
    for (std::size_t s = 0; s < states.size(); ++s) {
      const Index begin = sequences.begin(static_cast<Index>(s));
      const Index length = sequences.length(static_cast<Index>(s));
      y.middleRows(begin, length) = count(x.middleRows(begin, length), states[s]->length);
      states[s]->length += length;
    }
    return y;
  }

  void update() { ++updates; }

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
  return MoELayer(LinearRouter<double>(4, 3, rng, {.init_scale = 1.0}), SoftmaxTopK<double>{.k = 2},
                  Dropless{}, GluBank<double>(3, 4, 5, rng, 1.0),
                  SwitchLoss<double>{.coefficient = 0.3});
}

using Mixture = decltype(mixture(0));

}  // namespace

static_assert(PassLayer<AnyLayer<double>>);
static_assert(DecodingLayer<AnyLayer<double>>);
static_assert(DecodingLayer<Counting>);
static_assert(!DecodingLayer<Square>);
static_assert(PassLayer<AnyLayer<float>>);
static_assert(std::is_nothrow_move_constructible_v<AnyLayer<double>>);
static_assert(!std::constructible_from<AnyLayer<float>, Square>, "another scalar");
static_assert(!std::constructible_from<AnyLayer<double>, int>);

TEST_CASE("AnyLayer computes what the layer does", "[model][any_layer]") {
  Rng rng(1);
  Linear<double> linear(4, 3, rng, {.bias = true});
  AnyLayer<double> any = linear;
  const Matrix<double> x = test::random_matrix(5, 4, 2);
  const Matrix<double> dy = test::random_matrix(5, 3, 3);
  Linear<double>::Cache linear_cache;
  AnyLayer<double>::Cache cache;

  CHECK(any.forward(x) == linear.forward(x));
  CHECK(any.forward(x, cache) == linear.forward(x, linear_cache));
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
  const Matrix<double> y = original.forward(x);

  AnyLayer<double> copy = original;
  CHECK(copy.forward(x) == y);
  parameters(copy)[0].parameter->value *= 2.0;
  CHECK(copy.forward(x) == 2.0 * y);
  CHECK(original.forward(x) == y);

  AnyLayer<double> assigned = Square();
  assigned = original;
  CHECK(assigned.forward(x) == y);
  parameters(assigned)[0].parameter->value *= 4.0;
  CHECK(original.forward(x) == y);

  AnyLayer<double>& itself = assigned;
  assigned = itself;
  CHECK(assigned.forward(x) == 4.0 * y);

  const Parameter<double>* weight = parameters(original)[0].parameter;
  AnyLayer<double> moved = std::move(original);
  CHECK(parameters(moved)[0].parameter == weight);
  original = copy;  // NOLINT(bugprone-use-after-move): assigning to it is allowed.
  CHECK(original.forward(x) == 2.0 * y);
}

TEST_CASE("AnyLayer keeps results that a layer returns by value", "[model][any_layer]") {
  AnyLayer<double> any = Square();
  AnyLayer<double>::Cache cache;
  const Matrix<double> x = Matrix<double>::Constant(2, 2, 2.0);

  const Matrix<double>& y = any.forward(x, cache);
  const Matrix<double>& dx = any.backward(Matrix<double>::Ones(2, 2), cache);
  CHECK(y == Matrix<double>::Constant(2, 2, 12.0));   // 3 * 2^2; still there
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

TEST_CASE("AnyLayer passes on pass, auxiliary loss and update", "[model][any_layer]") {
  AnyLayer<double> any = Counting();
  AnyLayer<double>::Cache cache;
  const std::vector<std::uint8_t> mask = {1, 0, 1};
  const Matrix<double> y =
      any.forward(Matrix<double>::Zero(3, 1), {.mask = mask, .aux_scale = 4.0}, cache);
  CHECK(y.reshaped().transpose() == RowVector<double>{{0.0, 0.0, 2.0}});
  CHECK(cache.aux_loss == 2.0);
  any.forward(Matrix<double>::Zero(3, 1), cache);
  CHECK(cache.aux_loss == 0.5);

  any.update();
  any.update();
  CHECK(any.get<Counting>()->updates == 2);

  AnyLayer<double> dense = Square();
  AnyLayer<double>::Cache dense_cache;
  dense.update();
  dense.forward(Matrix<double>::Zero(3, 1), dense_cache);
  CHECK(dense_cache.aux_loss == 0.0);
}

TEST_CASE("AnyLayer decodes with the layer's state, or without", "[model][any_layer]") {
  const AnyLayer<double> counting = Counting();
  AnyLayer<double>::State state;
  AnyLayer<double>::Cache cache;
  const Matrix<double> two = Matrix<double>::Zero(2, 1);
  CHECK(counting.decode(two, state, cache)(1, 0) == 1.0);
  CHECK(cache.aux_loss == 0.25);
  AnyLayer<double>::State branch = state;
  CHECK(counting.decode(two, state, cache)(1, 0) == 3.0);
  CHECK(counting.decode(two, state, cache)(1, 0) == 5.0);
  CHECK(counting.decode(two, branch, cache)(1, 0) == 3.0);

  const AnyLayer<double> square = Square();
  AnyLayer<double>::State none;
  AnyLayer<double>::Cache square_cache;
  CHECK(square.decode(Matrix<double>::Ones(1, 1), none, square_cache)(0, 0) == 3.0);
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
      GroupedQueryAttention<double>({.d_model = 4, .heads = 1, .kv_heads = 1}, rng);
  AnyLayer<double>::State state;
  AnyLayer<double>::Cache cache;
  AnyLayer<double>::Cache attention_cache;
  const Matrix<double> x = test::random_matrix(2, 4, 11);
  counting.decode(x, state, cache);
  CHECK(test::message_of<StateError>([&] { attention.decode(x, state, attention_cache); }) ==
        "AnyLayer::decode: the state is of another layer, expected an empty one or one that this "
        "layer has filled");
  CHECK(counting.decode(x, state, cache)(0, 0) == x(0, 0) + 2.0);
}

TEST_CASE("AnyLayer reports what a mixture did, and nothing for others", "[model][any_layer]") {
  const AnyLayer<double> moe = mixture(12);
  AnyLayer<double>::Cache cache;
  CHECK_FALSE(moe.report(cache).has_value());
  moe.forward(test::random_matrix(5, 4, 13), cache);
  const auto report = moe.report(cache);
  REQUIRE(report.has_value());
  CHECK(report->tokens == 5);
  CHECK(report->assignments == 10);
  REQUIRE(report->losses.size() == 1);
  CHECK(report->losses[0].first == "switch");
  CHECK(report->losses[0].second == cache.aux_loss);
  CHECK(cache.aux_loss > 0.0);

  const AnyLayer<double> dense = Square();
  AnyLayer<double>::Cache dense_cache;
  dense.forward(test::random_matrix(5, 4, 13), dense_cache);
  CHECK_FALSE(dense.report(dense_cache).has_value());
}

TEST_CASE("AnyLayer passes update on to balancing rules, and visits buffers",
          "[model][any_layer]") {
  Rng rng(14);
  AnyLayer<double> moe =
      MoELayer(LinearRouter<double>(4, 3, rng), SigmoidTopK<double>(3, {.k = 1}), Dropless{},
               GluBank<double>(3, 4, 5, rng), BiasBalance<double>(0.5));
  const auto kept = buffers(moe);
  REQUIRE(kept.size() == 1);
  CHECK(kept[0].name == "selector.bias");
  AnyLayer<double>::Cache cache;
  const Matrix<double> x = test::random_matrix(1, 4, 15);  // One token: one expert has it all.
  moe.backward(moe.forward(x, cache), cache);
  CHECK(kept[0].buffer->value.isZero(0.0));
  moe.update();
  CHECK(kept[0].buffer->value.sum() == 0.5);  // -0.5 for one, +0.5 for the other two
}

TEST_CASE("AnyLayer makes experts of different kinds", "[model][any_layer][gradient]") {
  Rng rng(16);
  std::vector<AnyLayer<double>> experts = {Linear<double>(4, 4, rng), Square(), RmsNorm<double>(4)};
  MoELayer moe(LinearRouter<double>(4, 3, rng, {.init_scale = 1.0}), SoftmaxTopK<double>{.k = 2},
               Dropless{}, AnyBank<AnyLayer<double>>(std::move(experts), 4, 4));
  test::check_gradients(moe, test::random_matrix(6, 4, 17));
  CHECK(parameters(moe)[1].name == "experts.0.weight");
  CHECK(parameters(moe)[2].name == "experts.1.a");
}

TEST_CASE("AnyLayer wants a forward pass before backward", "[model][any_layer]") {
  const auto backward = [](AnyLayer<double> layer, AnyLayer<double>::Cache cache) {
    return test::message_of<StateError>([&] { layer.backward(Matrix<double>::Zero(2, 4), cache); });
  };
  constexpr auto kMessage =
      "AnyLayer::backward: the cache is empty, expected a forward pass of this layer before";
  CHECK(backward(Square(), {}) == kMessage);
  AnyLayer<double>::Cache other;
  AnyLayer<double>(Counting()).forward(Matrix<double>::Zero(2, 4), other);
  CHECK(backward(Square(), other) == kMessage);

  // A cache can go from one layer to another: it is emptied.
  AnyLayer<double> square = Square();
  square.forward(Matrix<double>::Ones(1, 1), other);
  CHECK(other.aux_loss == 0.0);
  CHECK(square.backward(Matrix<double>::Ones(1, 1), other)(0, 0) == 6.0);
}

TEST_CASE("AnyLayer takes zero tokens", "[model][any_layer]") {
  std::vector<AnyLayer<double>> layers = {Square(), Counting(), mixture(18)};
  for (AnyLayer<double>& layer : layers) {
    const Matrix<double> none(0, 4);
    AnyLayer<double>::Cache cache;
    CHECK(test::relative_error(layer.forward(none), none) == 0.0);
    CHECK(test::relative_error(layer.forward(none, cache), none) == 0.0);
    CHECK(test::relative_error(layer.backward(none, cache), none) == 0.0);
  }
}
