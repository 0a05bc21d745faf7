// SPDX-License-Identifier: MIT
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/io/gguf.hpp>

#include "io/gguf_file.hpp"
#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::gguf_test {
using namespace weir::io;
using test::bytes_of;
using test::gguf_array;
using test::gguf_entry;
using test::gguf_file;
using test::gguf_tensor;
using test::gguf_text;

namespace {

constexpr std::uint64_t kHuge = std::numeric_limits<std::uint64_t>::max();

/// What the reader says about a file of these bytes.
std::string complaint(const std::string& bytes) {
  return test::message_of<FileError>([&] { Gguf("f", bytes); });
}

/// What it says about these tensors and 64 bytes of data.
std::string complaint_about(const std::vector<std::string>& tensors) {
  return complaint(gguf_file({}, tensors, std::string(64, '\0')));
}

std::string start(std::uint32_t version, std::uint64_t tensors, std::uint64_t entries) {
  return "GGUF" + bytes_of<std::uint32_t>({version}) + bytes_of<std::uint64_t>({tensors, entries});
}

std::string message(const std::function<void()>& action) {
  return test::message_of<FileError>(action);
}

}  // namespace

TEST_CASE("Gguf reads metadata of each kind", "[io][gguf]") {
  const Gguf file(
      "f", gguf_file(
               {gguf_entry("u8", 0, bytes_of<std::uint8_t>({200})),
                gguf_entry("i8", 1, bytes_of<std::int8_t>({-100})),
                gguf_entry("u16", 2, bytes_of<std::uint16_t>({60'000})),
                gguf_entry("i16", 3, bytes_of<std::int16_t>({-30'000})),
                gguf_entry("u32", 4, bytes_of<std::uint32_t>({4'000'000'000})),
                gguf_entry("i32", 5, bytes_of<std::int32_t>({-2'000'000'000})),
                gguf_entry("f32", 6, bytes_of<float>({0.1F})),
                gguf_entry("bool", 7, bytes_of<std::uint8_t>({1})),
                gguf_entry("string", 8, gguf_text("tëxt\n")), gguf_entry("empty", 8, gguf_text("")),
                gguf_entry("u64", 10, bytes_of<std::uint64_t>({9'223'372'036'854'775'807})),
                gguf_entry("i64", 11, bytes_of<std::int64_t>({-9'000'000'000})),
                gguf_entry("f64", 12, bytes_of<double>({0.1})),
                gguf_array("i16s", 3, 3, bytes_of<std::int16_t>({-1, 2, 3})),
                gguf_array("f32s", 6, 2, bytes_of<float>({0.5F, -1.F})),
                gguf_array("f64s", 12, 1, bytes_of<double>({0.1})),
                gguf_array("bools", 7, 2, bytes_of<std::uint8_t>({0, 1})),
                gguf_array("strings", 8, 3, gguf_text("a") + gguf_text("") + gguf_text("bcd")),
                gguf_array("nothing", 4, 0, "")}));

  CHECK(file.integer("u8") == 200);
  CHECK(file.integer("i8") == -100);
  CHECK(file.integer("u16") == 60'000);
  CHECK(file.integer("i16") == -30'000);
  CHECK(file.integer("u32") == 4'000'000'000);
  CHECK(file.integer("i32") == -2'000'000'000);
  CHECK(file.real("f32") == static_cast<double>(0.1F));
  CHECK(file.boolean("bool"));
  CHECK(file.text("string") == "tëxt\n");
  CHECK(file.text("empty").empty());
  CHECK(file.integer("u64") == 9'223'372'036'854'775'807);
  CHECK(file.integer("i64") == -9'000'000'000);
  CHECK(file.real("f64") == 0.1);
  CHECK(file.integers("i16s") == std::vector<std::int64_t>{-1, 2, 3});
  CHECK(file.reals("f32s") == std::vector<double>{0.5, -1.0});
  CHECK(file.reals("f64s") == std::vector<double>{0.1});
  CHECK(file.integers("bools") == std::vector<std::int64_t>{0, 1});
  CHECK(file.integers("nothing").empty());
  const GgufStrings strings = file.texts("strings");
  CHECK(strings.size() == 3);
  CHECK(std::vector<std::string_view>(strings.begin(), strings.end()) ==
        std::vector<std::string_view>{"a", "", "bcd"});

  CHECK(file.metadata().size() == 19);
  CHECK(file.metadata()[8].first == "string");
  CHECK(file.has("u8"));
  CHECK_FALSE(file.has("u9"));
  CHECK(file.tensors().empty());
}

TEST_CASE("Gguf says what is missing or of another kind", "[io][gguf]") {
  const Gguf file("f", gguf_file({gguf_entry("n", 4, bytes_of<std::uint32_t>({1})),
                                  gguf_entry("big", 10, bytes_of<std::uint64_t>({kHuge})),
                                  gguf_array("list", 8, 0, ""),
                                  gguf_array("numbers", 4, 1, bytes_of<std::uint32_t>({1}))}));

  CHECK(message([&] { file.value("m"); }) == "f: key 'm' is missing");
  CHECK(message([&] { file.integer("list"); }) ==
        "f: key 'list' is an array of STRING, expected an integer kind");
  CHECK(message([&] { file.integer("numbers"); }) ==
        "f: key 'numbers' is an array of U32, expected an integer kind");
  CHECK(message([&] { file.integers("n"); }) ==
        "f: key 'n' is U32, expected an array of an integer kind or BOOL");
  CHECK(message([&] { file.integer("big"); }) ==
        "f: key 'big' is 18446744073709551615, expected at most 9223372036854775807");
  CHECK(message([&] { file.real("n"); }) == "f: key 'n' is U32, expected F32 or F64");
  CHECK(message([&] { file.boolean("n"); }) == "f: key 'n' is U32, expected BOOL");
  CHECK(message([&] { file.text("n"); }) == "f: key 'n' is U32, expected STRING");
  CHECK(message([&] { file.integers("list"); }) ==
        "f: key 'list' is an array of STRING, expected an array of an integer kind or BOOL");
  CHECK(message([&] { file.reals("n"); }) == "f: key 'n' is U32, expected an array of F32 or F64");
  CHECK(message([&] { file.texts("n"); }) == "f: key 'n' is U32, expected an array of STRING");
  CHECK(message([&] { file.tensor("t"); }) == "f: tensor 't' is missing");
  CHECK(message([] { Gguf::read("."); }) == ".: is not a regular file");
}

TEST_CASE("Gguf reads tensors where their offsets say", "[io][gguf]") {
  const std::string data =
      bytes_of<float>({1, 2, 3, 4, 5, 6}) + std::string(8, '\0') + bytes_of<double>({0.1});
  Gguf file("f", gguf_file({},
                           {gguf_tensor("scalar", {}, 28, 32), gguf_tensor("m", {3, 2}, 0, 0),
                            gguf_tensor("none", {4, 0, 2}, 1, 64)},
                           data + std::string(24, '\0')));
  CHECK(file.tensor("m").shape == std::vector<Index>{2, 3});
  CHECK(file.numbers("m") == std::vector<double>{1, 2, 3, 4, 5, 6});
  CHECK(file.numbers("scalar") == std::vector<double>{0.1});
  CHECK(file.tensor("none").shape == std::vector<Index>{2, 0, 4});
  CHECK(file.numbers("none").empty());
  CHECK(file.has_tensor("m"));

  const Gguf moved = std::move(file);
  CHECK(moved.numbers("m") == std::vector<double>{1, 2, 3, 4, 5, 6});

  // The padding behind the last tensor may be missing, and the alignment may be another one.
  const Gguf narrow("f",
                    gguf_file({gguf_entry("general.alignment", 4, bytes_of<std::uint32_t>({8}))},
                              {gguf_tensor("a", {1}, 0, 0), gguf_tensor("b", {1}, 0, 8)},
                              bytes_of<float>({1, 0, 2}), 8));
  CHECK(narrow.numbers("b") == std::vector<double>{2});
  // Version 2 differs in nothing that is read.
  std::string old = gguf_file({}, {gguf_tensor("a", {1}, 0, 0)}, bytes_of<float>({7}));
  old[4] = 2;
  CHECK(Gguf("f", old).numbers("a") == std::vector<double>{7});
}

TEST_CASE("Gguf goes through a large vocabulary without an allocation for each word",
          "[io][gguf]") {
  std::string words;
  constexpr std::size_t kWords = 200'000;
  for (std::size_t i = 0; i < kWords; ++i) words += gguf_text("a word that is a little longer");
  const std::string bytes = gguf_file({gguf_array("tokens", 8, kWords, words)});
  std::size_t length = 0;
  const long allocations = test::count_allocations([&] {
    const Gguf file("f", bytes);
    for (const std::string_view word : file.texts("tokens")) length += word.size();
  });
  CHECK(length == 30 * kWords);
  if (test::allocations_are_counted()) CHECK(allocations < 100);
}

TEST_CASE("Gguf rejects a start that is not one", "[io][gguf]") {
  CHECK(complaint("") ==
        "f: ends within the start of the file, which needs 4 bytes at position 0 where only 0 "
        "follow");
  CHECK(complaint("GGML" + std::string(40, '\0')) == "f: does not begin with 'GGUF'");
  CHECK(complaint(start(1, 0, 0)) == "f: has version 1, expected 2 or 3");
  CHECK(complaint(start(4, 0, 0)) == "f: has version 4, expected 2 or 3");
  CHECK(complaint(start(0, 0, 0)) == "f: has version 0, expected 2 or 3");
  CHECK(complaint(start(3U << 24U, 0, 0)) == "f: is big-endian, expected a little-endian file");
  CHECK(complaint(start(3, 0, kHuge)) ==
        "f: claims 18446744073709551615 entries of metadata, only 0 bytes follow");
  CHECK(complaint(start(3, kHuge, 0)) ==
        "f: claims 18446744073709551615 tensors, only 0 bytes follow");
  CHECK(complaint(start(3, 2, 0) + std::string(49, '\0')) ==
        "f: claims 2 tensors, only 49 bytes follow");
  CHECK(complaint(start(3, 0, 0) + std::string(8, '\0')) == "no exception");  // Padding.
  CHECK(complaint(start(3, 0, 0) + std::string(9, '\0')) ==
        "f: has 1 bytes behind its last tensor");
}

TEST_CASE("Gguf rejects metadata that are not described as such", "[io][gguf]") {
  const auto about = [](const std::string& entry) { return complaint(gguf_file({entry})); };
  const std::string one = bytes_of<std::uint32_t>({1});
  CHECK(about(bytes_of<std::uint64_t>({kHuge}) + std::string(9, 'a')) ==
        "f: ends within a key of the metadata, which needs 18446744073709551615 bytes at position "
        "32 where only 9 follow");
  const std::string word = " is not a word of printable ASCII with up to 65535 bytes";
  CHECK(about(gguf_entry("", 4, one)) == "f: key 0" + word);
  CHECK(about(gguf_entry("a b", 4, one)) == "f: key 0" + word);
  CHECK(about(gguf_entry(std::string_view("a\0", 2), 4, one)) == "f: key 0" + word);
  CHECK(about(gguf_entry("\x1b[0m", 4, one)) == "f: key 0" + word);
  CHECK(about(gguf_entry("ä", 4, one)) == "f: key 0" + word);
  CHECK(about(gguf_entry(std::string(65536, 'a'), 4, one)) == "f: key 0" + word);
  CHECK(complaint(gguf_file({gguf_entry("a", 4, one), gguf_entry("a", 4, one)})) ==
        "f: key 'a' is there twice");
  CHECK(about(gguf_entry("a", 13, one)) == "f: key 'a' is of the unknown kind 13");
  CHECK(about(gguf_entry("abcd", 10, one)) == "f: key 'abcd' claims 1 of U64, only 4 bytes follow");
  CHECK(about(gguf_entry("ab", 8, bytes_of<std::uint64_t>({2}) + "x")) ==
        "f: ends within ab, which needs 2 bytes at position 46 where only 1 follow");
  CHECK(about(gguf_entry("a", 7, "\2")) == "f: key 'a' has the truth value 2, expected 0 or 1");
  CHECK(about(gguf_array("a", 9, 1, "")) == "f: key 'a' is an array of arrays");
  CHECK(about(gguf_array("a", 14, 1, "")) == "f: key 'a' is of the unknown kind 14");
  CHECK(about(gguf_array("a", 4, 2, one)) == "f: key 'a' claims 2 of U32, only 4 bytes follow");
  CHECK(about(gguf_array("a", 10, kHuge / 8 + 1, one)) ==
        "f: key 'a' claims 2305843009213693952 of U64, only 4 bytes follow");
  CHECK(about(gguf_array("a", 8, kHuge, one)) ==
        "f: key 'a' claims 18446744073709551615 of STRING, only 4 bytes follow");
  CHECK(about(gguf_array("a", 8, 1, bytes_of<std::uint64_t>({kHuge}))) ==
        "f: ends within a, which needs 18446744073709551615 bytes at position 57 where only 0 "
        "follow");

  const std::string alignment = "general.alignment";
  CHECK(about(gguf_entry(alignment, 8, gguf_text("8"))) ==
        "f: key 'general.alignment' is STRING, expected U32");
  CHECK(about(gguf_array(alignment, 4, 0, "")) ==
        "f: key 'general.alignment' is an array of U32, expected U32");
  CHECK(about(gguf_entry(alignment, 4, bytes_of<std::uint32_t>({0}))) ==
        "f: key 'general.alignment' is 0, expected a power of 2");
  CHECK(about(gguf_entry(alignment, 4, bytes_of<std::uint32_t>({24}))) ==
        "f: key 'general.alignment' is 24, expected a power of 2");
}

TEST_CASE("Gguf rejects a tensor that is not described as one", "[io][gguf]") {
  const auto about = [](const std::vector<std::uint64_t>& lengths, std::uint32_t type,
                        std::uint64_t offset) {
    return complaint_about({gguf_tensor("a", lengths, type, offset)});
  };
  const std::string word =
      "f: the name of tensor 0 is not a word of printable ASCII with up to 64 "
      "bytes";
  CHECK(complaint_about({gguf_tensor("", {1}, 0, 0)}) == word);
  CHECK(complaint_about({gguf_tensor(std::string(65, 'a'), {1}, 0, 0)}) == word);
  CHECK(about({1, 1, 1, 1, 1}, 0, 0) == "f: tensor 'a': has 5 dimensions, expected at most 4");
  CHECK(about({kHuge}, 0, 0) ==
        "f: tensor 'a': has a length of 18446744073709551615, expected at most "
        "9223372036854775807");
  // 2^32 * 2^32 is zero in 64 bits; and a length of 0 does not hide what would overflow.
  CHECK(about({std::uint64_t{1} << 32, std::uint64_t{1} << 32}, 0, 0) ==
        "f: tensor 'a': shape [4294967296, 4294967296] is too large");
  CHECK(about({0, std::uint64_t{1} << 32, std::uint64_t{1} << 32}, 0, 0) ==
        "f: tensor 'a': shape [4294967296, 4294967296, 0] is too large");
  CHECK(about({std::uint64_t{1} << 61}, 0, 0) ==
        "f: tensor 'a': shape [2305843009213693952] is too large");
  CHECK(about({1}, 10, 0) == "f: tensor 'a': its kind Q2_K is not supported");
  CHECK(about({1}, 26, 0) == "f: tensor 'a': its kind I32 is not supported");
  CHECK(about({1}, 4, 0) == "f: tensor 'a': its kind 4 is not supported");
  CHECK(about({1}, 99, 0) == "f: tensor 'a': its kind 99 is not supported");
  CHECK(about({16, 2}, 8, 0) ==
        "f: tensor 'a': has rows of 16 numbers, expected a multiple of 32 for Q8_0");
  CHECK(about({}, 8, 0) ==
        "f: tensor 'a': has rows of 1 numbers, expected a multiple of 32 for Q8_0");
  CHECK(about({1}, 0, 8) == "f: tensor 'a': begins at 8 of the data, expected a multiple of 32");
  CHECK(complaint_about({gguf_tensor("a", {8}, 0, 0), gguf_tensor("a", {8}, 0, 32)}) ==
        "f: tensor 'a': is there twice");
}

TEST_CASE("Gguf rejects data that are not there", "[io][gguf]") {
  CHECK(complaint_about({gguf_tensor("a", {17}, 0, 0)}) ==
        "f: tensor 'a': its 68 bytes at 0 do not lie within the 64 bytes of data");
  CHECK(complaint_about({gguf_tensor("a", {8}, 0, 0), gguf_tensor("b", {9}, 0, 32)}) ==
        "f: tensor 'b': its 36 bytes at 32 do not lie within the 64 bytes of data");
  CHECK(complaint_about({gguf_tensor("a", {1}, 0, 96)}) ==
        "f: tensor 'a': its 4 bytes at 96 do not lie within the 64 bytes of data");
  CHECK(complaint_about({gguf_tensor("a", {1}, 0, kHuge - 31)}) ==
        "f: tensor 'a': its 4 bytes at 18446744073709551584 do not lie within the 64 bytes of "
        "data");
  CHECK(complaint_about({gguf_tensor("a", {16}, 0, 0), gguf_tensor("b", {8}, 0, 32)}) ==
        "f: tensor 'b' overlaps another one");
  CHECK(complaint_about({gguf_tensor("a", {8}, 0, 0), gguf_tensor("b", {8}, 0, 0)}) ==
        "f: tensor 'b' overlaps another one");
  CHECK(complaint_about({gguf_tensor("a", {8}, 0, 32)}) ==
        "f: a gap lies before the data of tensor 'a'");
  CHECK(complaint_about({gguf_tensor("a", {8}, 0, 0)}) == "f: has 32 bytes behind its last tensor");
  const std::string whole = gguf_file({gguf_entry("k", 8, gguf_text("v"))},
                                      {gguf_tensor("a", {8}, 0, 0)}, std::string(32, '\0'));
  REQUIRE_NOTHROW(Gguf("f", whole));
  for (std::size_t length = 0; length < whole.size(); ++length) {
    CHECK_THROWS_AS(Gguf("f", whole.substr(0, length)), FileError);
  }
}

}  // namespace weir::gguf_test
