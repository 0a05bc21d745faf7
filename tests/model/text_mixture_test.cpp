// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>
#include <vector>

#include <weir/model/text_mixture.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::text_mixture_test {

namespace {

using Weights = std::vector<double>;

std::vector<TextWindow> draw(TextMixture& mixture, Index count) {
  std::vector<TextWindow> windows;
  for (Index i = 0; i < count; ++i) windows.push_back(mixture.next());
  return windows;
}

}  // namespace

TEST_CASE("TextMixture draws texts in proportion to their weights", "[model][mixture]") {
  for (const Weights& weights : {Weights{0.7, 0.3}, Weights{5, 2, 1}, Weights{1, 1, 1, 1},
                                 Weights{0.9, 0.05, 0.03, 0.02}, Weights{3}}) {
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    TextMixture mixture(std::vector<Index>(weights.size(), 1000), {{0, weights}}, {.length = 10});
    for (Index n = 1; n <= 500; ++n) {
      mixture.next();
      for (std::size_t i = 0; i < weights.size(); ++i) {
        const double share = static_cast<double>(n) * weights[i] / sum;
        const auto drawn = static_cast<double>(mixture.drawn(static_cast<Index>(i)));
        REQUIRE(drawn < share + 1.0);
        REQUIRE(drawn > share - 1.5);
      }
    }
  }
}

TEST_CASE("TextMixture draws the text that is furthest behind", "[model][mixture]") {
  // By hand: shares 2/3 and 1/3 after one draw, 4/3 and 2/3, 2 and 1: A, then B (2/3 behind against
  // 1/3), then A.
  TextMixture mixture({100, 100}, {{0, {2, 1}}}, {.length = 5});
  std::vector<Index> texts;
  for (const TextWindow& window : draw(mixture, 6)) texts.push_back(window.text);
  CHECK(texts == std::vector<Index>{0, 1, 0, 0, 1, 0});
}

TEST_CASE("TextMixture changes its weights where a phase begins", "[model][mixture]") {
  TextMixture mixture({500, 500, 500}, {{0, {0.75, 0.25, 0}}, {80, {0, 0.5, 0.5}}, {90, {0, 0, 1}}},
                      {.length = 7});
  CHECK(mixture.phase() == 0);
  draw(mixture, 80);
  CHECK(mixture.phase() == 1);
  CHECK(mixture.drawn(0) == 60);
  CHECK(mixture.drawn(1) == 20);
  CHECK(mixture.drawn(2) == 0);
  draw(mixture, 10);
  CHECK(mixture.phase() == 2);
  CHECK(mixture.drawn(0) == 60);
  CHECK(mixture.drawn(1) == 25);
  CHECK(mixture.drawn(2) == 5);
  draw(mixture, 30);
  CHECK(mixture.drawn(2) == 35);
  CHECK(mixture.drawn(1) == 25);
}

TEST_CASE("TextMixture draws each window of a text once in an epoch", "[model][mixture]") {
  constexpr Index kLength = 10;
  for (const Index size : {11, 12, 20, 21, 105, 1003}) {
    TextMixture mixture({size, 50}, {{0, {0.6, 0.4}}}, {.length = kLength, .seed = 3});
    std::set<Index> shifts;
    std::vector<Index> starts;
    Index epoch = 0;
    for (int n = 0; n < 1500; ++n) {
      const TextWindow window = mixture.next();
      if (window.text != 0) continue;
      if (window.epoch != epoch) {
        // The epoch that ends has covered the text, but for less than a window at either end.
        std::sort(starts.begin(), starts.end());
        REQUIRE(starts.front() < kLength);
        REQUIRE(starts.back() + 2 * kLength >= size - 1);
        for (std::size_t i = 1; i < starts.size(); ++i) {
          REQUIRE(starts[i] == starts[i - 1] + kLength);
        }
        shifts.insert(starts.front());
        starts.clear();
        REQUIRE(window.epoch == ++epoch);
      }
      REQUIRE(window.start >= 0);
      REQUIRE(window.start + kLength < size);
      starts.push_back(window.start);
    }
    CHECK(static_cast<Index>(shifts.size()) <= std::min(kLength, size - kLength));
    if (size < 200) CHECK(static_cast<Index>(shifts.size()) == std::min(kLength, size - kLength));
  }
}

