// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <weir/io/gguf.hpp>
#include <weir/io/gguf_writer.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::gguf_writer_test {
using namespace weir::io;

namespace {

GgufMetadata some_metadata() {
  GgufMetadata metadata;
  metadata.add_text("general.architecture", "llama");
  metadata.add_u32("u32", 4'000'000'000);
  metadata.add_i32("i32", -7);
  metadata.add_f32("f32", 0.1F);
  metadata.add_bool("bool", true);
  metadata.add_u32s("u32s", std::vector<std::uint32_t>{1, 2});
  metadata.add_i32s("i32s", std::vector<std::int32_t>{-1});
  metadata.add_f32s("f32s", std::vector<float>{});
  metadata.add_texts("texts", {"a", "", "\xff\n"});
  return metadata;
}

std::string complaint(const std::filesystem::path& path,
                      const std::vector<GgufSource<float>>& sources) {
  return test::message_of<ConfigError>([&] { write_gguf<float>(path, {}, sources); });
}

}  // namespace

TEST_CASE("What write_gguf writes is read", "[io][gguf]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.gguf").string();
  const Matrix<double> a = test::random_matrix(300, 320, 1);
  const Matrix<double> row = test::random_matrix(1, 7, 2);
  write_gguf<double>(path, some_metadata(),
                     {gguf_source("z", a, GgufType::kF32, {300, 320}),
                      gguf_source("row", row, GgufType::kF32, {7}),
                      gguf_source("experts", a, GgufType::kQ8_0, {3, 100, 320}),
                      gguf_source("half", a, GgufType::kF16, {2, 3, 50, 320}),
                      gguf_source("brain", a, GgufType::kBF16, {320, 300})});
  const Gguf file = Gguf::read(path);
  CHECK(file.metadata().front().first == "general.architecture");
  CHECK(file.text("general.architecture") == "llama");
  CHECK(file.integer("u32") == 4'000'000'000);
  CHECK(file.integer("i32") == -7);
  CHECK(file.real("f32") == static_cast<double>(0.1F));
  CHECK(file.boolean("bool"));
  CHECK(file.integers("u32s") == std::vector<std::int64_t>{1, 2});
  CHECK(file.integers("i32s") == std::vector<std::int64_t>{-1});
  CHECK(file.reals("f32s").empty());
  const GgufStrings texts = file.texts("texts");
  CHECK(std::vector<std::string>(texts.begin(), texts.end()) ==
        std::vector<std::string>{"a", "", "\xff\n"});

  CHECK(file.tensors().size() == 5);
  CHECK(file.tensor("z").shape == std::vector<Index>{300, 320});
  CHECK(file.tensor("row").shape == std::vector<Index>{7});
  CHECK(file.tensor("experts").shape == std::vector<Index>{3, 100, 320});
  CHECK(file.tensor("half").shape == std::vector<Index>{2, 3, 50, 320});
  const auto expect_near = [&](const char* name, GgufType type, double error) {
    CHECK(file.tensor(name).type == type);
    const std::vector<double> numbers = file.numbers(name);
    const Eigen::Map<const Matrix<double>> read(numbers.data(), a.rows(), a.cols());
    CHECK(test::relative_error(read, a) <= error);
  };
  expect_near("z", GgufType::kF32, 0x1p-24);
  expect_near("half", GgufType::kF16, 0x1p-11);
  expect_near("brain", GgufType::kBF16, 0x1p-8);
  expect_near("experts", GgufType::kQ8_0, 0.01);
}

TEST_CASE("write_gguf asks for the rows in their order and once", "[io][gguf]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.gguf").string();
  constexpr Index kRows = 5000;
  Index next = 0;
  GgufSource<float> source{
      "a", {50, 100, 64}, GgufType::kF32, [&](Index first, Index count, float* to) {
        CHECK(first == next);
        next += count;
        for (Index i = 0; i < count * 64; ++i) {
          to[i] = static_cast<float>(first * 64 + i);
        }
      }};
  write_gguf<float>(path, {}, {source});
  CHECK(next == kRows);
  const std::vector<double> numbers = Gguf::read(path).numbers("a");
  for (std::size_t i = 0; i < numbers.size(); i += 997) {
    CHECK(numbers[i] == static_cast<double>(i));
  }
}

