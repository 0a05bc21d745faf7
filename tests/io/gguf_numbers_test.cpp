// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <weir/io/gguf_numbers.hpp>
#include <weir/io/gguf_tensor.hpp>

#include "io/files.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::gguf_numbers_test {
using namespace weir::io;
using test::bytes_of;

namespace {

constexpr std::uint16_t kHalf = 0x3800;     // 0.5 in 16 bits
constexpr std::uint16_t kQuarter = 0x3400;  // 0.25

template <class T = double>
std::vector<T> read(GgufType type, const std::string& bytes) {
  const auto blocks = static_cast<Index>(bytes.size() / block_bytes(type));
  std::vector<T> numbers(static_cast<std::size_t>(blocks * block_length(type)));
  dequantise(type, reinterpret_cast<const std::byte*>(bytes.data()),
             static_cast<Index>(numbers.size()), numbers.data());
  return numbers;
}

std::string write(GgufType type, const std::vector<float>& numbers) {
  const auto count = static_cast<Index>(numbers.size());
  std::string bytes(static_cast<std::size_t>(count / block_length(type)) * block_bytes(type), 'x');
  quantise("numbers", type, numbers.data(), count, reinterpret_cast<std::byte*>(bytes.data()));
  return bytes;
}

std::string from_hex(std::string_view text) {
  std::string bytes;
  for (std::size_t i = 0; i < text.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(std::string(text.substr(i, 2)), nullptr, 16));
  }
  return bytes;
}

char byte_of(int value) {
  return static_cast<char>(static_cast<std::uint8_t>(value));
}

/// Numbers between -0.8 and 1.8 that are multiples of 1/64.
std::vector<float> known_numbers(int count) {
  std::vector<float> numbers;
  numbers.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    const int sixty_fourths = (i * i * 7 + i * 37) % 101 - 50 + i / 32 * 9;
    numbers.push_back(static_cast<float>(sixty_fourths) / 64.0F);
  }
  return numbers;
}

/// The largest difference between `known_numbers` and what is read from `hex`.
double distance_from_known(GgufType type, std::string_view hex) {
  const std::vector<double> numbers = read(type, from_hex(hex));
  const std::vector<float> known = known_numbers(static_cast<int>(numbers.size()));
  double most = 0.0;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    most = std::max(most, std::abs(numbers[i] - static_cast<double>(known[i])));
  }
  return most;
}

double sum_of(GgufType type, std::string_view hex) {
  double sum = 0.0;
  float place = 1.0F;
  for (const float number : read<float>(type, from_hex(hex))) {
    sum += static_cast<double>(number * place++);
  }
  return sum;
}

// What ggml of llama.cpp v0.5.0 stores for `known_numbers` (ggml_quantize_chunk).
constexpr std::string_view kStoredQ40 = "402ea04710fc1949ab1fc68f6a77a6f86cf1";
constexpr std::string_view kStoredQ50 = "402af84649b1408e20f72382463f7cfdc3dd3cdfc7f3";
constexpr std::string_view kStoredQ80 =
    "4d1e81f1843a14123377df6b19ece2fb38981cc38e7c8ec31c9838fbe2ec196bdf77";
constexpr std::string_view kStoredQ4K =
    "36174d22faf9f7fa7f351f1d19050d0fb09790bb09790bbf968ea9e656d78b51496491ff7124e9d1eb1766e6894e"
    "263fe4a9808ab5037305ba9099b4f161e3976d6570bd1c9d4016fe18459314b77c64e6793e162f5ba919ab603730"
    "6ba818aa5e251d3875e46609efd7e11e7dfd9156a535c89d758eaaf879fbc1a7a1cb29892bcfa69eb9f766e89b62"
    "6974a1ff8134";
constexpr std::string_view kStoredQ6K =
    "f04c512fa5646dae285b46fbe81f7e1659cfdd518d4fb99a1231e8250a7578123ee6352cb9ae7a9da71911c107a5"
    "2a0688a355b06d02f4890584f1046bba50af664fd327510b90d0ca75f505eb61b2bd921a3522c92b380f80c4c273"
    "d604d376a0af79ed1c05b91f180388c8b378cff9c67ccdca91143430d436431eb201ee95100574421ea66e930577"
    "461129712658495a6700874e6193019e5a62a5184e68115004055444010540061516140145004405140505115518"
    "00514254140012553bc5c4c0d5b3a9a89b9f9f9291878082d60e";
