// SPDX-License-Identifier: MIT
#include <string>

#include <weir/core/pass_record.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"

namespace weir::pass_record_test {

namespace {

LayerReport report_with(Index tokens) {
  LayerReport report;
  report.tokens = tokens;
  return report;
}

}  // namespace

TEST_CASE("A record sums losses and names each by its path", "[core][pass_record]") {
  PassRecord record;
  CHECK(record.aux_loss() == 0.0);
  record.add_loss("z", 0.5);
  {
    const PassRecord::Scope layer(&record, "layers", 3);
    const PassRecord::Scope moe(&record, "moe");
    record.add_loss("switch", 1.0);
    record.add_loss("z", 0.25);
  }
  record.add_loss("switch", 2.0);
  REQUIRE(record.losses().size() == 4);
  CHECK(record.losses()[0].name == "z");
  CHECK(record.losses()[1].name == "layers.3.moe.switch");
  CHECK(record.losses()[3].name == "switch");
  CHECK(record.aux_loss() == 3.75);
  CHECK(record.aux_loss("switch") == 3.0);
  CHECK(record.aux_loss("z") == 0.75);
  CHECK(record.aux_loss("witch") == 0.0);

  record.clear();
  CHECK(record.losses().empty());
  CHECK(record.aux_loss() == 0.0);
}

TEST_CASE("A record collects reports only if asked to", "[core][pass_record]") {
  CHECK_FALSE(PassRecord().wants_reports());
  PassRecord record(PassRecord::Collects::kLossesAndReports);
  CHECK(record.wants_reports());
  record.add_report(report_with(1));
  {
    const PassRecord::Scope scope(&record, "layers", 0);
    record.add_report(report_with(2));
  }
  REQUIRE(record.reports().size() == 2);
  CHECK(record.reports()[0].name.empty());
  CHECK(record.reports()[1].name == "layers.0");
  CHECK(record.reports()[1].report.tokens == 2);
  record.clear();
  CHECK(record.reports().empty());
}

TEST_CASE("What a part collected goes on under the path of the whole", "[core][pass_record]") {
  PassRecord whole(PassRecord::Collects::kLossesAndReports);
  PassRecord part;
  part.restart(&whole);
  CHECK(part.wants_reports());
  {
    const PassRecord::Scope scope(&part, "moe");
    part.add_loss("z", 1.0);
    part.add_report(report_with(5));
  }
  part.add_report(report_with(6));
  {
    const PassRecord::Scope scope(&whole, "experts", 2);
    whole.add(part);
  }
  whole.add(part);
  REQUIRE(whole.losses().size() == 2);
  CHECK(whole.losses()[0].name == "experts.2.moe.z");
  CHECK(whole.losses()[1].name == "moe.z");
  REQUIRE(whole.reports().size() == 4);
  CHECK(whole.reports()[0].name == "experts.2.moe");
  CHECK(whole.reports()[1].name == "experts.2");
  CHECK(whole.reports()[3].name.empty());

  part.restart(nullptr);
  CHECK(part.losses().empty());
  CHECK_FALSE(part.wants_reports());
}

TEST_CASE("A scope without a record does nothing", "[core][pass_record]") {
  const PassRecord::Scope scope(nullptr, "layers", 1);
}

TEST_CASE("A record that is used again allocates nothing", "[core][pass_record]") {
  if (!test::allocations_are_counted()) return;
  PassRecord record;
  const auto pass = [&] {
    record.clear();
    for (Index l = 0; l < 4; ++l) {
      const PassRecord::Scope layer(&record, "layers", l);
      const PassRecord::Scope moe(&record, "a_rather_long_name_of_a_part");
      record.add_loss("switch", 1.0);
    }
  };
  pass();
  CHECK(test::count_allocations(pass) == 0);
}

}  // namespace weir::pass_record_test
