// SPDX-License-Identifier: MIT
/// \file
/// Pictures of digits, drawn here: nothing has to be downloaded.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/core/types.hpp>

inline constexpr weir::Index kSide = 8;    ///< Pixels of a row and of a column.
inline constexpr weir::Index kLevels = 4;  ///< Of brightness.

/// The names of the digits.
inline constexpr std::array<const char*, 10> kDigitNames = {
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"};

/// A picture of a digit, row by row, each pixel a level from 0 to kLevels - 1: a stroke pattern of
/// 5 by 7 pixels at a random place, with ink that varies from picture to picture and from pixel to
/// pixel, and with specks.
inline std::vector<weir::Index> draw_digit(std::size_t digit, weir::Rng& rng) {
  constexpr weir::Index kWidth = 5;
  constexpr weir::Index kHeight = 7;
  constexpr double kSpecks = 0.02;
  static constexpr std::array<const char*, 10> kStrokes = {
      " ### #   ##   ##   ##   ##   # ### ", "  #   ##    #    #    #    #   ### ",
      " ### #   #    #   #   #   #   #####", " ### #   #    #  ##     ##   # ### ",
      "   #   ##  # # #  # #####   #    # ", "######    ####     #    ##   # ### ",
      " ### #    #    #### #   ##   # ### ", "#####    #   #   #    #    #    #  ",
      " ### #   ##   # ### #   ##   # ### ", " ### #   ##   # ####    #    # ### "};
  const weir::Index left = rng.below(kSide - kWidth + 1);
  const weir::Index top = rng.below(kSide - kHeight + 1);
  const double ink = rng.uniform(1.5, 3.0);
  std::vector<weir::Index> pixels;
  for (weir::Index y = 0; y < kSide; ++y) {
    for (weir::Index x = 0; x < kSide; ++x) {
      const weir::Index row = y - top;
      const weir::Index column = x - left;
      const bool inside = row >= 0 && row < kHeight && column >= 0 && column < kWidth;
      const bool stroke =
          inside && kStrokes[digit][static_cast<std::size_t>(row * kWidth + column)] == '#';
      const double level = stroke ? ink + rng.uniform(-0.7, 0.7) : 0.0;
      const bool speck = rng.uniform() < kSpecks;
      const auto shown = speck ? rng.below(kLevels) : static_cast<weir::Index>(level + 0.5);
      pixels.push_back(std::clamp<weir::Index>(shown, 0, kLevels - 1));
    }
  }
  return pixels;
}
