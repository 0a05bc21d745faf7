// SPDX-License-Identifier: MIT
/// \file
/// The precision of the products in which weights are trained.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include <weir/core/enum_names.hpp>

namespace weir {

/// How the three products with a weight W [out, in] are computed while W is a parameter:
///
///     y = x W^T,    dx = dy W,    dW += dy^T x
///
/// Weights, gradients and everything between the products stay in float; the operands are rounded
/// on their way into a product, and sums are float. Gradients are straight-through: `backward`
/// computes the formulas above with rounded operands, as if rounding were the identity. (The
/// derivative of rounding itself is zero almost everywhere.) Forward passes that do not train round
/// in the same way, so that a validation judges the model that is trained.
enum class Precision : std::uint8_t {
  /// Operands are not rounded.
  kFull,
  /// Operands become the nearest bfloat16 numbers (8 bits of significand).
  kBfloat16,
  /// Operands become FP8 (E4M3, 4 bits of significand) with a scale for each tile, as DeepSeek-V3
  /// was trained (arXiv:2412.19437, section 3.3):
  ///
  ///     x    tiles of 1 token x 128 inputs in y, of 128 tokens x 1 input in dW
  ///     dy   tiles of 1 token x 128 outputs in dx, of 128 tokens x 1 output in dW
  ///     W    tiles of 128 x 128
  ///
  /// A scale is (the largest magnitude of the tile) / 448; for x it is the next power of two, so
  /// that x loses next to nothing where it goes from one kind of tiles to the other. Products of
  /// 128 numbers are added up by themselves, multiplied by the scales of both tiles and added in
  /// float. Tiles of tokens begin with the first token of the batch, or of the expert.
  ///
  /// What is kept for `backward` (section 3.3.3): `Linear`, `Glu`, `GluBank` and attention keep
  /// their inputs in FP8 with these scales, which are what a norm before them yields; `Glu`
  /// and `GluBank` keep gate and up so, too, and compute act(gate) * up again. In full stay what
  /// norms
  /// are given, queries, keys and values, the heads' outputs (which DeepSeek-V3 keeps in 12 bits),
  /// expert outputs, and the inputs of other layers. `DecoderConfig::recompute` keeps even less.
  kFp8,
};

template <class T>
struct Product;

/// A precision other than kFull, and the code that computes products in it: programs that do not
/// ask for it do without.
struct RoundedProducts {
  Precision precision = Precision::kFull;
  void (*multiply)(std::span<const Product<float>> products) = nullptr;
};

/// Short names of the precisions, in the order of the enumeration.
inline constexpr std::array<std::string_view, 3> kPrecisionNames = {"fp32", "bf16", "fp8"};

constexpr std::string_view name_of(Precision precision) {
  return kPrecisionNames[static_cast<std::size_t>(precision)];
}

/// The precision of that name; nothing if there is none.
constexpr std::optional<Precision> precision_named(std::string_view name) {
  return value_named<Precision>(kPrecisionNames, name);
}

}  // namespace weir