TEST_CASE("Metadata of a file go into another one as they are", "[io][gguf]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.gguf").string();
  const std::string copy = (folder.path() / "b.gguf").string();
  write_gguf<float>(path, some_metadata(), {});
  const Gguf file = Gguf::read(path);
  GgufMetadata metadata;
  for (const auto& [key, value] : file.metadata()) metadata.add_copy(key, value);
  CHECK(metadata.size() == 9);
  CHECK(metadata.has("texts"));
  CHECK_FALSE(metadata.has("text"));
  CHECK(metadata.encoded() == some_metadata().encoded());
}

TEST_CASE("Metadata say which keys they cannot have", "[io][gguf]") {
  GgufMetadata metadata;
  metadata.add_u32("a", 1);
  const auto complaint_about = [&](const std::string& key) {
    return test::message_of<ConfigError>([&] { metadata.add_text(key, "b"); });
  };
  const std::string expected =
      "', expected different words of printable ASCII other than 'general.alignment'";
  CHECK(complaint_about("a") == "GgufMetadata: key = 'a" + expected);
  CHECK(complaint_about("") == "GgufMetadata: key = '" + expected);
  CHECK(complaint_about("b c") == "GgufMetadata: key = 'b c" + expected);
  CHECK(complaint_about("general.alignment") ==
        "GgufMetadata: key = 'general.alignment" + expected);
  CHECK(metadata.size() == 1);
}

TEST_CASE("write_gguf says what it cannot write, and leaves the old file", "[io][gguf]") {
  const test::Folder folder;
  const std::filesystem::path path = folder.path() / "a.gguf";
  Matrix<float> a = Matrix<float>::Ones(2, 32);
  const GgufSource<float> good = gguf_source("a", a, GgufType::kF32, {2, 32});
  write_gguf<float>(path, {}, {good});
  const auto about = [&](GgufType type, const std::vector<Index>& shape) {
    return complaint(path, {gguf_source("b", a, type, shape)});
  };
  const std::string names = "', expected different words of printable ASCII with up to 63 bytes";
  CHECK(complaint(path, {good, good}) == "write_gguf: a tensor is named 'a" + names);
  CHECK(complaint(path, {gguf_source("", a, GgufType::kF32, {2, 32})}) ==
        "write_gguf: a tensor is named '" + names);
  CHECK(complaint(path, {gguf_source(std::string(64, 'b'), a, GgufType::kF32, {2, 32})}) ==
        "write_gguf: a tensor is named '" + std::string(64, 'b') + names);
  CHECK(about(GgufType::kQ4K, {2, 32}) ==
        "write_gguf: tensor 'b': type = Q4_K, expected F32, F16, BF16 or Q8_0");
  CHECK(about(GgufType::kF32, {}) ==
        "write_gguf: tensor 'b': shape has 0 lengths, expected 1 to 4");
  CHECK(about(GgufType::kF32, {1, 1, 1, 2, 32}) ==
        "write_gguf: tensor 'b': shape has 5 lengths, expected 1 to 4");
  CHECK(about(GgufType::kF32, {0, 32}) ==
        "write_gguf: tensor 'b': shape [0, 32], expected positive lengths of at most "
        "1152921504606846975 numbers");
  CHECK(about(GgufType::kF32, {Index{1} << 32, Index{1} << 32}) ==
        "write_gguf: tensor 'b': shape [4294967296, 4294967296], expected positive lengths of at "
        "most 1152921504606846975 numbers");
  CHECK(about(GgufType::kQ8_0, {4, 16}) ==
        "write_gguf: tensor 'b': has rows of 16 numbers, expected a multiple of 32 for Q8_0");
  a(1, 3) = HUGE_VALF;
  CHECK(about(GgufType::kQ8_0, {2, 32}) ==
        "write_gguf: tensor 'b': has the number inf, expected magnitudes up to 8.31901e+06 for "
        "Q8_0");
  CHECK(Gguf::read(path.string()).numbers("a") == std::vector<double>(64, 1.0));

  CHECK_THROWS_AS(write_gguf<float>(folder.path() / "no" / "a", {}, {good}), FileError);
  Index files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    ++files;
  }
  CHECK(files == 1);  // No temporary file stays.
}

}  // namespace weir::gguf_writer_test
