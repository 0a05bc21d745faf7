// SPDX-License-Identifier: MIT
// Random compositions on random, extreme and odd-sized input: what has to hold whatever the parts
// are. The environment variable WEIR_FUZZ_ROUNDS multiplies how many are tried.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include <weir/core/parallel.hpp>
#include <weir/moe/moe_layer.hpp>

#include "support/catch.hpp"
#include "support/every_selector.hpp"
#include "support/matrices.hpp"
#include "support/stages.hpp"
#include "support/threads.hpp"

namespace weir::compositions_fuzz_test {

namespace {

using test::kExperts;
using test::kModel;

Index rounds() {
  const char* const factor = std::getenv("WEIR_FUZZ_ROUNDS");
  return factor == nullptr ? 1 : std::max<Index>(1, std::atol(factor));
}

Index pick(Rng& rng, Index count) {
  return std::min(count - 1, static_cast<Index>(rng.uniform() * static_cast<double>(count)));
}

template <class T>
test::AnyMoe<T> random_layer(Rng& rng, std::string& name) {
  static const auto routers = test::routers<T>();
  static const auto selectors = test::every_selector<T>();
  static const auto capacities = test::capacities<T>();
  static const auto banks = test::banks<T>();
  const auto any_of = [&](const auto& list) -> const auto& {
    const auto& one = list[static_cast<std::size_t>(pick(rng, static_cast<Index>(list.size())))];
    name += one.name + ", ";
    return one;
  };
  const auto& router = any_of(routers);
  const auto& selector = any_of(selectors);
  const auto& capacity = any_of(capacities);
  const auto& bank = any_of(banks);
  const Index variant = pick(rng, 4);
  name += "balancers " + std::to_string(variant);
  test::AnyMoe<T> moe(router.make(rng), selector.make(rng), capacity.make(rng), bank.make(rng),
                      test::balancers<T>(variant, router.name, selector.name));
  // Logits that are all alike, or hundreds apart.
  const T factor =
      static_cast<T>(std::pow(10.0, pick(rng, 4) == 0 ? 6.0 * rng.uniform() - 3 : 0.0));
  for (const auto& [path, parameter] : parameters(moe)) {
    if (path.starts_with("router.")) parameter->value *= factor;
  }
  return moe;
}

/// The circumstances of a pass, and its tokens.
template <class T>
struct Situation {
  Matrix<T> x;
  Sequences sequences = {};
  std::vector<std::uint8_t> mask, allowed;

  Pass pass(bool training, Rng* rng, PassRecord* record) const {
    return {.training = training,
            .sequences = &sequences,
            .mask = mask,
            .allowed = allowed,
            .rng = rng,
            .record = record};
  }
  bool is_padding(Index t) const { return !mask.empty() && mask[static_cast<std::size_t>(t)] == 0; }
};

template <class T>
Situation<T> random_situation(Rng& rng) {
  Situation<T> s;
  std::vector<Index> lengths(static_cast<std::size_t>(1 + pick(rng, 3)));
  Index tokens = 0;
  for (Index& length : lengths) {
    length = pick(rng, 4) == 0 ? 0 : pick(rng, 8);
    tokens += length;
  }
  s.sequences = Sequences(lengths);
  // From numbers that underflow when squared to numbers that overflow.
  const double scale = std::pow(
      10.0, std::is_same_v<T, float> ? 24.0 * rng.uniform() - 20.0 : 180.0 * rng.uniform() - 160.0);
  const double usual = pick(rng, 2) == 0 ? 1.0 : scale;
  s.x = normal_init<T>(tokens, kModel, usual, rng);
  if (tokens > 0 && pick(rng, 3) == 0) s.x.row(pick(rng, tokens)).setZero();
  if (tokens > 1 && pick(rng, 3) == 0) s.x.row(0) = s.x.row(tokens - 1);
  if (pick(rng, 2) == 0) {
    s.mask.resize(static_cast<std::size_t>(tokens));
    for (auto& m : s.mask) m = pick(rng, 3) == 0 ? 0 : 1;
    for (Index t = 0; t < tokens; ++t) {
      if (s.is_padding(t)) s.x.row(t).setConstant(std::numeric_limits<T>::quiet_NaN());
    }
  }
  const Index restriction = pick(rng, 4);
  if (restriction < 2) {
    // At most one expert is forbidden: no selector here chooses more than three.
    s.allowed.assign(static_cast<std::size_t>((restriction == 0 ? 1 : tokens) * kExperts), 1);
    for (std::size_t row = 0; row * kExperts < s.allowed.size(); ++row) {
      s.allowed[row * kExperts + static_cast<std::size_t>(pick(rng, kExperts))] = 0;
    }
  }
  return s;
}

/// The bits of everything that a pass forward and, in training, back gives; or the message of the
/// documented exception that ended it.
template <class T>
struct Outcome {
  std::string error;
  Matrix<T> y, dx;
  double aux_loss = 0.0;
  std::vector<double> report;
  std::vector<Matrix<T>> gradients;

