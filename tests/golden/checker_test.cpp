// SPDX-License-Identifier: MIT
#include "golden/checker.hpp"

#include <cstdint>
#include <limits>
#include <sstream>
#include <string>

#include <weir/moe/routing.hpp>

#include "golden/case_file.hpp"
#include "golden/moe_case.hpp"
#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::checker_test {
using namespace weir::golden;
using test::bytes_of;
using test::file_of;

namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

CaseFile small_case() {
  return CaseFile(Safetensors(
      "07_file.safetensors",
      file_of(R"({"__metadata__":{"case":"12b_x","cfg.k":"2","cfg.p":"None","cfg.f":"True",)"
              R"("cfg.c":"0.5","cfg.bad":"2x","cfg.nan":"nan","cfg.activation":"silu, no bias"},)"
              R"("out.y":{"dtype":"F64","shape":[2,1,2],"data_offsets":[0,32]},)"
              R"("out.n":{"dtype":"I64","shape":[2],"data_offsets":[32,48]},)"
              R"("w.a":{"dtype":"F64","shape":[1,2],"data_offsets":[48,64]},)"
              R"("g.a":{"dtype":"F64","shape":[1,2],"data_offsets":[64,80]}})",
              bytes_of<double>({1.0, 2.0, -4.0, 0.0}) + bytes_of<std::int64_t>({5, 6}) +
                  bytes_of<double>({1.0, 1.0}) + bytes_of<double>({0.0, 0.0}))));
}

/// The failures that `action` makes of a checker with tolerance 1e-9.
template <class Action>
int failures_of(Action&& action) {
  CaseFile file = small_case();
  std::ostringstream out;
  Checker checker(file, 1e-9, out);
  action(checker);
  return checker.failures();
}

Matrix<double> reference() {
  Matrix<double> y(2, 2);
  y << 1.0, 2.0, -4.0, 0.0;
  return y;
}

}  // namespace

TEST_CASE("Checker compares numbers relative to the largest one", "[golden][checker]") {
  const auto with = [](double difference) {
    Matrix<double> y = reference();
    y(1, 1) += difference;
    return failures_of([&](Checker& checker) { checker.reals("out.y", y); });
  };
  CHECK(with(0.0) == 0);
  CHECK(with(3.9e-9) == 0);
  CHECK(with(-4.1e-9) == 1);
  CHECK(with(kNan) == 1);

  CHECK(failures_of([](Checker& checker) {
          checker.reals("out.y", Matrix<double>(reference().transpose().reshaped(1, 4)));
        }) == 1);
  CHECK(failures_of([](Checker& checker) { checker.scalar("out.gone", 1.0); }) == 0);
}

TEST_CASE("Checker compares with zero absolutely", "[golden][checker]") {
  const auto with = [](double value) {
    return failures_of(
        [&](Checker& checker) { checker.reals("g.a", Matrix<double>::Constant(1, 2, value)); });
  };
  CHECK(with(1e-17) == 0);
  CHECK(with(1e-8) == 1);
}

TEST_CASE("Checker wants integers to be equal", "[golden][checker]") {
  CHECK(failures_of([](Checker& checker) { checker.integers("out.n", {5, 6}); }) == 0);
  CHECK(failures_of([](Checker& checker) { checker.integers("out.n", {6, 5}); }) == 1);
  CHECK(failures_of([](Checker& checker) { checker.integers("out.n", {5}); }) == 1);
}

TEST_CASE("Checker fails for what nobody looked at", "[golden][checker]") {
  CaseFile file = small_case();
  std::ostringstream out;
  Checker checker(file, 1e-9, out);
  checker.reals("out.y", reference());
  checker.finish();

  CHECK(checker.checks() == 4);
  CHECK(checker.failures() == 3);  // out.n, w.a and g.a
  CHECK(out.str().find("not checked") != std::string::npos);
  CHECK(out.str().find("not used") != std::string::npos);
  CHECK(out.str().find("note: cfg.c = 0.5 is not used") != std::string::npos);
}

TEST_CASE("Checker leaves out what it is told to, and wants some result", "[golden][checker]") {
  CaseFile file = small_case();
  std::ostringstream out;
  Checker checker(file, 1e-9, out);
  checker.leave("out.", "of no interest");
  checker.reals("out.y", 2.0 * reference());
  checker.integers("out.n", {1});
  CHECK(checker.checks() == 0);
  checker.finish();
  CHECK(checker.failures() == 3);  // w.a, g.a, and no results.
  CHECK(out.str().find("out.* is not compared: of no interest") != std::string::npos);
  CHECK(out.str().find("the file has no results") != std::string::npos);
}

