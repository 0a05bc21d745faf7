// SPDX-License-Identifier: MIT
/// \file
/// The larger Switch Transformers.
#pragma once

#include <weir/presets/switch_transformer.hpp>

namespace weir::presets {

/// Switch-Large-128: 26.3 billion parameters. Published as an encoder-decoder, of which `make`
/// builds the decoder half. (Fedus et al. 2021, arXiv:2101.03961.)
inline SwitchConfig switch_large_128() {
  ModelShape shape = detail::t5_shape(24, 1024, 16, 64, 4096, 2, 128, 1);
  shape.tied = true;
  shape.network = Network::kPlain;
  return {.shape = shape, .group_size = 4096};
}

/// Switch-XXL-128: 395 billion parameters, with GELU-gated networks. Published as an
/// encoder-decoder, of which `make` builds the decoder half. (Fedus et al. 2021, arXiv:2101.03961,
/// table 9.)
inline SwitchConfig switch_xxl_128() {
  return {.shape = detail::t5_shape(24, 4096, 64, 64, 10240, 2, 128, 1),
          .capacity_evaluate = 4.0,
          .capacity_minimum = 2,
          .group_size = 4096};
}

/// Switch-C-2048: 1571 billion parameters, every layer sparse. Published as an encoder-decoder, of
/// which `make` builds the decoder half. (Fedus et al. 2021, arXiv:2101.03961, table 9.)
inline SwitchConfig switch_c_2048() {
  ModelShape shape = detail::t5_shape(15, 2080, 30, 64, 6144, 1, 2048, 1);
  shape.network = Network::kPlain;
  return {.shape = shape, .capacity_train = 1.0, .capacity_minimum = 2, .group_size = 2048};
}

}  // namespace weir::presets