  bool operator==(const Outcome& o) const {
    if (error != o.error || y != o.y || dx != o.dx || aux_loss != o.aux_loss) return false;
    if (report != o.report) return false;
    for (std::size_t i = 0; i < gradients.size(); ++i) {
      if (gradients[i] != o.gradients[i]) return false;
    }
    return gradients.size() == o.gradients.size();
  }
};

template <class T>
Outcome<T> run(test::AnyMoe<T> moe, const Situation<T>& s, bool training,
               typename test::AnyMoe<T>::Cache& cache) {
  Outcome<T> outcome;
  Rng rng(7);
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  try {
    outcome.y = moe.forward(s.x, s.pass(training, &rng, &record), cache);
    outcome.aux_loss = record.aux_loss();
    for (const auto& [path, report] : record.reports()) {
      for (const auto* const counts : {&report.load, &report.kept}) {
        outcome.report.insert(outcome.report.end(), counts->begin(), counts->end());
      }
      outcome.report.insert(outcome.report.end(), report.weight.begin(), report.weight.end());
      outcome.report.push_back(report.entropy);
      outcome.report.push_back(static_cast<double>(report.dropped));
      outcome.report.push_back(static_cast<double>(report.dropped_tokens));
    }
    if (!training) return outcome;
    outcome.dx = moe.backward(Matrix<T>::Ones(s.x.rows(), kModel), cache);
    for (const auto& [name, parameter] : parameters(moe)) {
      outcome.gradients.push_back(parameter->grad);
    }
  } catch (const NonFiniteError& e) {
    outcome.error = e.what();
  }
  return outcome;
}

template <class T>
void check_sound(const Outcome<T>& o, const Situation<T>& s) {
  if (!o.error.empty()) return;
  CHECK(o.y.rows() == s.x.rows());
  CHECK(std::isfinite(o.aux_loss));
  for (Index t = 0; t < s.x.rows(); ++t) {
    INFO("token " << t);
    if (s.is_padding(t)) {
      CHECK(o.y.row(t).isZero(0.0));
      if (o.dx.size() > 0) CHECK(o.dx.row(t).isZero(0.0));
    }
  }
}

/// Whether all numbers are far enough from overflow for products of three of them to be finite.
template <class T>
bool is_tame(const Situation<T>& s) {
  const double limit = std::is_same_v<T, float> ? 1e3 : 1e20;
  for (Index t = 0; t < s.x.rows(); ++t) {
    if (!s.is_padding(t) && !(static_cast<double>(s.x.row(t).cwiseAbs().maxCoeff()) < limit)) {
      return false;
    }
  }
  return true;
}

/// Whether no stage of the layer of that name looks at other tokens, or draws in inference.
bool is_token_wise(const std::string& name) {
  return name.find(", dropless, ") != std::string::npos &&
         name.find("batch:") == std::string::npos && name.find("sampled") == std::string::npos &&
         name.find("masked") == std::string::npos;
}

/// A token by itself gets what it gets among others.
template <class T>
void check_tokens_alone(const test::AnyMoe<T>& moe, const Situation<T>& s, const Matrix<T>& y) {
  for (Index t = 0; t < s.x.rows(); ++t) {
    if (s.is_padding(t)) continue;
    Situation<T> alone;
    alone.x = s.x.row(t);
    alone.sequences = Sequences({1});
    const bool each = static_cast<Index>(s.allowed.size()) > kExperts;
    if (!s.allowed.empty()) {
      const auto from = s.allowed.begin() + (each ? t * kExperts : 0);
      alone.allowed.assign(from, from + kExperts);
    }
    typename test::AnyMoe<T>::Cache cache;
    const Outcome<T> outcome = run(moe, alone, false, cache);
    INFO("token " << t);
    CHECK(test::relative_error(outcome.y, y.row(t)) < (std::is_same_v<T, float> ? 1e-4 : 1e-12));
  }
}

}  // namespace

TEMPLATE_TEST_CASE("Random compositions are sound on whatever they get",
                   "[moe][compositions][fuzz]", float, double) {
  using T = TestType;
  const Index count = 400 * rounds();
  for (Index i = 0; i < count; ++i) {
    Rng rng(static_cast<std::uint64_t>(i));
    std::string name;
    const test::AnyMoe<T> moe = random_layer<T>(rng, name);
    Situation<T> situation = random_situation<T>(rng);
    // It refuses forbidden experts in training, and says so.
    const bool refuses = name.find("balanced_assignment") != std::string::npos;
    if (refuses) situation.allowed.clear();
    Situation<T> other = random_situation<T>(rng);
    if (refuses) other.allowed.clear();
    INFO("seed " << i << ": " << name);
    for (const bool training : {false, true}) {
      INFO((training ? "training" : "inference"));
      typename test::AnyMoe<T>::Cache cache;
      const Outcome<T> outcome = run(moe, situation, training, cache);
      check_sound(outcome, situation);
      if (is_tame(situation)) {
        INFO(outcome.error);
        CHECK(outcome.error.empty());
        CHECK(outcome.y.allFinite());
        CHECK(outcome.dx.allFinite());
        for (const Matrix<T>& gradient : outcome.gradients) CHECK(gradient.allFinite());
        if (!training && is_token_wise(name)) check_tokens_alone(moe, situation, outcome.y);
      }
      // The cache serves again, after an exception and after other tokens, and any number of
      // threads gives these bits.
      if (outcome.y.allFinite() && outcome.dx.allFinite()) {
        run(moe, other, training, cache);
        const test::Threads two(2);
        CHECK(run(moe, situation, training, cache) == outcome);
      }
    }
  }
}

TEMPLATE_TEST_CASE("Compositions refuse a token that is not finite, and go on",
                   "[moe][compositions][fuzz]", float, double) {
  using T = TestType;
  const T bad = GENERATE(std::numeric_limits<TestType>::quiet_NaN(),
                         std::numeric_limits<TestType>::infinity());
  for (Index i = 0; i < 100 * rounds(); ++i) {
    Rng rng(static_cast<std::uint64_t>(i));
    std::string name;
    const test::AnyMoe<T> moe = random_layer<T>(rng, name);
    Situation<T> situation;
    situation.x = normal_init<T>(5, kModel, 1.0, rng);
    situation.sequences = Sequences({5});
    INFO("seed " << i << ": " << name);
    typename test::AnyMoe<T>::Cache cache;
    const Outcome<T> before = run(moe, situation, true, cache);
    CHECK(before.error.empty());
    Situation<T> broken = situation;
    broken.x(pick(rng, 5), pick(rng, kModel)) = bad;
    CHECK_FALSE(run(moe, broken, true, cache).error.empty());
    CHECK(run(moe, situation, true, cache) == before);
  }
}

}  // namespace weir::compositions_fuzz_test
