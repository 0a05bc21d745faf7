// SPDX-License-Identifier: MIT
/// \file
/// What the machine can do at best: arithmetic without memory, and memory without arithmetic.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstddef>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include <benchmark/benchmark.h>

#include <weir/core/aligned.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/dot_block.hpp>
#include <weir/kernels/register_block.hpp>
#include <weir/kernels/tiles.hpp>
#include <weir/ops/lanes.hpp>

#include "support/clock.hpp"

namespace weir::bench {

/// The numbers that weights are stored as, and that the processor then multiplies.
enum class Precision { kFloat32, kBfloat16, kInt8 };

namespace detail {

/// Runs `chunk(thread)`, which returns how much work it did, again and again for `seconds` on all
/// threads of weir, which begin together. Returns the work per second, summed over the threads.
/// Not to be called from inside a parallel loop: there, the threads would wait for each other.
template <class Chunk>
double total_rate(double seconds, Chunk&& chunk) {
  const int threads = weir::threads();
  std::vector<double> rate(static_cast<std::size_t>(threads));
  std::atomic<int> arrived = 0;
  parallel_for(threads, [&](Index thread) {
    // A thread that waits here cannot take another iteration: each thread runs exactly one.
    arrived.fetch_add(1);
    while (arrived.load() < threads) std::this_thread::yield();
    const Clock::time_point begin = Clock::now();
    double work = 0.0;
    double elapsed = 0.0;
    do {
      work += chunk(thread);
      elapsed = seconds_since(begin);
    } while (elapsed < seconds);
    rate[static_cast<std::size_t>(thread)] = work / elapsed;
  });
  return std::accumulate(rate.begin(), rate.end(), 0.0);
}

using Vector = Lanes<float>;

/// Enough independent sums to keep two units busy whose results take four cycles or five, and few
/// enough to stay in registers beside two operands.
inline constexpr int kSums = kernels::kVectorRegisters == 32 ? 24 : 12;
inline constexpr int kRepeats = 4096;

/// Multiply-adds between registers; returns how many operations. Every step depends on the one
/// before, so that none can be computed ahead of the loop.
inline double multiply_add(Index /*thread*/) {
  Vector factor = Vector{} + 0.999F;
  Vector term = Vector{} + 0.001F;
  benchmark::DoNotOptimize(factor);
  benchmark::DoNotOptimize(term);
  Vector sum[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sum[i] = term * static_cast<float>(i);
#pragma GCC unroll 1
  for (int step = 0; step < kRepeats; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = sum[i] * factor + term;
  }
#pragma GCC unroll 32
  for (int i = 1; i < kSums; ++i) sum[0] += sum[i];
  benchmark::DoNotOptimize(sum[0]);
  return 2.0 * kSums * kRepeats * static_cast<double>(kLanes<float>);
}

/// The same with bytes, four of them in each lane, whose products are summed up in 32 bits.
inline double multiply_add_bytes(Index /*thread*/) {
  using kernels::detail::Words;
  Words factor = Words{} + 0x01010101;
  Words term = Words{} + 0x02010201;
  benchmark::DoNotOptimize(factor);
  benchmark::DoNotOptimize(term);
  Words sum[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sum[i] = Words{} + i;
#pragma GCC unroll 1
  for (int step = 0; step < kRepeats; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) sum[i] = kernels::detail::dot_of_bytes(sum[i], factor, term);
    benchmark::DoNotOptimize(term);  // The products are not to be kept for the next step.
  }
#pragma GCC unroll 32
  for (int i = 1; i < kSums; ++i) sum[0] += sum[i];
  benchmark::DoNotOptimize(sum[0]);
  return 2.0 * 4.0 * kSums * kRepeats * static_cast<double>(kLanes<float>);
}

#if defined(__AVX512BF16__)
/// The same with pairs of bfloat16 numbers.
inline double multiply_add_bfloat16(Index /*thread*/) {
  __m512i factor = _mm512_set1_epi32(0x3f803f80);  // Pairs of ones.
  __m512i term = _mm512_set1_epi32(0x3a803a80);
  benchmark::DoNotOptimize(factor);
  benchmark::DoNotOptimize(term);
  __m512 sum[kSums];
#pragma GCC unroll 32
  for (int i = 0; i < kSums; ++i) sum[i] = _mm512_set1_ps(static_cast<float>(i));
#pragma GCC unroll 1
  for (int step = 0; step < kRepeats; ++step) {
#pragma GCC unroll 32
    for (int i = 0; i < kSums; ++i) {
      sum[i] =
          _mm512_dpbf16_ps(sum[i], std::bit_cast<__m512bh>(factor), std::bit_cast<__m512bh>(term));
    }
  }
#pragma GCC unroll 32
  for (int i = 1; i < kSums; ++i) sum[0] = _mm512_add_ps(sum[0], sum[i]);
  benchmark::DoNotOptimize(sum[0]);
  constexpr double kPairs = 16.0;
  return 2.0 * 2.0 * kPairs * kSums * kRepeats;
}
#endif

#if WEIR_TILES
/// The same in tiles, of bfloat16 numbers or of bytes: four independent sums keep the unit busy.
template <bool bytes>
double multiply_add_tiles(Index /*thread*/) {
  constexpr double kInputs = bytes ? 64.0 : 32.0;
  kernels::TileScope tiles;
  tiles.set_rows(kernels::TileScope::kRows);  // Which makes all tiles zero.
#pragma GCC unroll 1
  for (int step = 0; step < kRepeats; ++step) {
    if constexpr (bytes) {
      _tile_dpbusd(0, 4, 5);
      _tile_dpbusd(1, 4, 6);
      _tile_dpbusd(2, 4, 7);
      _tile_dpbusd(3, 4, 5);
    } else {
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 4, 5);
    }
  }
  return 2.0 * 4.0 * 16.0 * 16.0 * kInputs * kRepeats;
}
#endif

/// Memory far larger than the caches, read front to back and over again. Where one reading ends the
/// next goes on, so that short ones do not find their data in a cache either.
class Stream {
 public:
  Stream() : position_(static_cast<std::size_t>(weir::threads())) {
    constexpr Index kPiece = Index{1} << 20;
    parallel_for(kCount / kPiece,
                 [&](Index i) { std::fill_n(memory_.get() + i * kPiece, kPiece, 1.0F); });
  }

