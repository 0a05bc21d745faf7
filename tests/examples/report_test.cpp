// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <weir/analysis/traced_tokens.hpp>

#include "../../examples/live_report.hpp"
#include "support/catch.hpp"

namespace weir::report_test {

namespace {

/// One layer with these experts for each of some tokens, each token with two.
TracedTokens tokens_of(Index tokens, Index layers, Index experts) {
  TracedTokens traced;
  traced.domains = {"a"};
  for (Index l = 0; l < layers; ++l) {
    traced.layers.push_back({.name = "layers." + std::to_string(l), .experts = experts});
    for (Index t = 0; t < tokens; ++t) {
      traced.layers.back().add({t % experts, (t + 1) % experts, (t + 2) % experts});
    }
  }
  for (Index t = 0; t < tokens; ++t) {
    traced.position.push_back(t);
    traced.id.push_back(t % 7);
  }
  traced.sequences.push_back({0, 0, 0, tokens});
  return traced;
}

}  // namespace

TEST_CASE("A layer that collapses is called so", "[examples][report]") {
  CHECK(collapse_warnings("l", {10, 10, 10, 10}, 20).empty());
  CHECK(collapse_warnings("l", {}, 0).empty());
  CHECK(collapse_warnings("l", {0, 0}, 0).empty());
  CHECK(effective_experts({1, 1, 1, 1}) == Approx(4.0));
  const auto says = collapse_warnings("layers.1.moe", {97, 1, 1, 1}, 100);
  REQUIRE(says.size() == 1);
  CHECK(says[0].kind == "bad");
  CHECK(
      says[0].text.starts_with("layers.1.moe is collapsing: its tokens spread over about 1.2 of "
                               "4 experts, and expert 0 has 97 % of them."));
  const auto dead = collapse_warnings("l", {50, 50, 50, 0}, 75);
  REQUIRE(dead.size() == 1);
  CHECK(dead[0].text == "l: 1 of 4 experts get no token: 3");
  CHECK(collapse_warnings("l", {2, 1, 1, 0}, 4).empty());  // Four tokens leave some out by chance.
}

TEST_CASE("Nothing of a text can leave its place in a page", "[examples][report]") {
  const report::Json data = {{"title", "a<b>\"&"},
                             {"facts", report::Json::array({{"x", "</dd>"}})},
                             {"domains", report::Json::array()},
                             {"tokens", "</script><script>alert(1)</script><!--"}};
  const std::string page = report::page(data);
  CHECK(page.find("alert(1)</script>") == std::string::npos);
  CHECK(page.find("<title>a&lt;b&gt;&quot;&amp;</title>") != std::string::npos);
  CHECK(page.find("&lt;/dd&gt;") != std::string::npos);
  CHECK(page.find("http-equiv=\"refresh\"") == std::string::npos);
  CHECK(report::page(data, 10).find("content=\"10\"") != std::string::npos);
  CHECK(report::in_script("\xff<") == "\"\xEF\xBF\xBD\\u003c\"");
}

TEST_CASE("Numbers of a report have four digits", "[examples][report]") {
  CHECK(report::number(0.123456).dump() == "0.1235");
  CHECK(report::number(123456.0).dump() == "123500");
  CHECK(report::number(0.0).dump() == "0");
  CHECK(report::number(std::numeric_limits<double>::quiet_NaN()).is_null());
  CHECK(report::number(-2.0).dump() == "-2");
  report::Table table;
  table.add("m", "share", "l", "a,b", "3", {.value = 0.5, .chance = 0.25});
  CHECK(
      table.text() ==
      "model,statistic,layer,group,expert,value,low,high,chance\nm,share,l,\"a,b\",3,0.5,,,0.25\n");
}

TEST_CASE("Base64", "[examples][report]") {
  CHECK(report::base64({}).empty());
  CHECK(report::base64({'M'}) == "TQ==");
  CHECK(report::base64({'M', 'a'}) == "TWE=");
  CHECK(report::base64({'M', 'a', 'n'}) == "TWFu");
}

TEST_CASE("Routes fit into the bytes that they may have", "[examples][report]") {
  const TracedTokens traced = tokens_of(100, 6, 5);
  const auto bytes = [](const report::Json& routes) {
    std::size_t sum = 0;
    for (const auto& data : routes["data"]) sum += data.get<std::string>().size();
    return sum;
  };
  const report::Json all = report::routes_json(traced, 1U << 20U);
  CHECK(all["k"] == 3);
  CHECK(all["layers"].size() == 6);
  CHECK(bytes(all) == 6 * 800);
  CHECK(all["data"][0].get<std::string>().starts_with("ACoBKgIq"));  // Thirds: 42 of 126.
  const report::Json fewer = report::routes_json(traced, 3500);
  CHECK(fewer["k"] == 2);
  CHECK(fewer["layers"].size() == 6);
  const report::Json least = report::routes_json(traced, 1200);
  CHECK(least["layers"] == report::Json::array({0, 3}));
  CHECK(bytes(least) <= 1200);
}

TEST_CASE("A long curve becomes one of means", "[examples][report]") {
  report::Curves curves;
  for (Index step = 1; step <= 1000; ++step) {
    curves.add("loss", static_cast<double>(step));
    if (step == 900) curves.add("late", 7.0);
    curves.add("never", std::nan(""));
    curves.end_step(step);
  }
  CHECK(curves.steps().size() < 400);
  CHECK(curves.steps().size() >= 200);
  const report::Json loss = curves.of("loss");
  REQUIRE(loss.size() == curves.steps().size());
  CHECK(loss[0].get<double>() == Approx((curves.steps()[0] + 1.0) / 2.0));
  const report::Json late = curves.of("late");
  REQUIRE(late.size() == loss.size());
  CHECK(late[0].is_null());
  CHECK(std::count(late.begin(), late.end(), report::Json(7)) == 1);
  CHECK(curves.names("l") == std::vector<std::string>{"ate", "oss"});
  CHECK(curves.of("never").size() == loss.size());

  // What waits for neighbours is not lost in the end.
  curves.add("late", 9.0);
  curves.end_step(1001);
  CHECK(curves.steps().back() < 1001.0);
  curves.finish(1001);
  CHECK(curves.steps().back() == 1001.0);
  CHECK(curves.of("late").back() == report::Json(9));
}

}  // namespace weir::report_test
