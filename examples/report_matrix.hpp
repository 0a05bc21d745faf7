// SPDX-License-Identifier: MIT
/// \file
/// Many numbers of a report at once: as lists in a file, and packed on a page.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include <weir/analysis/bootstrap.hpp>

namespace report {

using Json = nlohmann::json;
using weir::Estimate;

/// A number with four digits, or null if it is not known.
inline Json number(double value) {
  if (!std::isfinite(value)) return nullptr;
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.4g", value);
  const double rounded = std::strtod(digits, nullptr);
  if (rounded != std::floor(rounded) || std::abs(rounded) > 1e15) return rounded;
  return static_cast<std::int64_t>(rounded);
}

/// [value, low, high, chance]
inline Json of(const Estimate& e) {
  return {number(e.value), number(e.low), number(e.high), number(e.chance)};
}

/// The same of many, as four lists.
inline Json lists_of(const std::vector<Estimate>& estimates) {
  Json json = {{"value", Json::array()},
               {"low", Json::array()},
               {"high", Json::array()},
               {"chance", Json::array()}};
  for (const Estimate& e : estimates) {
    json["value"].push_back(number(e.value));
    json["low"].push_back(number(e.low));
    json["high"].push_back(number(e.high));
    json["chance"].push_back(number(e.chance));
  }
  return json;
}

/// RFC 4648, with padding.
inline std::string base64(const std::vector<std::uint8_t>& bytes) {
  constexpr const char* kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    std::uint32_t bits = std::uint32_t{bytes[i]} << 16U;
    if (i + 1 < bytes.size()) bits |= std::uint32_t{bytes[i + 1]} << 8U;
    if (i + 2 < bytes.size()) bits |= bytes[i + 2];
    text += kDigits[bits >> 18U];
    text += kDigits[bits >> 12U & 63U];
    text += i + 1 < bytes.size() ? kDigits[bits >> 6U & 63U] : '=';
    text += i + 2 < bytes.size() ? kDigits[bits & 63U] : '=';
  }
  return text;
}

/// What `lists_of` has made, in five bytes for each estimate: its four numbers, none of which is
/// below 0, have ten bits each, the first the lowest ones. A code c is c / 1022 of "scale", the
/// largest number of all; 1023 is one that is not known.
inline Json packed(const Json& lists) {
  constexpr double kSteps = 1022.0;
  constexpr std::uint64_t kNone = 1023;
  double scale = 0.0;
  for (const auto& list : lists) {
    for (const Json& v : list) scale = std::max(scale, v.is_null() ? 0.0 : v.get<double>());
  }
  std::vector<std::uint8_t> data;
  for (std::size_t i = 0; i < lists["value"].size(); ++i) {
    std::uint64_t bits = 0;
    unsigned shift = 0;
    for (const char* const name : {"value", "low", "high", "chance"}) {
      const Json& v = lists[name][i];
      const double part = v.is_null() || scale == 0.0 ? 0.0 : v.get<double>() / scale;
      const auto code =
          v.is_null() ? kNone : static_cast<std::uint64_t>(std::lround(kSteps * part));
      bits |= code << shift;
      shift += 10;
    }
    for (unsigned b = 0; b < 5; ++b) data.push_back(static_cast<std::uint8_t>(bits >> 8U * b));
  }
  return {{"scale", scale}, {"data", base64(data)}};
}

}  // namespace report
