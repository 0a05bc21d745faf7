// SPDX-License-Identifier: MIT
#include <stdexcept>
#include <string>

#include <weir/core/meanwhile.hpp>

#include "support/catch.hpp"

namespace weir::meanwhile_test {

TEST_CASE("Work that is offered is done once, by whoever waits or at the end", "[core]") {
  int done = 0;
  const auto count = [&] { ++done; };
  {
    Meanwhile work(count);
    Meanwhile::do_offered();
    CHECK(done == 1);
    Meanwhile::do_offered();
    work.finish();
    CHECK(done == 1);
  }
  {
    Meanwhile work(count);
    work.finish();
    CHECK(done == 2);
    Meanwhile::do_offered();
  }
  Meanwhile::do_offered();  // Nothing is offered any more.
  CHECK(done == 2);
}

TEST_CASE("While offered work is done, the offer around it stands", "[core]") {
  std::string order;
  const auto outer = [&] { order += "outer "; };
  const auto inner = [&] {
    order += "inner( ";
    Meanwhile::do_offered();  // It waits, too.
    order += ") ";
  };
  Meanwhile around(outer);
  {
    Meanwhile within(inner);
    Meanwhile::do_offered();
    within.finish();
  }
  around.finish();
  CHECK(order == "inner( outer ) ");
}

TEST_CASE("An offer ends with its scope, also by an exception", "[core]") {
  int done = 0;
  const auto count = [&] { ++done; };
  try {
    const Meanwhile work(count);
    throw std::runtime_error("before anybody waited");
  } catch (const std::runtime_error&) {
    Meanwhile::do_offered();
  }
  CHECK(done == 0);
}

}  // namespace weir::meanwhile_test
