// SPDX-License-Identifier: MIT
/// \file
/// Products whose operands are rounded on their way.
#pragma once

#include <algorithm>
#include <cstddef>
#include <span>

#include <weir/core/index_span.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/panel.hpp>
#include <weir/kernels/product.hpp>
#include <weir/kernels/rounded_operand.hpp>
#include <weir/kernels/schedule.hpp>
#include <weir/kernels/tile_product.hpp>
#include <weir/kernels/tiles.hpp>

namespace weir::kernels {

/// A product, its left operand rounded, and the scales of the weight that is its right operand.
struct RoundedProduct {
  const Product<float>* product = nullptr;
  RoundedRows left = {};
  bool has_own_left = true;        ///< Else it has that of the product before it.
  float* weight_scales = nullptr;  ///< [depth, columns] / kTile in FP8, of a weight.
  Index tiles = 0, across = 0;     ///< How many tiles one below and one beside the other.

  Index panels() const {
    constexpr Index kCols = Block<float>::kCols;
    return (product->n + kCols - 1) / kCols;
  }
  Index panel_cost() const { return Block<float>::kCols * std::max<Index>(1, product->k); }

  /// The rows of the left operand from `row` on, from depth `begin` on.
  LeftRows<BFloat16Arithmetic> left_from(Index row, Index begin) const {
    return {left.values + row * left.row + begin, left.row, BFloat16Arithmetic::kDepth};
  }

  /// The numbers of panel j.
  RightPart part_of(Index j, Index begin, Index length) const {
    constexpr Index kCols = Block<float>::kCols;
    return {begin, length, j * kCols, std::min(kCols, product->n - j * kCols)};
  }
};

/// What products of a thread are computed with: tiles keep their shapes from panel to panel.
#if WEIR_TILES
using RoundedTiles = TileScope;
#else
struct RoundedTiles {};
#endif

/// Space of a thread for the panel and the sums it works on.
struct RoundedSpace {
  static constexpr Index kCols = Block<float>::kCols;
  static constexpr Index kGroup = 48;  ///< Rows whose sums in FP8 stay in L1.

  BFloat16* panel = nullptr;  ///< [2 kSlice, kCols]
  float* sums = nullptr;      ///< [Cut::kMostRows, kCols]
  float* scales = nullptr;    ///< [kCols]

