// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cstdint>
#include <memory>
#include <span>

#include <weir/core/random.hpp>
#include <weir/moe/capacity/adaptive_capacity.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/capacity/fixed_capacity.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/parallel/mpi/global_capacity.hpp>

#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::global_capacity_test {

namespace {

constexpr Index kTokens = 41, kExperts = 6;

static_assert(CapacityPolicy<GlobalCapacity<FixedCapacity>, float>);

std::shared_ptr<Channel> channel() {
  return std::make_shared<Channel>(test::ranks());
}

/// Which tokens are padding: every seventh, of all ranks' tokens.
List<std::uint8_t> mask() {
  List<std::uint8_t> real(kTokens, 1);
  for (Index t = 0; t < kTokens; t += 7) real[t] = 0;
  return real;
}

Routing<double> route(const Matrix<double>& logits, std::span<const std::uint8_t> real) {
  const SoftmaxTopK<double> selector({.k = 2});
  SoftmaxTopK<double>::Cache cache;
  Routing<double> routing;
  Pass pass = kTraining;
  pass.mask = real;
  selector.forward(logits, pass, routing, cache);
  return routing;
}

/// Checks that `policy` keeps of this rank's tokens what it keeps of them in one process.
template <class Policy>
void check(const Policy& policy) {
  const Matrix<double> logits = test::random_matrix(kTokens, kExperts, 8);
  const List<std::uint8_t> real = mask();
  Routing<double> whole = route(logits, real);
  typename Policy::template Cache<double> whole_cache;
  policy.forward(kTraining, whole, whole_cache);
  CHECK(std::count(whole.kept.begin(), whole.kept.end(), 0) > 0);

  const Index first = test::share(test::ranks().rank(), kTokens);
  const Index last = test::share(test::ranks().rank() + 1, kTokens);
  Routing<double> own = route(test::own_rows(logits),
                              std::span(real).subspan(static_cast<std::size_t>(first),
                                                      static_cast<std::size_t>(last - first)));
  const GlobalCapacity<Policy> global(policy, channel());
  typename GlobalCapacity<Policy>::template Cache<double> cache;
  for (int pass = 0; pass < 2; ++pass) {
    own.kept.assign(own.assignments(), 1);
    global.forward(kTraining, own, cache);
    const Index begin = whole.first(first);
    REQUIRE(own.assignments() == whole.first(last) - begin);
    CHECK(std::equal(own.kept.begin(), own.kept.end(), whole.kept.begin() + begin));
  }
}

}  // namespace

TEST_CASE("A GlobalCapacity drops what one process with all tokens drops", "[parallel][mpi]") {
  for (const DropOrder order :
       {DropOrder::kTokenMajor, DropOrder::kRankMajor, DropOrder::kProbability}) {
    check(FixedCapacity({.capacity = 7, .order = order, .scope = Scope::kBatch}));
    check(CapacityFactor({.train = 0.6, .order = order, .scope = Scope::kBatch}));
  }
  check(AdaptiveCapacity<double>({.initial = 1.0, .scope = Scope::kBatch}));
}

TEST_CASE("A GlobalCapacity draws the same random order on all ranks", "[parallel][mpi]") {
  const FixedCapacity policy({.capacity = 7, .order = DropOrder::kRandom, .scope = Scope::kBatch});
  const GlobalCapacity<FixedCapacity> global(policy, channel());
  GlobalCapacity<FixedCapacity>::Cache<double> cache;
  Routing<double> own = route(test::own_rows(test::random_matrix(kTokens, kExperts, 8)), {});
  Rng rng(static_cast<std::uint64_t>(test::ranks().rank()));
  Pass pass = kTraining;
  pass.rng = &rng;
  global.forward(pass, own, cache);
  RowVector<double> kept = RowVector<double>::Zero(kExperts);
  for (Index a = 0; a < own.assignments(); ++a) kept[own.expert[a]] += own.kept[a];
  Channel sums(test::ranks());
  Exchange exchange;
  List<double> all;
  all_gather<double>(sums, exchange, "test",
                     std::span(kept.data(), static_cast<std::size_t>(kExperts)), all);
  for (Index e = 0; e < kExperts; ++e) {
    double of_expert = 0.0;
    for (Index r = 0; r < test::ranks().size(); ++r) of_expert += all[r * kExperts + e];
    CHECK(of_expert <= 7.0);
    CHECK(of_expert >= 6.0);  // Each has more tokens than that.
  }
}

TEST_CASE("A GlobalCapacity refuses what does not fit", "[parallel][mpi]") {
  CHECK(test::message_of<ConfigError>([] {
          const GlobalCapacity<FixedCapacity> none(FixedCapacity(), nullptr);
        }) == "GlobalCapacity: channel = null, expected a Channel");
  using Inside = RenormaliseKept<FixedCapacity>;
  const GlobalCapacity<Inside> wrong(Inside(FixedCapacity({.capacity = 3})), channel());
  GlobalCapacity<Inside>::Cache<double> cache;
  Routing<double> own = route(test::own_rows(test::random_matrix(kTokens, kExperts, 8)), {});
  CHECK(test::message_of<ConfigError>([&] { wrong.forward(kTraining, own, cache); }) ==
        "GlobalCapacity: the policy inside sets the applied weights, expected it around "
        "GlobalCapacity");
}

}  // namespace weir::global_capacity_test
