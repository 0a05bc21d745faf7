// SPDX-License-Identifier: MIT
/// \file
/// Finds experts that are corrupted, so that they can be masked.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/expert_mask.hpp>
#include <weir/tuning/active_experts.hpp>
#include <weir/tuning/expert_parts.hpp>

namespace weir {

/// What is wrong with an expert, the first that applies.
enum class ExpertCondition {
  kSound,
  kNonFinite,  ///< A weight or an output is not finite.
  kExploding,  ///< Its output is many times as large as that of most experts.
  kDead,       ///< Its output is next to nothing compared with that of most experts.
  kChanged,    ///< Its checksum is not the one that was given.
};

constexpr std::string_view name_of(ExpertCondition condition) {
  constexpr std::string_view kNames[] = {"sound", "not finite", "exploding", "dead", "changed"};
  return kNames[static_cast<std::size_t>(condition)];
}

/// The health of one expert.
struct ExpertHealth {
  ExpertCondition condition = ExpertCondition::kSound;
  double output = 0.0;         ///< Root mean square of its output, relative to the median expert's.
  std::uint64_t checksum = 0;  ///< Of the bits of its weights: FNV-1a, 64 bits.
};

/// Settings of `expert_health`.
struct HealthConfig {
  double exploding = 10.0;  ///< An expert explodes if its output is more than so many medians.
  double dead = 0.01;       ///< It is dead if its output is less than this share of the median.
  std::span<const std::uint64_t> checksums = {};  ///< What checksums have to be; empty: unknown.
};

namespace detail {

inline std::uint64_t fnv_1a(std::uint64_t hash, const void* bytes, std::size_t count) {
  const auto* const byte = static_cast<const unsigned char*>(bytes);
  for (std::size_t i = 0; i < count; ++i) hash = (hash ^ byte[i]) * 0x100000001B3U;
  return hash;
}

}  // namespace detail

/// The health of each expert of a layer with one mixture. Each expert is given all tokens x, alone
/// and with the weight that the selector gives to a single choice, and what the layer yields
/// without any expert (shared experts beside the mixture) is subtracted. Outputs are compared with
/// the median of all: more than half of the experts have to be sound.
///
///     const auto health = expert_health(layer, x);
///     const auto allowed = all_but(experts, damaged_experts(health));
///     model.forward(ids, {.allowed = allowed}, cache);     tokens go to the experts that are left
///
/// \param experts  How many the mixture has.
/// \param x        What the layer is given, [tokens, d_model]; at least one token, finite.
/// \throws ConfigError  if the layer has no mixture whose experts `expert_parts` knows and whose
///                      selector has a fixed k, without tokens, or with another number of
///                      checksums.
/// \throws StateError   if weights are stored for inference, or experts have adapters.
template <Layer L>
std::vector<ExpertHealth> expert_health(const L& layer, Index experts,
                                        MatrixIn<typename L::Scalar> x,
                                        const HealthConfig& config = {}) {
  using T = typename L::Scalar;
  constexpr auto kWhere = "expert_health";
  expect_at_least<Index>(kWhere, "experts", experts, 1);
  expect_at_least<Index>(kWhere, "tokens", x.rows(), 1);
  if (!config.checksums.empty() && static_cast<Index>(config.checksums.size()) != experts) {
    throw_error<ConfigError>(kWhere, ": ", config.checksums.size(), " checksums, expected ",
                             experts, " (one per expert)");
  }
  L alone = layer;
  set_active_experts(alone, "*", 1);
  std::vector<ExpertHealth> health(static_cast<std::size_t>(experts));
  std::vector<bool> finite(health.size(), true);
  for (std::size_t e = 0; e < health.size(); ++e) {
    std::uint64_t hash = 0xCBF29CE484222325U;
    for (const auto& part : expert_parts(kWhere, alone, static_cast<Index>(e))) {
      const Matrix<T>& value = part.parameter->value;
      hash = detail::fnv_1a(hash, value.data(), static_cast<std::size_t>(value.size()) * sizeof(T));
      finite[e] = finite[e] && value.allFinite();
    }
    health[e].checksum = hash;
  }
  const auto output_of = [&](L& of, std::size_t e) -> Matrix<T> {
    std::vector<std::uint8_t> only(health.size(), 0);
    only[e] = 1;
    return infer(of, x, {.allowed = only});
  };
  const auto sound = std::find(finite.begin(), finite.end(), true);
  if (sound == finite.end()) {
    for (ExpertHealth& expert : health) expert.condition = ExpertCondition::kNonFinite;
    return health;
  }
  L silent = alone;
  const auto first = static_cast<std::size_t>(sound - finite.begin());
  for (auto& part : expert_parts(kWhere, silent, static_cast<Index>(first))) {
    if (part.is_output) part.parameter->value.setZero();
  }
  const Matrix<T> beside = output_of(silent, first);
  std::vector<double> outputs;
  for (std::size_t e = 0; e < health.size(); ++e) {
    if (!finite[e]) continue;
    const Matrix<T> y = output_of(alone, e) - beside;
    finite[e] = y.allFinite();
    if (!finite[e]) continue;
    health[e].output = static_cast<double>(y.norm()) / std::sqrt(static_cast<double>(y.size()));
    outputs.push_back(health[e].output);
  }
  std::sort(outputs.begin(), outputs.end());
  const double median = outputs.empty() ? 0.0 : outputs[outputs.size() / 2];
  for (std::size_t e = 0; e < health.size(); ++e) {
    ExpertHealth& expert = health[e];
    if (median > 0.0) expert.output /= median;
    if (!finite[e]) {
      expert.condition = ExpertCondition::kNonFinite;
    } else if (expert.output > config.exploding) {
      expert.condition = ExpertCondition::kExploding;
    } else if (expert.output < config.dead) {
      expert.condition = ExpertCondition::kDead;
    } else if (!config.checksums.empty() && expert.checksum != config.checksums[e]) {
      expert.condition = ExpertCondition::kChanged;
    }
  }
  return health;
}

/// The numbers of the experts that are not sound.
inline std::vector<Index> damaged_experts(std::span<const ExpertHealth> health) {
  std::vector<Index> damaged;
  for (std::size_t e = 0; e < health.size(); ++e) {
    if (health[e].condition != ExpertCondition::kSound) damaged.push_back(static_cast<Index>(e));
  }
  return damaged;
}

/// The checksums, to be kept beside a checkpoint and given to later checks.
inline std::vector<std::uint64_t> checksums_of(std::span<const ExpertHealth> health) {
  std::vector<std::uint64_t> all;
  for (const ExpertHealth& expert : health) all.push_back(expert.checksum);
  return all;
}

}  // namespace weir