constexpr std::string_view kStoredMxfp4 = "7c3fd9ff75f2d234f75b07b2aa2b70b57f";

}  // namespace

TEST_CASE("Blocks of four and five bits hold a scale and codes", "[io][gguf][golden]") {
  std::string fours = bytes_of<std::uint16_t>({kHalf});
  std::string fives = fours + bytes_of<std::uint32_t>({0xFFFF'0005});  // Fifth bits of 0, 2, 16..31
  for (int j = 0; j < 16; ++j) {
    const char pair = byte_of(j | ((15 - j) << 4));
    fours += pair;
    fives += pair;
  }
  const std::vector<double> four = read(GgufType::kQ4_0, fours);
  const std::vector<double> five = read(GgufType::kQ5_0, fives);
  for (std::size_t j = 0; j < 16; ++j) {
    const auto code = static_cast<double>(j);
    CHECK(four[j] == 0.5 * (code - 8));
    CHECK(four[j + 16] == 0.5 * (15 - code - 8));
    CHECK(five[j] == 0.5 * (code - (j == 0 || j == 2 ? 0 : 16)));
    CHECK(five[j + 16] == 0.5 * (15 - code));
  }
}

TEST_CASE("Blocks of eight bits hold a scale and signed codes", "[io][gguf][golden]") {
  std::string bytes;
  for (int code = -128; code < 128; ++code) {
    if ((code + 128) % 32 == 0) bytes += bytes_of<std::uint16_t>({kQuarter});
    bytes += byte_of(code);
  }
  const std::vector<double> numbers = read(GgufType::kQ8_0, bytes);
  REQUIRE(numbers.size() == 256);
  for (int i = 0; i < 256; ++i) CHECK(numbers[static_cast<std::size_t>(i)] == 0.25 * (i - 128));
}

TEST_CASE("Q4_K has a scale and an offset of six bits for each 32 numbers", "[io][gguf][golden]") {
  const std::vector<int> scales = {1, 63, 32, 0, 17, 48, 15, 63};
  const std::vector<int> offsets = {0, 5, 63, 16, 33, 62, 3, 48};
  std::string six(12, '\0');
  for (std::size_t g = 0; g < 4; ++g) {
    six[g] = byte_of(scales[g] | ((scales[g + 4] >> 4) << 6));
    six[g + 4] = byte_of(offsets[g] | ((offsets[g + 4] >> 4) << 6));
    six[g + 8] = byte_of((scales[g + 4] & 15) | ((offsets[g + 4] & 15) << 4));
  }
  const auto code = [](std::size_t i) { return static_cast<int>((i * 5 + i / 16 + i / 64) % 16); };
  std::string codes;
  for (std::size_t p = 0; p < 4; ++p) {
    for (std::size_t l = 0; l < 32; ++l) {
      codes += byte_of(code(64 * p + l) | (code(64 * p + 32 + l) << 4));
    }
  }
  const std::vector<double> numbers =
      read(GgufType::kQ4K, bytes_of<std::uint16_t>({kHalf, kQuarter}) + six + codes);
  for (std::size_t i = 0; i < 256; ++i) {
    CHECK(numbers[i] == 0.5 * scales[i / 32] * code(i) - 0.25 * offsets[i / 32]);
  }
}

TEST_CASE("Q6_K has a scale of eight bits for each 16 numbers", "[io][gguf][golden]") {
  const auto scale = [](std::size_t group) { return static_cast<int>(group) * 17 - 128; };
  const auto code = [](std::size_t i) { return static_cast<int>((i * 11 + i / 32) % 64); };
  std::string lows(128, '\0');
  std::string highs(64, '\0');
  for (std::size_t half = 0; half < 2; ++half) {
    for (std::size_t l = 0; l < 32; ++l) {
      const std::size_t i = 128 * half + l;
      lows[64 * half + l] = byte_of((code(i) & 15) | ((code(i + 64) & 15) << 4));
      lows[64 * half + 32 + l] = byte_of((code(i + 32) & 15) | ((code(i + 96) & 15) << 4));
      highs[32 * half + l] = byte_of((code(i) >> 4) | ((code(i + 32) >> 4) << 2) |
                                     ((code(i + 64) >> 4) << 4) | ((code(i + 96) >> 4) << 6));
    }
  }
  std::string scales;
  for (std::size_t group = 0; group < 16; ++group) scales += byte_of(scale(group));
  const std::vector<double> numbers =
      read(GgufType::kQ6K, lows + highs + scales + bytes_of<std::uint16_t>({kHalf}));
  for (std::size_t i = 0; i < 256; ++i) CHECK(numbers[i] == 0.5 * scale(i / 16) * (code(i) - 32));
}

TEST_CASE("MXFP4 has a power of two and numbers of four bits", "[io][gguf][golden]") {
  // The values of E2M1, from the table of the MX formats, version 1.0.
  const std::vector<double> values = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  for (const int exponent : {0, 1, 126, 127, 130, 254}) {
    std::string bytes(1, byte_of(exponent));
    for (int j = 0; j < 16; ++j) bytes += byte_of(j | ((15 - j) << 4));
    const double scale = std::ldexp(1.0, exponent - 127);
    const std::vector<double> numbers = read(GgufType::kMxfp4, bytes);
    const std::vector<float> floats = read<float>(GgufType::kMxfp4, bytes);
    for (std::size_t j = 0; j < 16; ++j) {
      const double value = scale * (j < 8 ? values[j] : -values[j - 8]);
      CHECK(numbers[j] == value);
      CHECK(numbers[31 - j] == value);
      CHECK(floats[j] == static_cast<float>(value));
    }
  }
}

TEST_CASE("Blocks that llama.cpp made have its values", "[io][gguf][golden]") {
  // Half a step of each kind's largest scale here, and a little more where scales are rounded too.
  CHECK(distance_from_known(GgufType::kQ4_0, kStoredQ40) < 0.0821);
  CHECK(distance_from_known(GgufType::kQ5_0, kStoredQ50) < 0.0333);
  CHECK(distance_from_known(GgufType::kQ8_0, kStoredQ80) < 0.0030);
  CHECK(distance_from_known(GgufType::kQ4K, kStoredQ4K) < 0.0551);
  CHECK(distance_from_known(GgufType::kQ6K, kStoredQ6K) < 0.0257);
  CHECK(distance_from_known(GgufType::kMxfp4, kStoredMxfp4) < 0.1094);

  // The sum over i of (i + 1) times the number i that ggml reads, each product rounded to 32 bits.
  CHECK(sum_of(GgufType::kQ4_0, kStoredQ40) == 11.1328125);
  CHECK(sum_of(GgufType::kQ5_0, kStoredQ50) == 6.298828125);
  CHECK(sum_of(GgufType::kQ8_0, kStoredQ80) == 9.0327606201171875);
  CHECK(sum_of(GgufType::kQ4K, kStoredQ4K) == 21934.452894210815);
  CHECK(sum_of(GgufType::kQ6K, kStoredQ6K) == 21933.409575939178);
  CHECK(sum_of(GgufType::kMxfp4, kStoredMxfp4) == 9.0);

  CHECK(write(GgufType::kQ8_0, known_numbers(32)) == from_hex(kStoredQ80));
}

TEST_CASE("Q8_0 is rounded as llama.cpp rounds it", "[io][gguf]") {
  std::vector<float> numbers(64, 0.0F);
  numbers[0] = 127.0F;
  numbers[1] = 0.5F;
  numbers[2] = -0.5F;
  numbers[3] = 1.5F;
  numbers[4] = -126.49F;
  const std::string bytes = write(GgufType::kQ8_0, numbers);
  const std::vector<double> back = read(GgufType::kQ8_0, bytes);
  CHECK(std::vector<double>(back.begin(), back.begin() + 6) ==
        std::vector<double>{127, 1, -1, 2, -126, 0});
  CHECK(bytes.substr(34) == std::string(34, '\0'));  // A block of zeros has no scale.

  // Numbers whose scale is below those of 16, or even of 32 bits.
  for (const float tiny : {1e-8F, std::numeric_limits<float>::denorm_min()}) {
    const std::string block = write(GgufType::kQ8_0, std::vector<float>(32, tiny));
    CHECK(read(GgufType::kQ8_0, block)[0] == 0.0);
    CHECK(block.substr(2) == std::string(32, tiny == 1e-8F ? '\x7f' : '\0'));
  }
  const double most = 127.0 * 65504.0;
  const std::vector<float> large(32, static_cast<float>(-most));
  CHECK(read(GgufType::kQ8_0, write(GgufType::kQ8_0, large))[31] == -most);
}

TEST_CASE("Kinds that store each number alone keep it or round it", "[io][gguf]") {
  const std::vector<float> numbers = {1.0F, -3.140625F, 0.0F, 1024.5F};
  for (const GgufType type : {GgufType::kF32, GgufType::kF16, GgufType::kBF16}) {
    const std::string bytes = write(type, numbers);
    CHECK(bytes.size() == 4 * block_bytes(type));
    const std::vector<float> back = read<float>(type, bytes);
    CHECK(std::vector<float>(back.begin(), back.end() - 1) ==
          std::vector<float>{1.0F, -3.140625F, 0.0F});
    CHECK(back[3] == (type == GgufType::kF32 ? 1024.5F : 1024.0F));  // Halfway, to even.
  }
  CHECK(read(GgufType::kF64, bytes_of<double>({0.1})) == std::vector<double>{0.1});
}

TEST_CASE("What Q8_0 cannot hold is named", "[io][gguf]") {
  const auto complaint = [](float number) {
    std::vector<float> numbers(32, 1.0F);
    numbers[7] = number;
    return test::message_of<ConfigError>([&] { write(GgufType::kQ8_0, numbers); });
  };
  const std::string expected = ", expected magnitudes up to 8.31901e+06 for Q8_0";
  CHECK(complaint(1e30F) == "numbers: has the number 1e+30" + expected);
  CHECK(complaint(-std::numeric_limits<float>::infinity()) ==
        "numbers: has the number -inf" + expected);
  CHECK(complaint(std::numeric_limits<float>::quiet_NaN()) ==
        "numbers: has the number nan" + expected);
}

TEST_CASE("A part of a tensor is read as it stands in the whole", "[io][gguf]") {
  const std::string bytes = write(GgufType::kQ8_0, known_numbers(256));
  const GgufTensor tensor{GgufType::kQ8_0, {4, 64}, std::as_bytes(std::span(bytes))};
  const std::vector<float> whole = read<float>(GgufType::kQ8_0, bytes);
  std::vector<float> part(96);
  dequantise(tensor, 64, 96, part.data());
  CHECK(part == std::vector<float>(whole.begin() + 64, whole.begin() + 160));
  REQUIRE_NOTHROW(dequantise(tensor, 256, 0, part.data()));

  const auto complaint = [&](Index first, Index count) {
    return test::message_of<ConfigError>([&] { dequantise(tensor, first, count, part.data()); });
  };
  const std::string expected = ", expected multiples of 32 within 256 numbers";
  CHECK(complaint(16, 32) == "dequantise: first = 16, count = 32" + expected);
  CHECK(complaint(0, 16) == "dequantise: first = 0, count = 16" + expected);
  CHECK(complaint(-32, 32) == "dequantise: first = -32, count = 32" + expected);
  CHECK(complaint(0, -32) == "dequantise: first = 0, count = -32" + expected);
  CHECK(complaint(224, 64) == "dequantise: first = 224, count = 64" + expected);
}

TEST_CASE("Kinds have the format's numbers and names", "[io][gguf]") {
  CHECK(name_of(GgufType::kQ4_0) == "Q4_0");
  CHECK(name_of(GgufType::kQ5_0) == "Q5_0");
  CHECK(name_of(GgufType::kQ8_0) == "Q8_0");
  CHECK(name_of(GgufType::kQ4K) == "Q4_K");
  CHECK(name_of(GgufType::kQ6K) == "Q6_K");
  CHECK(name_of(GgufType::kF64) == "F64");
  CHECK(name_of(GgufType::kBF16) == "BF16");
  CHECK(name_of(GgufType::kMxfp4) == "MXFP4");
  CHECK(gguf_type_numbered(12) == GgufType::kQ4K);
  CHECK_FALSE(gguf_type_numbered(13));
  CHECK_FALSE(gguf_type_numbered(43));
  CHECK(gguf_type_text(13) == "Q5_K");
  CHECK(gguf_type_text(40) == "NVFP4");
  CHECK(gguf_type_text(36) == "36");
  CHECK(gguf_type_text(43) == "43");
}

}  // namespace weir::gguf_numbers_test
