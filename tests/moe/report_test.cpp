// SPDX-License-Identifier: MIT
#include <cmath>
#include <vector>

#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/catch.hpp"
#include "support/routing.hpp"

namespace weir::report_test {

TEST_CASE("A report counts load, drops and entropy", "[moe][report]") {
  // Choices {0, 1}, {0, 1}, padding, {0, 2}, {0, 1}. With one place an expert, the second and the
  // last token lose both of their experts, the fourth its first.
  Matrix<double> logits(5, 3);
  logits << 2, 1, 0, 2, 1, 0, NAN, NAN, NAN, 2, 0, 1, 2, 1, 0;
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  Routing<double> routing = test::route(SoftmaxTopK<double>({.k = 2}), logits, {.mask = mask});
  test::limit(FixedCapacity({.capacity = 1}), routing);

  const LayerReport report = report_of(routing);
  CHECK(report.tokens == 4);
  CHECK(report.assignments == 8);
  CHECK(report.dropped == 5);
  CHECK(report.dropped_tokens == 2);
  CHECK(report.load == std::vector<Index>{4, 3, 1});
  CHECK(report.kept == std::vector<Index>{1, 1, 1});
  CHECK(report.drop_rate() == 0.625);
  CHECK(report.imbalance() == 1.5);  // 4 of 8, of 3 experts.
  CHECK(report.losses.empty());
  // Experts 1 and 2 have exp(1) and 1 of the sum, the fourth token's choices the other way round.
  REQUIRE(report.weight.size() == 3);
  const double total = std::exp(2.0) + std::exp(1.0) + 1.0;
  CHECK(report.weight[0] == Approx(4.0 * std::exp(2.0) / total));
  CHECK(report.weight[1] == Approx(3.0 * std::exp(1.0) / total));
  CHECK(report.weight[2] == Approx(std::exp(1.0) / total));

  // All real tokens have the probabilities exp(2), exp(1), 1 over their sum, in some order.
  const double sum = std::exp(2.0) + std::exp(1.0) + 1.0;
  CHECK(report.entropy == Approx(std::log(sum) - (2.0 * std::exp(2.0) + std::exp(1.0)) / sum));
}

TEST_CASE("Entropy is ln experts for an undecided router and zero for a sure one",
          "[moe][report]") {
  const SoftmaxTopK<float> selector({.k = 1});
  SoftmaxTopK<float>::Cache cache;
  Routing<float> routing;
  selector.forward(Matrix<float>::Constant(3, 8, 0.5F), {}, routing, cache);
  CHECK(report_of(routing).entropy == Approx(std::log(8.0)));
  CHECK(report_of(routing).imbalance() == 8.0);  // Ties: all to expert 0.

  Matrix<float> sure = Matrix<float>::Zero(2, 3);
  sure.col(1).setConstant(1000.0F);
  selector.forward(sure, {}, routing, cache);
  CHECK(report_of(routing).entropy == 0.0);
}

TEST_CASE("A report of nothing is level and undropped", "[moe][report]") {
  const auto check = [](const LayerReport& report) {
    CHECK(report.tokens == 0);
    CHECK(report.assignments == 0);
    CHECK(report.dropped_tokens == 0);
    CHECK(report.entropy == 0.0);
    CHECK(report.drop_rate() == 0.0);
    CHECK(report.imbalance() == 1.0);
  };
  check(report_of(Routing<double>{}));
  const Routing<double> routing = test::route(SoftmaxTopK<double>({.k = 1}), Matrix<double>(0, 3));
  check(report_of(routing));
  CHECK(report_of(routing).load == std::vector<Index>{0, 0, 0});
}

}  // namespace weir::report_test
