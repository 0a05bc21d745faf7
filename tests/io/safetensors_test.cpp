// SPDX-License-Identifier: MIT
#include <cstdint>
#include <string>
#include <vector>

#include <weir/io/safetensors.hpp>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::safetensors_test {
using namespace weir::io;
using test::bytes_of;
using test::file_of;

namespace {

const std::string kPair = R"({"a":{"dtype":"F64","shape":[2],"data_offsets":[0,16]}})";

/// What the reader says about a file of these bytes.
std::string complaint(const std::string& bytes) {
  return test::message_of<FileError>([&] { Safetensors("f", bytes); });
}

/// What it says about a tensor "a" with this description and 16 bytes of data.
std::string complaint_about(const std::string& description) {
  return complaint(file_of(R"({"a":)" + description + "}", std::string(16, '\0')));
}

}  // namespace

TEST_CASE("Safetensors reads metadata and each type of number", "[io][safetensors]") {
  const Safetensors file(
      "f", file_of(R"({"__metadata__":{"case":"1"},)"
                   R"("d":{"dtype":"F64","shape":[1,2],"data_offsets":[0,16]},)"
                   R"("f":{"dtype":"F32","shape":[],"data_offsets":[24,28]},)"
                   R"("q":{"dtype":"I64","shape":[1],"data_offsets":[16,24]},)"
                   R"("i":{"dtype":"I32","shape":[1],"data_offsets":[28,32]},)"
                   R"("s":{"dtype":"I16","shape":[1],"data_offsets":[32,34]},)"
                   R"("c":{"dtype":"I8","shape":[1],"data_offsets":[34,35]},)"
                   R"("u":{"dtype":"U8","shape":[1],"data_offsets":[35,36]},)"
                   R"("b":{"dtype":"BOOL","shape":[2],"data_offsets":[36,38]},)"
                   R"("empty":{"dtype":"F64","shape":[0,3],"data_offsets":[38,38]}})",
                   bytes_of<double>({0.1, -2.0}) + bytes_of<std::int64_t>({-7'000'000'000}) +
                       bytes_of<float>({0.5F}) + bytes_of<std::int32_t>({-70'000}) +
                       bytes_of<std::int16_t>({-700}) + bytes_of<std::int8_t>({-7}) +
                       bytes_of<std::uint8_t>({200, 0, 1})));

  CHECK(file.metadata().at("case") == "1");
  CHECK(file.tensors().size() == 9);
  CHECK(file.tensor("d").shape == std::vector<Index>{1, 2});
  CHECK(file.reals("d") == std::vector<double>{0.1, -2.0});
  CHECK(file.tensor("f").shape.empty());
  CHECK(file.reals("f") == std::vector<double>{0.5});
  CHECK(file.reals("empty").empty());
  CHECK(file.integers("q")[0] == -7'000'000'000);
  CHECK(file.integers("i")[0] == -70'000);
  CHECK(file.integers("s")[0] == -700);
  CHECK(file.integers("c")[0] == -7);
  CHECK(file.integers("u")[0] == 200);
  CHECK(file.integers("b") == std::vector<std::int64_t>{0, 1});
}

TEST_CASE("Safetensors says what is missing or of another kind", "[io][safetensors]") {
  const Safetensors file("f", file_of(kPair, bytes_of<double>({1.0, 2.0})));

  CHECK(test::message_of<FileError>([&] { file.reals("b"); }) == "f: tensor 'b' is missing");
  CHECK(test::message_of<FileError>([&] { file.integers("a"); }) ==
        "f: tensor 'a' is F64, expected I64, I32, I16, I8, U8 or BOOL");
  CHECK(test::message_of<FileError>([] { Safetensors::read("/no/such/file"); }) ==
        "/no/such/file: there is no such file");
  CHECK(test::message_of<FileError>([] { Safetensors::read("."); }) == ".: is not a regular file");
}

TEST_CASE("Safetensors rejects a header that is not one", "[io][safetensors]") {
  CHECK(complaint("") == "f: has 0 bytes, expected at least 8");
  CHECK(complaint("1234567") == "f: has 7 bytes, expected at least 8");
  CHECK(complaint(bytes_of<std::uint64_t>({3}) + "{}") ==
        "f: the header claims 3 bytes, only 2 follow in the file");
  CHECK(complaint(bytes_of<std::uint64_t>({~std::uint64_t{0}}) + "{}") ==
        "f: the header claims 18446744073709551615 bytes, only 2 follow in the file");
  CHECK(complaint(file_of("")).starts_with("f: the header is not valid JSON: "));
  CHECK(complaint(file_of(R"({"a":)")).starts_with("f: the header is not valid JSON: "));
  CHECK(complaint(file_of("{} {}")).starts_with("f: the header is not valid JSON: "));
  CHECK(complaint(file_of("{\"\xff\":1}")).starts_with("f: the header is not valid JSON: "));
  CHECK(complaint(file_of("[]")) == "f: the header is not a JSON object");
  CHECK(complaint(file_of("null")) == "f: the header is not a JSON object");
  CHECK(complaint(file_of(R"({"__metadata__":[]})")) == "f: __metadata__ is not a JSON object");
  CHECK(complaint(file_of(R"({"__metadata__":{"case":1}})")) ==
        "f: __metadata__: 'case' is not a string");

  const std::string deep(200'000, '[');
  CHECK(complaint(file_of(R"({"a":)" + deep)) == "f: the header is nested too deeply");
  CHECK(complaint(file_of(R"({"a":)" + deep + std::string(deep.size(), ']') + "}")) ==
        "f: the header is nested too deeply");
}

TEST_CASE("Safetensors rejects a tensor that is not described as one", "[io][safetensors]") {
  CHECK(complaint_about("1") == "f: tensor 'a': is not described by a JSON object");
  CHECK(complaint_about(R"({"shape":[2],"data_offsets":[0,16]})") == "f: tensor 'a': has no dtype");
  CHECK(complaint_about(R"({"dtype":"F64","data_offsets":[0,16]})") ==
        "f: tensor 'a': has no shape");
  CHECK(complaint_about(R"({"dtype":"F64","shape":[2]})") == "f: tensor 'a': has no data_offsets");
  CHECK(complaint_about(R"({"dtype":64,"shape":[2],"data_offsets":[0,16]})") ==
        "f: tensor 'a': dtype is not a string");
  CHECK(complaint_about(R"({"dtype":"C64","shape":[2],"data_offsets":[0,16]})") ==
        "f: tensor 'a': dtype C64 is not supported");

  const auto shape = GENERATE(as<std::string>{}, "2", "[-2]", "[2.0]", "[\"2\"]", "[[2]]", "null",
                              "[18446744073709551615]");
  CHECK(complaint_about(R"({"dtype":"F64","shape":)" + shape + R"(,"data_offsets":[0,16]})") ==
        "f: tensor 'a': shape is not a list of lengths");
  const auto offsets =
      GENERATE(as<std::string>{}, "16", "[16]", "[0,8,16]", "[-16,0]", "[0,1e400]", "{}");
  const std::string answer =
      complaint_about(R"({"dtype":"F64","shape":[2],"data_offsets":)" + offsets + "}");
  if (offsets == "[0,1e400]") {
    CHECK(answer.starts_with("f: the header is not valid JSON: "));
  } else {
    CHECK(answer == "f: tensor 'a': data_offsets is not a pair");
  }
}

TEST_CASE("Safetensors rejects data that are not there", "[io][safetensors]") {
  const auto about = [](const std::string& shape, const std::string& offsets) {
    return complaint_about(R"({"dtype":"F64","shape":)" + shape + R"(,"data_offsets":)" + offsets +
                           "}");
  };
  CHECK(about("[2]", "[8,24]") ==
        "f: tensor 'a': data_offsets [8,24] do not lie within the 16 bytes of data");
  CHECK(about("[2]", "[16,0]") ==
        "f: tensor 'a': data_offsets [16,0] do not lie within the 16 bytes of data");
  CHECK(about("[2]", "[9223372036854775800,9223372036854775807]") ==
        "f: tensor 'a': data_offsets [9223372036854775800,9223372036854775807] do not lie within "
        "the 16 bytes of data");
  CHECK(about("[3]", "[0,16]") ==
        "f: tensor 'a': data_offsets [0,16] hold 16 bytes, expected 24 for F64 [3]");
  CHECK(about("[]", "[0,16]") ==
        "f: tensor 'a': data_offsets [0,16] hold 16 bytes, expected 8 for F64 []");
  CHECK(about("[0,9223372036854775807,2]", "[0,16]") ==
        "f: tensor 'a': data_offsets [0,16] hold 16 bytes, expected 0 for F64 "
        "[0,9223372036854775807,2]");
  // 2^32 * 2^32 * 8 is zero in 64 bits.
  CHECK(about("[4294967296,4294967296]", "[0,0]") ==
        "f: tensor 'a': shape [4294967296,4294967296] is too large");

  CHECK(complaint(file_of(kPair, std::string(15, '\0'))) ==
        "f: tensor 'a': data_offsets [0,16] do not lie within the 15 bytes of data");
  CHECK(complaint(file_of(kPair, std::string(17, '\0'))) ==
        "f: has 1 bytes behind its last tensor");
}

TEST_CASE("Safetensors rejects tensors that share bytes, a name, or leave gaps",
          "[io][safetensors]") {
  const auto two = [](const std::string& second) {
    return complaint(
        file_of(R"({"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]},)" + second + "}",
                std::string(24, '\0')));
  };
  CHECK(two(R"("b":{"dtype":"F64","shape":[2],"data_offsets":[4,20]})") ==
        "f: tensor 'b': data_offsets [4,20] do not begin at a multiple of 8 bytes");
  CHECK(two(R"("b":{"dtype":"F32","shape":[4],"data_offsets":[4,20]})") ==
        "f: tensor 'b' overlaps another one");
  CHECK(two(R"("b":{"dtype":"F64","shape":[3],"data_offsets":[0,24]})") ==
        "f: tensor 'b' overlaps another one");
  CHECK(two(R"("b":{"dtype":"F64","shape":[1],"data_offsets":[16,24]})") ==
        "f: a gap lies before the data of tensor 'b'");
  CHECK(complaint(file_of(R"({"a\u0000b":1})")) == "f: a tensor's name has a NUL in it");
  CHECK(two(R"("a":{"dtype":"F64","shape":[2],"data_offsets":[8,24]})") ==
        "f: tensor 'a' is there twice");
}

}  // namespace weir::safetensors_test