  /// Bytes per second, each thread of weir reading a part of its own in `streams` places at once.
  template <int streams>
  double read(double seconds) {
    // Lines of 16 floats, shared out to the threads and to their streams in whole steps.
    constexpr Index kStep = 64;
    constexpr Index kSteps = 1024;
    const Index share = kCount / weir::threads() / (streams * kStep) * kStep;
    position_.resize(static_cast<std::size_t>(weir::threads()));
    return total_rate(seconds, [&](Index thread) {
      Index& position = position_[static_cast<std::size_t>(thread)].value;
      if (position + kStep * kSteps > share) position = 0;
      const float* from = memory_.get() + thread * share * streams + position;
      position += kStep * kSteps;
      constexpr Index kVectors = kStep / kLanes<float>;
      Vector sum[streams] = {};
      for (Index step = 0; step < kSteps; ++step, from += kStep) {
#pragma GCC unroll 8
        for (Index s = 0; s < streams; ++s) {
#pragma GCC unroll 16
          for (Index i = 0; i < kVectors; ++i) {
            sum[s] += load_lanes<float>(from + s * share + i * kLanes<float>);
          }
        }
      }
      for (Vector& part : sum) benchmark::DoNotOptimize(part);
      return static_cast<double>(streams * kStep * kSteps) * sizeof(float);
    });
  }

 private:
  static constexpr Index kCount = Index{1} << 27;  ///< Floats: 512 MiB.

  /// Where a thread goes on reading, on a cache line of its own.
  struct alignas(64) Position {
    Index value = 0;
  };

  static constexpr auto kSize = static_cast<std::size_t>(kCount);

  std::shared_ptr<float[]> memory_ =  // NOLINT(modernize-avoid-c-arrays)
      SharedMemory(SharedMemory::bytes_of<float>(kSize)).take<float>(kSize);
  std::vector<Position> position_;
};

/// The one of this program, made at first use.
inline Stream& stream() {
  static Stream stream;
  return stream;
}

}  // namespace detail

/// FLOP/s of multiply-adds of numbers of `precision` in registers, on as many threads as weir uses
/// at the moment, at the vector width this program is compiled for, or in tiles where this process
/// may use them. Bfloat16 counts as float32 where the processor does not multiply it; for kInt8
/// operations are on integers. Takes about `seconds`.
inline double peak_flops(Precision precision, double seconds) {
#if WEIR_TILES
  if (kernels::uses_tiles() && precision != Precision::kFloat32) {
    return precision == Precision::kInt8
               ? detail::total_rate(seconds, detail::multiply_add_tiles<true>)
               : detail::total_rate(seconds, detail::multiply_add_tiles<false>);
  }
#endif
  if (precision == Precision::kInt8) {
    return detail::total_rate(seconds, detail::multiply_add_bytes);
  }
#if defined(__AVX512BF16__)
  if (precision == Precision::kBfloat16) {
    return detail::total_rate(seconds, detail::multiply_add_bfloat16);
  }
#endif
  return detail::total_rate(seconds, detail::multiply_add);
}

/// Bytes per second that weir's threads read from memory with plain loads, front to back, in one
/// place each or in four at once.
inline double read_one_stream(double seconds) {
  return detail::stream().read<1>(seconds);
}
inline double read_four_streams(double seconds) {
  return detail::stream().read<4>(seconds);
}

/// The better of one place and four. Takes about `seconds`.
inline double read_bandwidth(double seconds) {
  return std::max(read_one_stream(0.5 * seconds), read_four_streams(0.5 * seconds));
}

}  // namespace weir::bench
