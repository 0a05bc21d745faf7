// SPDX-License-Identifier: MIT
#include <string>
#include <type_traits>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

namespace weir::expert_dropout_test {

namespace {

template <class B>
auto config_of(double dropout) {
  if constexpr (std::is_same_v<B, MlpBank<double>>) {
    return MlpBankConfig{.bias = true, .dropout = dropout};
  } else {
    return GluBankConfig{.dropout = dropout};
  }
}

template <class B>
std::string name_of() {
  return std::is_same_v<B, MlpBank<double>> ? "MlpBank" : "GluBank";
}

template <class B>
struct Case {
  explicit Case(double dropout) : rng(1), bank(4, 3, 6, rng, config_of<B>(dropout)) {
    dispatch.build(test::route(TopKSoftmax<double>({.k = 2}), test::random_matrix(7, 3, 2)));
  }

  Rng rng;
  B bank;
  Dispatch<double> dispatch;
  Matrix<double> x = test::random_matrix(7, 4, 3);
  typename B::Cache cache;

  const Matrix<double>& train(std::uint64_t seed) {
    Rng draws(seed);
    return bank.forward(x, dispatch, {.training = true, .rng = &draws}, cache);
  }
};

}  // namespace

namespace {

template <class Cache>
const Scratch<double>& hidden_of(const Cache& cache) {
  if constexpr (requires { cache.kept; }) {
    return cache.kept.hidden();
  } else {
    return cache.hidden;
  }
}

}  // namespace

TEMPLATE_TEST_CASE("Banks drop hidden numbers in training alone, and keep their mean",
                   "[moe][experts][dropout]", MlpBank<double>, GluBank<double>) {
  Case<TestType> dropping(0.4);
  Case<TestType> plain(0.0);
  CHECK(dropping.bank.dropout() == 0.4);
  const Matrix<double> expected =
      plain.bank.forward(plain.x, plain.dispatch, kTraining, plain.cache);
  CHECK(dropping.bank.forward(dropping.x, dropping.dispatch, {}, dropping.cache) == expected);

  dropping.train(4);
  Rng same(4);
  const Rng draws = same.split();
  for (Index i = 0; i < 14 * 6; ++i) {
    const bool dropped = unit_interval(draws.at(static_cast<std::uint64_t>(i))) < 0.4;
    const double hidden = hidden_of(plain.cache).data()[i];
    CHECK(hidden_of(dropping.cache).data()[i] ==
          Approx(dropped ? 0.0 : hidden / 0.6).margin(1e-15));
  }

  constexpr int kRounds = 4000;
  Matrix<double> sum = Matrix<double>::Zero(7, 4);
  for (int round = 0; round < kRounds; ++round) {
    sum += dropping.train(100U + static_cast<std::uint64_t>(round));
  }
  CHECK(test::relative_error(Matrix<double>(sum / kRounds), expected) < 0.06);
}

TEMPLATE_TEST_CASE("Banks with dropout have the gradient of finite differences",
                   "[moe][experts][dropout][gradient]", MlpBank<double>, GluBank<double>) {
  Case<TestType> c(0.4);
  const Matrix<double> d = test::random_matrix(7, 4, 5);
  c.train(6);
  std::vector<double> d_weight(14, 0.0);
  const Matrix<double> dx = c.bank.backward(d, c.dispatch, d_weight, c.cache);
  const auto slope = [&](double& number) {
    constexpr double kStep = 1e-6;
    const double before = number;
    number = before + kStep;
    const double up = c.train(6).cwiseProduct(d).sum();
    number = before - kStep;
    const double down = c.train(6).cwiseProduct(d).sum();
    number = before;
    return (up - down) / (2.0 * kStep);
  };
  for (Index i = 0; i < c.x.size(); ++i) {
    CHECK(dx.data()[i] == Approx(slope(c.x.data()[i])).epsilon(1e-6).margin(1e-8));
  }
  for (auto& [name, parameter] : parameters(c.bank)) {
    INFO(name);
    if (parameter->grad.size() == 0) continue;  // No token came to this expert.
    for (Index i = 0; i < parameter->value.size(); ++i) {
      CHECK(parameter->grad.data()[i] ==
            Approx(slope(parameter->value.data()[i])).epsilon(1e-6).margin(1e-8));
    }
  }
}

TEMPLATE_TEST_CASE("Banks that dropped in one pass drop nothing in the next, outside of training",
                   "[moe][experts][dropout]", MlpBank<double>, GluBank<double>) {
  Case<TestType> c(0.4);
  c.train(8);
  const Matrix<double> y = c.bank.forward(c.x, c.dispatch, {}, c.cache);
  CHECK(c.cache.factor.rows() == 0);
  // Weights that are stored for inference drop nothing in any pass.
  set_storage(c.bank, Storage::kPacked);
  CHECK(test::relative_error(c.train(8), y) < 1e-14);
  set_storage(c.bank, Storage::kTrainable);
  CHECK(test::relative_error(c.train(8), y) > 0.1);
}

TEMPLATE_TEST_CASE("Banks with dropout allocate nothing once warm, and say what is missing",
                   "[moe][experts][dropout]", MlpBank<double>, GluBank<double>) {
  Case<TestType> c(0.4);
  const Matrix<double> one = c.train(7);
  CHECK(test::count_allocations([&] { c.train(7); }) == 0);
  {
    const test::Threads threads(2);
    CHECK(c.train(7) == one);
  }
  const std::string name = name_of<TestType>();
  CHECK(test::message_of<ConfigError>([&] {
          c.bank.forward(c.x, c.dispatch, kTraining, c.cache);
        }) == name + "::forward: pass.rng = null, expected a generator in training");
  CHECK(test::message_of<ConfigError>([&] {
          TestType(4, 3, 6, c.rng, config_of<TestType>(1.0));
        }) == name + ": dropout = 1, expected 0 <= dropout < 1");
}

}  // namespace weir::expert_dropout_test