TEST_CASE("A case is of training, unless it says otherwise", "[golden][case_file]") {
  const auto training = [](const std::string& metadata) {
    return CaseFile(Safetensors("f", file_of(R"({"__metadata__":{)" + metadata + "}}"))).training();
  };
  CHECK(training(""));
  CHECK(training(R"("cfg.mode":"train")"));
  CHECK_FALSE(training(R"("cfg.mode":"eval")"));
  CHECK_FALSE(training(R"("cfg.training":"False")"));
  CHECK(test::message_of<FileError>([&] { training(R"("cfg.mode":"both")"); }) ==
        "f: cfg.mode = both, expected train or eval");
}

TEST_CASE("CaseFile reads the configuration strictly", "[golden][case_file]") {
  CaseFile file = small_case();
  CHECK(file.family() == 12);
  CHECK(file.size("k") == 2);
  CHECK(file.number("c") == 0.5);
  CHECK(file.flag("f"));
  CHECK(!file.optional_number("p"));
  CHECK(*file.optional_number("c") == 0.5);
  CHECK(file.activation("relu") == "silu");

  CHECK(file.size_or("k", 7) == 2);
  CHECK(file.size_or("p", 7) == 7);  // "None"
  CHECK(file.size_or("gone", 7) == 7);
  CHECK(file.number_or("c", 1.0) == 0.5);
  CHECK(file.number_or("gone", 1.5) == 1.5);
  CHECK(!file.flag_or("gone", false));
  CHECK(file.text_or("gone", "x") == "x");
  CHECK(file.training());
  CHECK(test::message_of<FileError>([&] { file.size("gone"); }) ==
        "07_file.safetensors: the metadata have no cfg.gone");
  CHECK(test::message_of<FileError>([&] { file.size("bad"); }) ==
        "07_file.safetensors: cfg.bad = 2x, expected an integer from 1 to 1000000000");
  CHECK(test::message_of<FileError>([&] { file.number("nan"); }) ==
        "07_file.safetensors: cfg.nan = nan, expected a finite number");
  CHECK(test::message_of<FileError>([&] { file.flag("k"); }) ==
        "07_file.safetensors: cfg.k = 2, expected True or False");
  CHECK(test::message_of<FileError>([&] {
          file.matrix("w.a", {2, 1});
        }) == "07_file.safetensors: tensor 'w.a' is [1, 2], expected [2, 1]");
}

TEST_CASE("A case is named by its metadata, or else by its file", "[golden][case_file]") {
  const auto family = [](const std::string& path, const std::string& header) {
    return CaseFile(Safetensors(path, file_of(header))).family();
  };
  CHECK(family("/7/03b_x.safetensors", "{}") == 3);
  CHECK(family("3", R"({"__metadata__":{"case":"11"}})") == 11);
  CHECK(family("3", R"({"__metadata__":{"case":"x"}})") == 3);
  CHECK(!family("x3", R"({"__metadata__":{"case":"-1"}})"));
}

TEST_CASE("The chosen experts of a token may come in any order", "[golden][checker]") {
  CaseFile file(Safetensors(
      "f", file_of(R"({"out.topk_idx":{"dtype":"I64","shape":[2,2],"data_offsets":[0,32]},)"
                   R"("out.topk_weight":{"dtype":"F64","shape":[2,2],"data_offsets":[32,64]}})",
                   bytes_of<std::int64_t>({2, 0, 1, 1}) + bytes_of<double>({0.3, 0.7, 0.5, 0.5}))));
  std::ostringstream out;
  Checker checker(file, 1e-9, out);
  Routing<double> routing;
  routing.logits.setZero(2, 3);
  routing.offsets = {0, 2, 4};
  routing.weight = {0.7, 0.3, 0.5, 0.5};
  routing.kept = {1, 1, 1, 1};

  // Token 1 of this file has one expert twice, which a router never does, to see that each choice
  // is matched once.
  routing.expert = {0, 2, 1, 1};
  check_top_k(checker, file, routing);
  CHECK(checker.failures() == 0);

  routing.expert = {0, 2, 1, 0};
  check_top_k(checker, file, routing);
  CHECK(checker.failures() == 2);
}

}  // namespace weir::checker_test
