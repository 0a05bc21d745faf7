// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include <weir/io/dtype.hpp>

#include "support/catch.hpp"

namespace weir::io::dtype_test {
namespace {

/// What numbers of type `Stored` become, read from an odd address.
template <class T, class Stored>
std::vector<T> read(Dtype dtype, const std::vector<Stored>& numbers) {
  REQUIRE(width_of(dtype) == sizeof(Stored));
  std::vector<std::byte> bytes(1 + numbers.size() * sizeof(Stored));
  if (!numbers.empty()) {
    std::memcpy(bytes.data() + 1, numbers.data(), numbers.size() * sizeof(Stored));
  }
  std::vector<T> to(numbers.size() + 1, T(77));
  convert(dtype, bytes.data() + 1, static_cast<Index>(numbers.size()), to.data());
  CHECK(to.back() == T(77));
  to.pop_back();
  return to;
}

}  // namespace

TEST_CASE("Kinds have the names and widths of the safetensors format", "[io][dtype]") {
  const std::vector<std::pair<Dtype, std::string>> reals = {
      {Dtype::kF64, "F64 8"},   {Dtype::kF32, "F32 4"},        {Dtype::kF16, "F16 2"},
      {Dtype::kBF16, "BF16 2"}, {Dtype::kF8E4M3, "F8_E4M3 1"}, {Dtype::kF8E5M2, "F8_E5M2 1"}};
  const std::vector<std::pair<Dtype, std::string>> others = {
      {Dtype::kI64, "I64 8"}, {Dtype::kI32, "I32 4"}, {Dtype::kI16, "I16 2"},
      {Dtype::kI8, "I8 1"},   {Dtype::kU8, "U8 1"},   {Dtype::kBool, "BOOL 1"}};
  for (const auto* const kinds : {&reals, &others}) {
    for (const auto& [dtype, text] : *kinds) {
      CHECK(std::string(name_of(dtype)) + " " + std::to_string(width_of(dtype)) == text);
      CHECK(is_real(dtype) == (kinds == &reals));
      CHECK(dtype_named(name_of(dtype)) == dtype);
    }
  }
  CHECK_FALSE(dtype_named("F4").has_value());
  CHECK_FALSE(dtype_named("").has_value());
  CHECK(dtype_of<float>() == Dtype::kF32);
  CHECK(dtype_of<double>() == Dtype::kF64);
}

TEST_CASE("Whole numbers are read with their sign", "[io][dtype]") {
  const std::vector<double> ends = {-128.0, 127.0, 0.0, -1.0};
  CHECK(read<double>(Dtype::kI8, std::vector<std::int8_t>{-128, 127, 0, -1}) == ends);
  CHECK(read<double>(Dtype::kI16, std::vector<std::int16_t>{-32768, 32767}) ==
        std::vector<double>{-32768.0, 32767.0});
  CHECK(read<double>(Dtype::kI32, std::vector<std::int32_t>{-2147483647, 5}) ==
        std::vector<double>{-2147483647.0, 5.0});
  const std::int64_t large = (std::int64_t{1} << 62) + 1;
  CHECK(read<std::int64_t>(Dtype::kI64, std::vector<std::int64_t>{large, -large}) ==
        std::vector<std::int64_t>{large, -large});
  CHECK(read<float>(Dtype::kU8, std::vector<std::uint8_t>{0, 255}) ==
        std::vector<float>{0.0F, 255.0F});
  CHECK(read<float>(Dtype::kBool, std::vector<std::uint8_t>{0, 1}) ==
        std::vector<float>{0.0F, 1.0F});
}

TEST_CASE("Numbers of 8 bits are those of their formats", "[io][dtype][golden]") {
  // OCP's table 1: exponents of 4 bits with the bias 7 and no infinity, of 5 bits with the bias 15.
  const auto four =
      read<float>(Dtype::kF8E4M3, std::vector<std::uint8_t>{0x38, 0xB8, 0x01, 0x08, 0x7E, 0x00});
  CHECK(four == std::vector<float>{1.0F, -1.0F, 0x1p-9F, 0x1p-6F, 448.0F, 0.0F});
  CHECK(std::isnan(read<float>(Dtype::kF8E4M3, std::vector<std::uint8_t>{0x7F})[0]));
  const auto five =
      read<double>(Dtype::kF8E5M2, std::vector<std::uint8_t>{0x3C, 0xBC, 0x01, 0x04, 0x7B, 0x7C});
  CHECK(five == std::vector<double>{1.0, -1.0, 0x1p-16, 0x1p-14, 57344.0,
                                    std::numeric_limits<double>::infinity()});
}

TEST_CASE("What is stored is read again, rounded to the nearest", "[io][dtype]") {
  const std::vector<double> numbers = {0.0, -1.5, 1.0 + 0x1p-8, 1.0 + 0x1p-11, 3e-5, 65504.0};
  const auto again = [&](Dtype dtype) {
    std::vector<std::byte> bytes(numbers.size() * width_of(dtype));
    store(dtype, numbers.data(), static_cast<Index>(numbers.size()), bytes.data());
    std::vector<double> to(numbers.size());
    convert(dtype, bytes.data(), static_cast<Index>(numbers.size()), to.data());
    return to;
  };
  CHECK(again(Dtype::kF64) == numbers);
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    CHECK(again(Dtype::kF32)[i] == static_cast<double>(static_cast<float>(numbers[i])));
  }
  const auto halves = again(Dtype::kF16);
  CHECK(halves[1] == -1.5);
  CHECK(halves[2] == numbers[2]);
  CHECK(halves[3] == 1.0);  // A tie, to even.
  CHECK(halves[4] == Approx(3e-5).epsilon(1e-2));
  CHECK(halves[5] == 65504.0);
  const auto brains = again(Dtype::kBF16);
  CHECK(brains[2] == 1.0);  // A tie, to even.
  CHECK(brains[5] == 65536.0);
  for (const Dtype dtype : {Dtype::kF64, Dtype::kF32, Dtype::kF16, Dtype::kBF16}) {
    CHECK(is_storable(dtype));
  }
  for (const Dtype dtype : {Dtype::kF8E4M3, Dtype::kF8E5M2, Dtype::kI64, Dtype::kBool}) {
    CHECK_FALSE(is_storable(dtype));
    std::byte untouched{0x5A};
    store(dtype, numbers.data(), 1, &untouched);
    CHECK(untouched == std::byte{0x5A});
  }
}

TEST_CASE("Any number of bfloat16 numbers is read", "[io][dtype]") {
  for (std::size_t count = 0; count < 40; ++count) {
    std::vector<std::uint16_t> bits;
    std::vector<float> expected;
    for (std::size_t i = 0; i < count; ++i) {
      bits.push_back(static_cast<std::uint16_t>(0x3F80 + i));
      expected.push_back(1.0F + static_cast<float>(i) / 128.0F);
    }
    CHECK(read<float>(Dtype::kBF16, bits) == expected);
    CHECK(read<double>(Dtype::kBF16, bits) ==
          std::vector<double>(expected.begin(), expected.end()));
  }
}

}  // namespace weir::io::dtype_test
