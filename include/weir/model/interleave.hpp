// SPDX-License-Identifier: MIT
/// \file
/// Which layers of a decoder are sparse.
#pragma once

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Tells which layers of a decoder are mixtures of experts; the others are dense:
///
///     layer i is sparse   if and only if   i >= first_dense  and  i % stride == phase
///
/// Layers count from 0. (GShard, Switch: {.stride = 2}; Mixtral: {}; DeepSeek-V3:
/// {.first_dense = 3}; OpenMoE-8B: {.stride = 6}; Megatron-Core: {.stride = f, .phase = 0}.)
struct Interleave {
  Index stride = 1;
  Index first_dense = 0;  ///< How many layers at the start are dense in any case.
  Index phase = -1;       ///< -1 stands for stride - 1, the last layer of each stride.

  bool operator==(const Interleave&) const = default;

  /// \throws ConfigError  unless stride >= 1, first_dense >= 0 and -1 <= phase < stride.
  void check() const {
    expect_at_least<Index>("Interleave", "stride", stride, 1);
    expect_at_least<Index>("Interleave", "first_dense", first_dense, 0);
    if (phase < -1 || phase >= stride) {
      throw_error<ConfigError>("Interleave: phase = ", phase,
                               ", expected -1 <= phase < stride = ", stride);
    }
  }

  bool is_sparse(Index layer) const {
    check();
    return layer >= first_dense && layer % stride == (phase < 0 ? stride - 1 : phase);
  }

  /// How many of the first `layers` layers are sparse.
  Index count_sparse(Index layers) const {
    Index count = 0;
    for (Index layer = 0; layer < layers; ++layer) count += is_sparse(layer) ? 1 : 0;
    return count;
  }
};

}  // namespace weir