  static RoundedSpace of_this_thread() {
    auto& panels = ThreadSpace<BFloat16, RoundedSpace>::of_this_thread();
    auto& numbers = ThreadSpace<float, RoundedSpace>::of_this_thread();
    panels.reserve(2 * kSlice * kCols);
    numbers.reserve((Cut::kMostRows + 1) * kCols);
    BFloat16* const panel = panels.take(2 * kSlice * kCols);
    float* const sums = numbers.take(Cut::kMostRows * kCols);
    return {panel, sums, numbers.take(kCols)};
  }
};

/// sums [rows, kCols] (+)= rows times a panel of bfloat16 numbers. A row has the same bits alone
/// and among others, in tiles too.
inline void multiply_rounded_panel([[maybe_unused]] RoundedTiles& tiles,
                                   LeftRows<BFloat16Arithmetic> left, Index rows,
                                   const BFloat16* panel, Index steps, float* sums,
                                   bool accumulate) {
#if WEIR_TILES
  if (uses_tiles()) {
    return multiply_panel_in_tiles(tiles, left, rows, panel, steps, sums, Block<float>::kCols,
                                   accumulate);
  }
#endif
  const PackedPanel<BFloat16Arithmetic> packed = {panel, nullptr, steps};
  multiply_panel<BFloat16Arithmetic>(left, rows, steps, packed, sums, Block<float>::kCols,
                                     accumulate);
}

/// c[0..rows, 0..kCols] (+)= `rows` rows from `row` on times panel j, as bfloat16 numbers.
inline void multiply_bfloat16(RoundedTiles& tiles, const RoundedProduct& r, Index row, Index rows,
                              Index j, const RoundedSpace& space, float* c, Index c_row,
                              bool accumulate) {
  constexpr Index kDepth = BFloat16Arithmetic::kDepth;
  constexpr Index kCols = Block<float>::kCols;
  const Product<float>& p = *r.product;
  if (p.k == 0) std::fill_n(space.sums, rows * kCols, 0.0F);
  for (Index begin = 0; begin < p.k; begin += kDepth * kSlice) {
    const RightPart part = r.part_of(j, begin, std::min(kDepth * kSlice, p.k - begin));
    pack_rounded(p, part, space.panel,
                 [](const Lanes<float>& x, Index /*vector*/) { return nearest_bfloat16(x); });
    multiply_rounded_panel(tiles, r.left_from(row, begin), rows, space.panel,
                           rounded_depth(part.length) / kDepth, space.sums, begin > 0);
  }
  for (Index i = 0; i < rows; ++i) {
    float* const to = c + i * c_row;
    const float* const from = space.sums + i * kCols;
    for (Index v = 0; v < kCols; v += kLanes<float>) {
      const Lanes<float> sum = load_lanes<float>(from + v);
      store_lanes<float>(accumulate ? load_lanes<float>(to + v) + sum : sum, to + v);
    }
  }
}

/// The same in FP8, kTile numbers of depth after the other:
///
///     c += (sum of the products of codes) * (scale of the row) * (scale of the column)
inline void multiply_e4m3(RoundedTiles& tiles, const RoundedProduct& r, Index row, Index rows,
                          Index j, const RoundedSpace& space, float* c, Index c_row,
                          bool accumulate) {
  constexpr Index kDepth = BFloat16Arithmetic::kDepth;
  constexpr Index kCols = Block<float>::kCols;
  const Product<float>& p = *r.product;
  for (Index i = 0; i < rows && p.k == 0 && !accumulate; ++i) {
    std::fill_n(c + i * c_row, kCols, 0.0F);
  }
  for (Index begin = 0; begin < p.k; begin += kTile) {
    const bool adds = accumulate || begin > 0;
    const RightPart part = r.part_of(j, begin, std::min(kTile, p.k - begin));
    pack_e4m3(p, part, r.weight_scales, r.across, space.panel, space.scales);
    for (Index first = 0; first < rows; first += RoundedSpace::kGroup) {
      const Index count = std::min(RoundedSpace::kGroup, rows - first);
      multiply_rounded_panel(tiles, r.left_from(row + first, begin), count, space.panel,
                             rounded_depth(part.length) / kDepth, space.sums, false);
      for (Index i = 0; i < count; ++i) {
        const float of_row = r.left.scales[(row + first + i) * r.left.blocks + begin / kTile];
        float* const to = c + (first + i) * c_row;
        for (Index v = 0; v < kCols; v += kLanes<float>) {
          const Lanes<float> sum = load_lanes<float>(space.sums + i * kCols + v);
          const Lanes<float> scaled = sum * of_row * load_lanes<float>(space.scales + v);
          store_lanes<float>(adds ? load_lanes<float>(to + v) + scaled : scaled, to + v);
        }
      }
    }
  }
}

/// Pieces `begin` to `end` of a product.
inline void multiply_pieces_of(const RoundedProduct& r, const Cut& cut, Index begin, Index end) {
  const Product<float>& p = *r.product;
  const RoundedSpace space = RoundedSpace::of_this_thread();
  RoundedTiles tiles;
  const ToMatrix<float> to = {p.out, p.out_row, p.n, p.accumulate};
  for (Index piece = begin; piece < end; ++piece) {
    const Index row = piece / cut.panels * cut.rows;
    const Index rows = std::min(cut.rows, cut.total_rows - row);
    const Index j = piece % cut.panels;
    to(row, rows, j, [&](float* c, Index c_row, bool accumulate) {
      const auto multiply_as = is_fp8(p) ? multiply_e4m3 : multiply_bfloat16;
      multiply_as(tiles, r, row, rows, j, space, c, c_row, accumulate);
    });
  }
}

/// Finds the scales of row `i` of the tiles of the weight.
inline void find_weight_scales(const RoundedProduct& r, Index i) {
  const Product<float>& p = *r.product;
  const Index depth = std::min(kTile, p.k - i * kTile);
  for (Index j = 0; j < r.across; ++j) {
    const Index cols = std::min(kTile, p.n - j * kTile);
    const float* const from = p.b + i * kTile * p.b_row + j * kTile * p.b_col;
    r.weight_scales[i * r.across + j] = p.b_row == 1 ? e4m3_tile_scale(from, p.b_col, cols, depth)
                                                     : e4m3_tile_scale(from, p.b_row, depth, cols);
  }
}

/// Gives each product its place for what is rounded, in space of this thread.
inline std::span<RoundedProduct> lay_out(std::span<const Product<float>> products) {
  const auto count = static_cast<Index>(products.size());
  auto& all = ThreadSpace<RoundedProduct, RoundedProduct>::of_this_thread();
  auto& values = ThreadSpace<RoundedLeft, RoundedRows>::of_this_thread();
  auto& scales =
      ThreadSpace<float, RoundedProduct>::of_this_thread();  // Values may be floats, too.
  all.reserve(count);
  const std::span<RoundedProduct> rounded = span_of(all.take(count), count);
  const auto tiles = [](Index length) { return (length + kTile - 1) / kTile; };
  Index value_count = 0;
  Index scale_count = 0;
  for (Index i = 0; i < count; ++i) {
    const Product<float>& p = element(products, i);
    const bool fp8 = is_fp8(p);
    RoundedProduct& r = element(rounded, i) = {.product = &p};
    // An odd number of cache lines of bfloat16 numbers, so that neighbouring rows are spread over
    // the cache.
    r.left.row = rounded_depth(p.k) / kRoundedDepth % 2 == 1 ? rounded_depth(p.k)
                                                             : rounded_depth(p.k) + kRoundedDepth;
    r.left.blocks = fp8 ? tiles(p.k) : 0;
    if (i > 0) {
      const Product<float>& before = element(products, i - 1);
      r.has_own_left = p.a != before.a || p.m != before.m || p.k != before.k ||
                       p.a_row != before.a_row || p.a_col != before.a_col ||
                       p.operands != before.operands;
    }
    if (fp8 && p.operands != Operands::kGradientAndTokens) {
      r.tiles = tiles(p.k);
      r.across = tiles(p.n);
    }
    if (r.has_own_left) {
      value_count += p.m * r.left.row;
      scale_count += p.m * r.left.blocks;
    }
    scale_count += r.tiles * r.across;
  }
  values.reserve(value_count);
  scales.reserve(scale_count);
  for (Index i = 0; i < count; ++i) {
    RoundedProduct& r = element(rounded, i);
    r.weight_scales = scales.take(r.tiles * r.across);
    if (r.has_own_left) {
      r.left.values = values.take(r.product->m * r.left.row);
      r.left.scales = scales.take(r.product->m * r.left.blocks);
    } else {
      r.left = element(rounded, i - 1).left;
    }
  }
  return rounded;
}

/// Computes products of one precision, which is not kFull. All threads share the pieces of all
/// products.
inline void multiply_rounded(std::span<const Product<float>> products) {
  constexpr Index kRows = kLanes<float>;
  const auto count = static_cast<Index>(products.size());
  const std::span<RoundedProduct> rounded = lay_out(products);
  parallel_pieces_of(
      2 * count,
      [&](Index i) -> Pieces {
        const RoundedProduct& r = element(rounded, i / 2);
        constexpr Index kCost = 8;  // Of rounding a number.
        const Index depth = std::max<Index>(1, r.product->k);
        if (i % 2 == 0) {
          const Index rows = r.has_own_left ? (r.product->m + kRows - 1) / kRows : 0;
          return {rows, kCost * kRows * depth};
        }
        return {r.tiles, kTile * std::max<Index>(1, r.product->n)};
      },
      [&](Index i, Index begin, Index end) {
        const RoundedProduct& r = element(rounded, i / 2);
        for (Index piece = begin; piece < end; ++piece) {
          if (i % 2 == 1) {
            find_weight_scales(r, piece);
          } else {
            const Index row = piece * kRows;
            round_left(*r.product, row, std::min(kRows, r.product->m - row), r.left);
          }
        }
      });
  const Index most_rows = most_rows_for_threads([&](Index rows) {
    Index pieces = 0;
    for (const RoundedProduct& r : rounded) {
      pieces += Cut::of(r.product->m, r.panels(), rows).pieces(1).count;
    }
    return pieces;
  });
  const auto cut_of = [&](const RoundedProduct& r) {
    return Cut::of(r.product->m, r.panels(), most_rows);
  };
  parallel_pieces_of(
      count,
      [&](Index i) {
        const RoundedProduct& r = element(rounded, i);
        return cut_of(r).pieces(r.panel_cost());
      },
      [&](Index i, Index begin, Index end) {
        const RoundedProduct& r = element(rounded, i);
        multiply_pieces_of(r, cut_of(r), begin, end);
      });
}

/// What computes products in `precision`; null for kFull.
inline const RoundedProducts* rounded_products(Precision precision) {
  static constexpr RoundedProducts kBfloat16 = {Precision::kBfloat16, multiply_rounded};
  static constexpr RoundedProducts kFp8 = {Precision::kFp8, multiply_rounded};
  if (precision == Precision::kFull) return nullptr;
  return precision == Precision::kFp8 ? &kFp8 : &kBfloat16;
}

}  // namespace weir::kernels
