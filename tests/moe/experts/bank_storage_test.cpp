// SPDX-License-Identifier: MIT
// What set_storage promises of banks where memory runs out.
#include <string>
#include <vector>

#include <weir/core/storage.hpp>
#include <weir/moe/experts/clamped_glu_bank.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::bank_storage_test {

namespace {

constexpr Storage kStorages[] = {Storage::kTrainable, Storage::kPacked, Storage::kBfloat16,
                                 Storage::kFp8};

template <class Bank>
Matrix<double> output(const Bank& bank) {
  Dispatch<double> dispatch;
  dispatch.build(test::route(TopKSoftmax<double>({.k = 2}), test::random_matrix(6, 3, 2)));
  typename Bank::Cache cache;
  return bank.forward(test::random_matrix(6, 4, 1), dispatch, {}, cache);
}

/// Lets memory run out at each allocation of each change of storage.
template <class Bank>
void check_bank(const Bank& original) {
  for (const Storage from : kStorages) {
    for (const Storage to : kStorages) {
      if (from == to) continue;
      Bank bank = original;
      bank.set_storage(from);
      const Matrix<double> before = output(bank);
      const auto names = [&] {
        std::vector<std::string> found;
        for (const auto& [name, parameter] : parameters(bank)) found.push_back(name);
        return found;
      };
      const std::vector<std::string> names_before = names();
      long failures = 0;
      while (test::runs_out_of_memory(failures + 1, [&] { bank.set_storage(to); })) {
        ++failures;
        REQUIRE(bank.storage() == from);
        REQUIRE(names() == names_before);
        REQUIRE(output(bank) == before);
      }
      CHECK((failures > 0 || !test::allocations_are_counted()));
      CHECK(bank.storage() == to);
      if (to == Storage::kTrainable) CHECK(parameters(bank).size() >= names_before.size());
      const bool exact = to == Storage::kTrainable || to == Storage::kPacked;
      if (exact) CHECK(test::relative_error(output(bank), before) < 1e-14);
    }
  }
}

}  // namespace

TEST_CASE("A bank whose change of storage runs out of memory is as before",
          "[moe][experts][storage]") {
  Rng rng(1);
  check_bank(GluBank<double>(4, 3, 5, rng));
  check_bank(MlpBank<double>(4, 3, 5, rng, {.bias = true}));
  check_bank(ClampedGluBank<double>(4, 3, 5, rng));
}

}  // namespace weir::bank_storage_test
