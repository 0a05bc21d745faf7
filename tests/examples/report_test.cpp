// SPDX-License-Identifier: MIT
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <weir/analysis/traced_tokens.hpp>

#include "../../examples/live_report.hpp"
#include "../../examples/pieces.hpp"
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

std::size_t bytes_of(const report::Json& routes) {
  std::size_t sum = 0;
  for (const auto& data : routes["data"]) sum += data.get<std::string>().size();
  return sum;
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
  std::vector<report::Model> models = {{"a", tokens_of(100, 6, 5)}};
  const auto routes_in = [&](std::size_t bytes) {
    return report::routes_json(models[0].tokens, report::route_layout(models, bytes));
  };
  const report::Json all = routes_in(1U << 20U);
  CHECK(all["k"] == 3);
  CHECK(all["layers"].size() == 6);
  CHECK(bytes_of(all) == 6 * 800);
  CHECK(all["data"][0].get<std::string>().starts_with("ACoBKgIq"));  // Thirds: 42 of 126.
  const report::Json fewer = routes_in(3500);
  CHECK(fewer["k"] == 2);
  CHECK(fewer["layers"].size() == 6);
  const report::Json least = routes_in(1200);
  CHECK(least["layers"] == report::Json::array({0, 3}));
  CHECK(bytes_of(least) <= 1200);
}

TEST_CASE("Two models of different k have the same layers on a page", "[examples][report]") {
  std::vector<report::Model> models = {{"a", tokens_of(100, 6, 5)}, {"b", tokens_of(100, 6, 300)}};
  TracedLayer& layer = models[1].tokens.layers[2];
  layer = {.name = layer.name, .experts = layer.experts};
  for (Index t = 0; t < 100; ++t) layer.add({299, 1, 2, 3, 4});
  for (const std::size_t most : {2000U, 6000U, 1U << 20U}) {
    const report::RouteLayout layout = report::route_layout(models, most);
    const report::Json a = report::routes_json(models[0].tokens, layout);
    const report::Json b = report::routes_json(models[1].tokens, layout);
    CHECK(a["layers"] == b["layers"]);
    CHECK(a["k"] == b["k"]);
    CHECK(bytes_of(a) == bytes_of(b));  // Numbers above 255 in one: two bytes in both.
    CHECK(bytes_of(a) + bytes_of(b) <= most);
  }
  CHECK(report::route_layout(models, 1U << 20U).k == 5);
}

TEST_CASE("A page has less than the file, where there is no room", "[examples][report]") {
  const std::vector<report::Model> models = {{"a", tokens_of(40, 4, 40)}};
  report::Options how;
  how.bootstrap.replicates = 0;
  how.matrix_bytes = 25'000;
  how.links = 60;
  report::Table table;
  const MakeText text = [] { return std::make_unique<Bytes>(); };
  const report::Json full = report::describe(models, text, how, table);
  const report::Json page = report::for_page(full, models, how);
  CHECK(full["models"][0]["flow"][0]["links"].size() == 40);
  CHECK(full["models"][0]["flow"][0]["shown"] == 1);
  CHECK(page["models"][0]["flow"][0]["links"].size() == 32);
  CHECK(page["models"][0]["flow"][0]["shown"] == 0.8);
  CHECK(page["models"][0]["flow"][0]["total"] == 40);
  for (std::size_t l = 0; l < 4; ++l) {
    CHECK(full["models"][0]["together"][l]["value"].size() == 1600);
    CHECK(page["models"][0]["together"][l].is_null() == (l % 2 == 1));
  }
  const report::Json& kept = page["models"][0]["together"][2];
  CHECK(kept["scale"] == 1);
  CHECK(kept["data"].get<std::string>().size() == (1600 * 5 + 2) / 3 * 4);
  CHECK(page["models"][0]["load"] == full["models"][0]["load"]);
  CHECK(page["models"][0]["text"] == full["models"][0]["text"]);
}

