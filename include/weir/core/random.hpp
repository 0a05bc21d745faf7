// SPDX-License-Identifier: MIT
/// \file
/// Random numbers that are the same with every compiler and standard library. (Those of <random>
/// are not, since each library may define its distributions as it likes.)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <utility>

#include <weir/core/types.hpp>

namespace weir {

/// Scrambles 64 bits so that neighbouring inputs give unrelated outputs:
/// splitmix64 (Steele, Lea & Flood 2014, doi:10.1145/2714064.2660195).
constexpr std::uint64_t mix_bits(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15U;
  x = (x ^ (x >> 30U)) * 0xBF58476D1CE4E5B9U;
  x = (x ^ (x >> 27U)) * 0x94D049BB133111EBU;
  return x ^ (x >> 31U);
}

/// The upper 53 bits of `bits` as a number in [0, 1).
constexpr double unit_interval(std::uint64_t bits) {
  return static_cast<double>(bits >> 11U) * 0x1.0p-53;
}

/// A stream of random numbers given by a seed and a position. Draw n of stream s is
/// `mix_bits(s + n * odd)`. Its state is two integers, so it can be saved, and any draw can be made
/// out of order, from any thread (`at`).
class Rng {
 public:
  explicit constexpr Rng(std::uint64_t seed = 0) : stream_(mix_bits(seed)) {}

  /// The next 64 random bits.
  constexpr std::uint64_t bits() { return at(position_++); }

  /// The bits of draw number `position` of this stream.
  constexpr std::uint64_t at(std::uint64_t position) const {
    return mix_bits(stream_ + position * 0xD1342543DE82EF95U);
  }

  /// Uniform in [0, 1).
  constexpr double uniform() { return unit_interval(bits()); }

  /// Uniform in [low, high).
  constexpr double uniform(double low, double high) { return low + (high - low) * uniform(); }

  /// Uniform in {0, ..., count - 1}; count > 0.
  constexpr Index below(Index count) {
    return static_cast<Index>(uniform() * static_cast<double>(count));
  }

  /// Standard normal (Box and Muller 1958).
  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(2.0 * std::numbers::pi * uniform());
  }

  /// Standard normal, drawn again until it lies within `bound` standard deviations.
  double truncated_normal(double bound = 2.0) {
    double draw = normal();
    while (std::abs(draw) > bound) draw = normal();
    return draw;
  }

  /// An independent stream, for handing to a part of the program.
  constexpr Rng split() {
    Rng part(bits());
    part.leaves_unset_ = leaves_unset_;
    return part;
  }

  /// For layers whose weights are going to be loaded: initial weights that would be drawn from it
  /// are left unset, in memory that the program has asked for but not touched yet. Other draws are
  /// those of Rng(0).
  static constexpr Rng unset() {
    Rng rng;
    rng.leaves_unset_ = true;
    return rng;
  }
  constexpr bool leaves_unset() const { return leaves_unset_; }

  constexpr std::uint64_t stream() const { return stream_; }
  constexpr std::uint64_t position() const { return position_; }

  /// The stream that `stream()` and `position()` were read from.
  static constexpr Rng restore(std::uint64_t stream, std::uint64_t position) {
    Rng rng;
    rng.stream_ = stream;
    rng.position_ = position;
    return rng;
  }

 private:
  std::uint64_t stream_;
  std::uint64_t position_ = 0;
  bool leaves_unset_ = false;
};

/// Draws `count` of the items without replacement, all with the same probability, and puts them
/// behind the others, the first one drawn last. (Durstenfeld 1964, doi:10.1145/364520.364540.)
/// \param count    At most the number of items.
template <class Items>
void draw_to_back(Items& items, Index count, Rng& rng) {
  const auto all = static_cast<Index>(items.size());
  for (Index i = all; i-- > all - count;) {
    std::swap(*(items.begin() + i), *(items.begin() + rng.below(i + 1)));
  }
}

/// Puts the items in random order.
template <class Items>
void shuffle(Items& items, Rng& rng) {
  draw_to_back(items, std::max<Index>(0, static_cast<Index>(items.size()) - 1), rng);
}

}  // namespace weir
