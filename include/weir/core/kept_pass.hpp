// SPDX-License-Identifier: MIT
/// \file
/// A copy of a pass, for running it again later.
#pragma once

#include <cstdint>
#include <string>

#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Owns what a `Pass` only points to, apart from its generator, its record and who sees its inputs.
class KeptPass {
 public:
  void keep(const Pass& pass) {
    pass_ = pass;
    if (pass.sequences != nullptr) sequences_ = *pass.sequences;
    mask_.assign(pass.mask.begin(), pass.mask.end());
    token_ids_.assign(pass.token_ids.begin(), pass.token_ids.end());
    places_.assign(pass.places.begin(), pass.places.end());
    allowed_.assign(pass.allowed.begin(), pass.allowed.end());
    adapters_.assign(pass.adapters);
  }

  /// The pass without a record and without anybody who sees its inputs, since it has been recorded
  /// and seen. Valid until the next change.
  /// \param rng      What it draws from; may be null.
  Pass again(Rng* rng) const {
    Pass pass = pass_;
    if (pass.sequences != nullptr) pass.sequences = &sequences_;
    pass.mask = mask_;
    pass.token_ids = token_ids_;
    pass.places = places_;
    pass.allowed = allowed_;
    pass.adapters = adapters_;
    pass.rng = rng;
    pass.record = nullptr;
    pass.inputs = nullptr;
    return pass;
  }

 private:
  Pass pass_;
  Sequences sequences_;
  List<std::uint8_t> mask_;
  List<Index> token_ids_, places_;
  List<std::uint8_t> allowed_;
  std::string adapters_;
};

}  // namespace weir