TEST_CASE("A matrix has four numbers of ten bits each", "[examples][report]") {
  const report::Json lists = report::lists_of({{0.5, 0.25, 0.511, 0.125}, {.value = 0.0}});
  CHECK(lists["high"] == report::Json::array({0.511, nullptr}));
  const report::Json packed = report::packed(lists);
  CHECK(packed["scale"] == 0.511);
  // 1000, 500, 1022 and 250 of 1022; 0 and three that are not known.
  CHECK(packed["data"] ==
        report::base64({0xE8, 0xD3, 0xE7, 0xBF, 0x3E, 0x00, 0xFC, 0xFF, 0xFF, 0xFF}));
  CHECK(report::packed(report::lists_of({}))["data"] == "");
  CHECK(report::packed(report::lists_of({{.value = 0.0}}))["scale"] == 0);
}

TEST_CASE("A page stays small whatever the model", "[examples][report]") {
  std::vector<report::Model> models = {{"a", tokens_of(2000, 12, 64)}};
  report::Options how;
  how.bootstrap.replicates = 0;
  how.matrix_bytes = how.position_bytes = how.top_bytes = how.domain_bytes = 20'000;
  how.text_bytes = 50'000;
  how.links = 300;
  report::Table table;
  const report::Json full = report::describe(
      models, [] { return std::make_unique<Bytes>(); }, how, table);
  const report::Json page = report::for_page(full, models, how);
  for (const char* const key : {"together", "top", "domain"}) {
    const report::Json& json = page["models"][0][key];
    CHECK_FALSE(json[0].is_null());  // Of all layers there is the first.
    CHECK(json[1].is_null());
    CHECK(json.dump().size() < 30'000);
    CHECK_FALSE(full["models"][0][key][1].is_null());
  }
  CHECK(page["models"][0]["position"]["share"].dump().size() < 20'100);
  CHECK(page.dump().size() < 400'000);
}

TEST_CASE("Models with other experts stand side by side", "[examples][report]") {
  std::vector<report::Model> models = {{"a", tokens_of(30, 2, 4)}, {"b", tokens_of(30, 2, 4)}};
  models[1].tokens.layers[1] = tokens_of(30, 1, 6).layers[0];
  models[1].tokens.layers[0].name = "other.0";
  report::Options how;
  how.bootstrap.replicates = 0;
  report::Table table;
  const report::Json data = report::describe(
      models, [] { return std::make_unique<Bytes>(); }, how, table);
  REQUIRE(data["overlap"].size() == 2);
  CHECK(data["overlap"][0]["first"][0] == 1);
  CHECK(data["overlap"][1].is_null());
  CHECK(table.text().find("a / b,overlap_first,layers.0,all,,1,") != std::string::npos);
  CHECK(data["says"].back()[1] ==
        "The two models choose the same first expert for 100 % of the tokens (by chance 25.0 %).");
}

TEST_CASE("Pieces of a text begin with whole lines, words, numbers and characters",
          "[examples][report]") {
  CHECK(piece_begin("one two\nthree", 0) == 0);
  CHECK(piece_begin("one two\nthree", 2) == 8);
  CHECK(piece_begin("one two three", 5) == 8);
  CHECK(piece_begin("one two three", 4) == 4);  // Right behind a space.
  CHECK(piece_begin("onetwothree", 5) == 5);
  CHECK(piece_begin("ab\xC3\xA4", 3) == 4);
  CHECK(piece_of("12 345 678", 0, 8) == "12 345");
  CHECK(piece_of("12 345 678", 3, 50) == "345 678");
  std::string numbers;
  for (int id = 10'000; id < 13'000; ++id) numbers += std::to_string(id) + " ";
  for (const Index context : {1, 7, 64}) {
    const Pieces pieces = pieces_of({{"a", numbers}, {"b", numbers}}, Numbers(), 500, context);
    CHECK(pieces.tokens <= 500);
    CHECK(pieces.tokens >= 380);  // Whole pieces.
    for (const Pieces::Piece& piece : pieces.all) {
      for (std::size_t i = 0; i < piece.ids.size(); ++i) {
        CHECK(piece.ids[i] == piece.ids[0] + static_cast<Index>(i));
        CHECK((piece.ids[i] >= 10'000 && piece.ids[i] < 13'000));
      }
    }
  }
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
