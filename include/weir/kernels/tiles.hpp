// SPDX-License-Identifier: MIT
/// \file
/// The processor's tiles, registers of 16 rows that are multiplied as matrices (Intel AMX), and
/// the permission to use them.
#pragma once

#include <atomic>
#include <cstdint>

#include <weir/core/types.hpp>

/// 1 where the compiler's target has tiles of bytes and of bfloat16 numbers. Clang 14 spells the
/// macros of AMX without the second underscore.
#if defined(__linux__) && defined(__AVX512BF16__) && defined(__AVX512VNNI__) &&   \
    ((defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__)) || \
     (defined(__AMXTILE__) && defined(__AMXBF16__) && defined(__AMXINT8__)))
#define WEIR_TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#else
#define WEIR_TILES 0
#endif

namespace weir::kernels {

/// Whether this program was compiled for a processor with tiles.
inline constexpr bool kHasTiles = WEIR_TILES == 1;

namespace detail {

/// Asks the system to let this process use tiles, which make the state of a thread 8 KiB larger.
/// It refuses if it is too old, if the machine is virtual and does without, or if a thread has a
/// stack for signals that is too small.
inline bool ask_for_tiles() {
#if WEIR_TILES
  constexpr long kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;     // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

inline std::atomic<bool>& tiles_in_use() {
  static std::atomic<bool> in_use = ask_for_tiles();  // Asked once, before the first product.
  return in_use;
}

}  // namespace detail

/// Whether products of bfloat16 numbers and of codes are computed in tiles: wherever the program
/// was compiled for a processor that has them and the system gives permission, unless `use_tiles`
/// says otherwise.
inline bool uses_tiles() {
  return kHasTiles && detail::tiles_in_use().load(std::memory_order_relaxed);
}

/// Makes products of bfloat16 numbers and of codes do without tiles, for results to the bit as on a
/// processor that has the instruction for pairs but no tiles; or lets them use tiles again. Not to
/// be called while a product is computed: results are those of one way or of the other. Returns
/// `uses_tiles()`, which stays false where there are none.
inline bool use_tiles(bool use) {
  static const bool granted = detail::tiles_in_use().load();
  detail::tiles_in_use().store(use && granted);
  return uses_tiles();
}

#if WEIR_TILES
/// Gives the calling thread the shapes of tiles for as long as it lives: tiles 0 to 3 for sums, 4
/// for the left operand and 5 to 7 for the right one.
class TileScope {
 public:
  static constexpr Index kRows = 16;
  static constexpr Index kLine = 64;  ///< Bytes.

  TileScope() = default;
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
  ~TileScope() {
    if (rows_ > 0) _tile_release();
  }

  /// Sets the rows of the left operand and of sums, and how many words of four bytes a product
  /// takes from a line of the left operand, which are the rows of the right one. Lines of sums and
  /// of the right operand have 64 bytes. If that changes anything, all tiles become zero.
  /// \param rows    1 to kRows.
  /// \param depth   1 to kRows.
  void set_rows(Index rows, Index depth = kRows) {
    if (rows == rows_ && depth == depth_) return;
    Shapes shapes;
    for (int tile = 0; tile < 8; ++tile) {
      shapes.line[tile] = static_cast<std::uint16_t>(tile == 4 ? 4 * depth : kLine);
      shapes.rows[tile] = static_cast<std::uint8_t>(tile < 5 ? rows : depth);
    }
    // GCC's own function does not tell the compiler that all of `shapes` is read.
    asm volatile("ldtilecfg %0" : : "m"(shapes));
    rows_ = rows;
    depth_ = depth;
  }

 private:
  /// The memory form of a configuration.
  struct alignas(64) Shapes {
    std::uint8_t palette = 1;
    std::uint8_t start_row = 0;
    std::uint8_t reserved[14] = {};
    std::uint16_t line[16] = {};
    std::uint8_t rows[16] = {};
  };
  static_assert(sizeof(Shapes) == 64);

  Index rows_ = 0, depth_ = 0;
};
#endif

}  // namespace weir::kernels