TEST_CASE("TextMixture takes the windows of an epoch in a random order", "[model][mixture]") {
  TextMixture mixture({10001}, {{0, {1}}}, {.length = 10, .seed = 1});
  const std::vector<TextWindow> first = draw(mixture, 500);
  CHECK_FALSE(std::is_sorted(first.begin(), first.end(),
                             [](const auto& a, const auto& b) { return a.start < b.start; }));
  TextMixture other({10001}, {{0, {1}}}, {.length = 10, .seed = 2});
  CHECK(draw(other, 500) != first);
  // Half an epoch has seen both halves of the text equally: 250 with a deviation below 11.
  const auto early =
      std::count_if(first.begin(), first.end(), [](const TextWindow& w) { return w.start < 5000; });
  CHECK(std::abs(static_cast<double>(early) - 250.0) < 45.0);
}

TEST_CASE("TextMixture goes on from any position", "[model][mixture]") {
  const std::vector<MixturePhase> phases = {{0, {0.7, 0.2, 0.1}}, {33, {0.1, 0.1, 0.8}}};
  const std::vector<Index> sizes = {60, 300, 41};
  const TextMixtureConfig config{.length = 8, .seed = 7};
  TextMixture whole(sizes, phases, config);
  const std::vector<TextWindow> all = draw(whole, 200);
  for (const Index position : {0, 1, 32, 33, 34, 150, 200}) {
    TextMixture resumed(sizes, phases, config);
    resumed.seek(position);
    CHECK(resumed.position() == position);
    const std::vector<TextWindow> rest = draw(resumed, 200 - position);
    CHECK(std::equal(rest.begin(), rest.end(), all.begin() + position, all.end()));
    resumed.seek(position);  // Backwards, too.
    CHECK(draw(resumed, 200 - position) == rest);
    CHECK(resumed.epochs(0) == whole.epochs(0));
    CHECK(resumed.drawn(2) == whole.drawn(2));
  }
}

TEST_CASE("TextMixture knows texts of any length", "[model][mixture]") {
  constexpr Index kHuge = Index{1} << 50;
  TextMixture mixture({kHuge, 9}, {{0, {1e9, 1e-9}}}, {.length = 8});
  Index farthest = 0;
  for (const TextWindow& window : draw(mixture, 100)) farthest = std::max(farthest, window.start);
  CHECK(farthest > kHuge / 2);
  CHECK(farthest + 8 < kHuge);
  CHECK(mixture.drawn(1) == 0);
  CHECK(mixture.epochs(1) == 0.0);
  CHECK(mixture.epochs(0) == Approx(100.0 * 8.0 / static_cast<double>(kHuge)));
}

TEST_CASE("TextMixture says what does not fit", "[model][mixture]") {
  const auto message = [](const std::vector<Index>& sizes, const std::vector<MixturePhase>& phases,
                          Index length = 4) {
    return test::message_of<ConfigError>([&] { TextMixture(sizes, phases, {.length = length}); });
  };
  CHECK(message({}, {{0, {}}}) == "TextMixture: there are no sizes, expected one per text");
  CHECK(message({9}, {{0, {1}}}, 0) == "TextMixture: length = 0, expected >= 1");
  CHECK(message({9, 4}, {{0, {1, 1}}}) ==
        "TextMixture: sizes[1] = 4, expected a window and one token more, length = 4");
  CHECK(message({0}, {{0, {1}}}) ==
        "TextMixture: sizes[0] = 0, expected a window and one token more, length = 4");
  CHECK(message({9}, {}) == "TextMixture: no phase begins at 0, expected the first to");
  CHECK(message({9}, {{1, {1}}}) == "TextMixture: no phase begins at 0, expected the first to");
  CHECK(message({9}, {{0, {1}}, {0, {1}}}) ==
        "TextMixture: phases[1].from = 0, expected more than that of the phase before, 0");
  CHECK(message({9}, {{0, {1, 2}}}) ==
        "TextMixture: phases[0] has 2 weights, expected 1 (one per text)");
  CHECK(message({9, 9}, {{0, {1, -1}}}) ==
        "TextMixture: phases[0].weights[1] = -1, expected a finite number >= 0");
  CHECK(message({9}, {{0, {std::nan("")}}}) ==
        "TextMixture: phases[0].weights[0] = nan, expected a finite number >= 0");
  CHECK(message({9, 9}, {{0, {1, 0}}, {5, {0, 0}}}) ==
        "TextMixture: the sum of phases[1].weights = 0, expected a finite number > 0");
  CHECK(message({9, 9}, {{0, {1e308, 1e308}}}) ==
        "TextMixture: the sum of phases[0].weights = inf, expected a finite number > 0");
  TextMixture mixture({9}, {{0, {1}}}, {.length = 8});
  CHECK(test::message_of<ConfigError>([&] { mixture.seek(-1); }) ==
        "TextMixture::seek: position = -1, expected >= 0");
  CHECK(mixture.next() == TextWindow{0, 0, 0});
  CHECK(mixture.next() == TextWindow{0, 0, 1});
}

}  // namespace weir::text_mixture_test
