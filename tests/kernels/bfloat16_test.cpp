// SPDX-License-Identifier: MIT
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/kernels/bfloat16.hpp>

#include "support/catch.hpp"

using weir::Index;
using weir::kernels::BFloat16;

TEST_CASE("BFloat16 rounds to the nearest number, ties to even", "[kernels][bfloat16]") {
  // Between 1 and 2 the numbers are 1/128 apart.
  const auto round = [](float x) { return static_cast<float>(BFloat16(x)); };
  CHECK(round(1.0F) == 1.0F);
  CHECK(round(1.0F + 0.9F / 256.0F) == 1.0F);
  CHECK(round(1.0F + 1.0F / 256.0F) == 1.0F);
  CHECK(round(1.0F + 1.1F / 256.0F) == 1.0F + 1.0F / 128.0F);
  CHECK(round(1.0F + 3.0F / 256.0F) == 1.0F + 2.0F / 128.0F);
  CHECK(round(-1.0F - 3.0F / 256.0F) == -1.0F - 2.0F / 128.0F);
  CHECK(std::signbit(round(-0.0F)));
}

TEST_CASE("BFloat16 keeps infinities and NaN", "[kernels][bfloat16]") {
  const float infinity = std::numeric_limits<float>::infinity();
  CHECK(static_cast<float>(BFloat16(infinity)) == infinity);
  CHECK(static_cast<float>(BFloat16(-infinity)) == -infinity);
  CHECK(static_cast<float>(BFloat16(std::numeric_limits<float>::max())) == infinity);
  CHECK(std::isnan(static_cast<float>(BFloat16(std::numeric_limits<float>::quiet_NaN()))));
  // One whose set bits are all in the half that is cut off.
  CHECK(std::isnan(static_cast<float>(BFloat16(std::bit_cast<float>(0x7f800001U)))));
}

TEST_CASE("Many numbers are rounded as each by itself", "[kernels][bfloat16]") {
  std::vector<float> from;
  for (int i = -50; i < 50; ++i)
    from.push_back(std::ldexp(1.0F + 0.0137F * static_cast<float>(i), i));
  from.push_back(std::numeric_limits<float>::quiet_NaN());
  from.push_back(std::numeric_limits<float>::infinity());
  std::vector<BFloat16> to(from.size());
  weir::kernels::round_to_bfloat16(static_cast<Index>(from.size()), from.data(), to.data());
  for (std::size_t i = 0; i < from.size(); ++i) {
    INFO(from[i]);
    if (std::isnan(from[i])) {
      CHECK(std::isnan(static_cast<float>(to[i])));
    } else {
      CHECK(to[i].value == BFloat16(from[i]).value);
    }
  }
}
