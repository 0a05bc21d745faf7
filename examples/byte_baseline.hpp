// SPDX-License-Identifier: MIT
/// \file
/// Byte models of order 0, 1 and 2, for a language model to beat.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>
#include <vector>

/// Predicts a byte from the `order` bytes before it, with Witten-Bell smoothing: the counts of each
/// context are interpolated with the model of the next shorter one,
///
///     p_n(b | c) = (count(c b) + kinds(c) p_{n-1}(b | c')) / (count(c) + kinds(c))
///
/// where kinds(c) is how many different bytes followed c; p_{-1} = 1/256.
/// (Witten & Bell 1991, doi:10.1109/18.87000, method C.)
class ByteBaseline {
 public:
  static constexpr int kHighest = 2;

  /// A model that has seen nothing.
  ByteBaseline() {
    std::size_t contexts = 1;
    for (Order& order : orders_) {
      order.count.assign(contexts * 256, 0);
      order.total.assign(contexts, 0);
      order.kinds.assign(contexts, 0);
      contexts *= 256;
    }
  }

  /// Counts the bytes of `text` from `begin` on, each in the context of those before it. Up to 2^32
  /// bytes can be counted.
  void add(std::string_view text, std::size_t begin = 0) {
    for (std::size_t i = begin; i < text.size(); ++i) {
      for (std::size_t n = 0; n <= kHighest && n <= i; ++n) {
        Order& order = orders_[n];
        const std::size_t context = context_of(text, i, n);
        std::uint32_t& count = order.count[context * 256 + byte(text[i])];
        order.kinds[context] += count == 0 ? 1 : 0;
        ++count;
        ++order.total[context];
      }
    }
  }

  /// Bits needed for `text[i]`, given the `order` bytes before it; i >= order.
  double bits(std::string_view text, std::size_t i, int order) const {
    double p = 1.0 / 256.0;
    for (std::size_t n = 0; n <= static_cast<std::size_t>(order); ++n) {
      const std::size_t context = context_of(text, i, n);
      const double kinds = orders_[n].kinds[context];
      if (kinds == 0.0) break;  // Never seen: the shorter context's word stands.
      p = (orders_[n].count[context * 256 + byte(text[i])] + kinds * p) /
          (orders_[n].total[context] + kinds);
    }
    return -std::log2(p);
  }

 private:
  struct Order {
    std::vector<std::uint32_t> count, total, kinds;
  };

  static std::size_t byte(char c) { return static_cast<unsigned char>(c); }

  static std::size_t context_of(std::string_view text, std::size_t i, std::size_t order) {
    std::size_t context = 0;
    for (std::size_t n = order; n > 0; --n) context = context * 256 + byte(text[i - n]);
    return context;
  }

  std::array<Order, kHighest + 1> orders_;
};
