// SPDX-License-Identifier: MIT
/// \file
/// The layers that are measured, and tokens for them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/precision.hpp>
#include <weir/core/random.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/kernels/tiles.hpp>
#include <weir/kernels/weight_rows.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/optim/set_precision.hpp>

#include "support/limits.hpp"
#include "support/rows.hpp"

namespace weir::bench {

/// The sizes of a mixture of SwiGLU experts.
struct Shape {
  std::string_view name;
  Index d_model = 0;
  Index d_hidden = 0;  ///< Of one expert.
  Index experts = 0;
  Index k = 0;
  Index shared = 0;  ///< Experts that every token visits besides, each as wide as the others.

  /// Of one expert: gate, up and down.
  double weights() const { return 3.0 * static_cast<double>(d_model * d_hidden); }

  /// Of one forward pass without the router: a multiplication and an addition for each weight.
  double flops(Index tokens) const {
    return 2.0 * weights() * static_cast<double>(tokens * (k + shared));
  }
};

inline constexpr Shape kFewLarge = {"A", 1024, 3584, 8, 2};   ///< As Mixtral, at d_model 1024.
inline constexpr Shape kManySmall = {"B", 1024, 512, 64, 6};  ///< As DeepSeekMoE and OLMoE.
inline constexpr Shape kManyShared = {"B+2", 1024, 512, 64, 6, 2};
inline constexpr Shape kTopOne = {"C", 1024, 4096, 16, 1};  ///< As Switch and Llama 4.
inline constexpr std::array kShapes = {kFewLarge, kManySmall, kManyShared, kTopOne};

/// How tokens spread over the experts.
enum class Load {
  kUniform,  ///< Each token chooses at random.
  kSkewed,   ///< Every second token has expert 0 among its choices, the others never.
};

inline std::string_view name_of(Load load) {
  return load == Load::kUniform ? "uniform" : "skewed";
}

/// The weights of a mixture, in Matrix form for whoever wants to compute the same.
struct MixtureWeights {
  Matrix<float> router;                 ///< [experts, d_model]
  std::vector<Matrix<float>> gate, up;  ///< [d_hidden, d_model], one per expert
  std::vector<Matrix<float>> down;      ///< [d_model, d_hidden], one per expert
};

/// Random weights, the same for the same shape. The router gives feature 0 to expert 0 alone, so
/// that tokens can ask for it: see `make_tokens`. The experts are different stretches of one series
/// of numbers, since a draw for each weight would take longer than the rows.
inline MixtureWeights make_weights(const Shape& shape) {
  constexpr float kDecisive = 12.0F;  // Other logits are N(0, 1).
  Rng rng(1);
  MixtureWeights weights;
  weights.router = normal_init<float>(shape.experts, shape.d_model,
                                      1.0 / std::sqrt(static_cast<double>(shape.d_model)), rng);
  weights.router.col(0).setZero();
  weights.router(0, 0) = kDecisive;

  constexpr Index kShift = 1009;
  const Index count = shape.d_hidden * shape.d_model + 3 * shape.experts * kShift;
  const auto scale = std::sqrt(static_cast<float>(count));
  const Matrix<float> series = scale * uniform_init<float>(1, count, rng);
  const auto stretch = [&](Index number, Index rows, Index cols) -> Matrix<float> {
    return Eigen::Map<const Matrix<float>>(series.data() + number * kShift, rows, cols) /
           std::sqrt(static_cast<float>(cols));
  };
  for (Index e = 0; e < shape.experts; ++e) {
    weights.gate.push_back(stretch(3 * e, shape.d_hidden, shape.d_model));
    weights.up.push_back(stretch(3 * e + 1, shape.d_hidden, shape.d_model));
    weights.down.push_back(stretch(3 * e + 2, shape.d_model, shape.d_hidden));
  }
  return weights;
}

/// Batch number `batch` of [tokens, d_model] standard normal numbers, feature 0 aside, which says
/// how the token is to be routed by the router of `make_weights`: 0 at random, 1 to expert 0 among
/// others, -1 not to expert 0.
inline Matrix<float> make_tokens(const Shape& shape, Index tokens, Load load, Index batch) {
  Rng rng(1000 + static_cast<std::uint64_t>(batch));
  Matrix<float> x = normal_init<float>(tokens, shape.d_model, 1.0, rng);
  for (Index t = 0; t < tokens; ++t) {
    const bool even = (batch * tokens + t) % 2 == 0;
    x(t, 0) = load == Load::kUniform ? 0.0F : even ? 1.0F : -1.0F;
  }
  return x;
}

inline std::vector<Matrix<float>> make_batches(const Shape& shape, Index tokens, Load load,
                                               Index count) {
  std::vector<Matrix<float>> batches;
  for (Index b = 0; b < count; ++b) batches.push_back(make_tokens(shape, tokens, load, b));
  return batches;
}

/// A mixture of experts of a given shape, with the cache of its last pass. Without a capacity and
/// without balancers: routing_bench measures those.
class Mixture {
 public:
  explicit Mixture(const Shape& shape) : Mixture(shape, make_weights(shape)) {}

  Mixture(const Shape& shape, MixtureWeights weights) : shape_(shape), own_(make(shape, weights)) {}

  const Shape& shape() const { return shape_; }

  /// See weir::set_storage. What one storage has rounded away is missing in the next.
  void set_storage(Storage storage) {
    if (storage == storage_) return;
    std::visit([&](auto& own) { weir::set_storage(own.layer, storage); }, own_);
    storage_ = storage;
  }

  /// See weir::set_precision; storing the weights for inference forgets it.
  void set_precision(weir::Precision precision) {
    std::visit([&](auto& own) { weir::set_precision(own.layer, precision); }, own_);
    trained_ = precision;
  }

  const Matrix<float>& forward(const Matrix<float>& x, const Pass& pass) {
    return std::visit(
        [&](auto& own) -> const Matrix<float>& { return own.layer.forward(x, pass, own.cache); },
        own_);
  }

  const Matrix<float>& backward(const Matrix<float>& dy) {
    return std::visit(
        [&](auto& own) -> const Matrix<float>& { return own.layer.backward(dy, own.cache); }, own_);
  }

  /// Of the last pass.
  const Routing<float>& routing() const {
    return std::visit(
        [](const auto& own) -> const Routing<float>& {
          if constexpr (requires { own.cache.moe; }) {
            return own.cache.moe.routing;
          } else {
            return own.cache.routing;
          }
        },
        own_);
  }

  /// How many experts the last pass used, shared ones included.
  Index experts_hit() const {
    const LayerReport report = report_of(routing());
    return shape_.shared + static_cast<Index>(report.kept.size()) -
           std::count(report.kept.begin(), report.kept.end(), Index(0));
  }

  /// What multiplies.
  Precision precision() const {
    if (kernels::rounds_rows(storage_)) return Precision::kInt8;
    const bool codes = kernels::code_of(storage_).has_value();
    if (codes && kernels::uses_tiles()) return Precision::kBfloat16;
    const bool rounds = storage_ == Storage::kTrainable && trained_ != weir::Precision::kFull;
    return rounds || storage_ == Storage::kBfloat16 ? Precision::kBfloat16 : Precision::kFloat32;
  }

  /// Of a forward pass like the last one: reads the weights of the experts that were hit, once.
  Cost forward_cost() const {
    constexpr Index kBlock = 1024;
    const auto bytes_of_block = storage_ == Storage::kTrainable
                                    ? sizeof(float) * kBlock * kBlock
                                    : kernels::PackedWeight<float>::bytes(kBlock, kBlock, storage_);
    const double bytes_of_weight = static_cast<double>(bytes_of_block) / (kBlock * kBlock);
    return {static_cast<double>(routing().tokens()), shape_.flops(routing().tokens()),
            bytes_of_weight * shape_.weights() * static_cast<double>(experts_hit())};
  }

  /// The same for a forward and a backward pass. Backward multiplies twice where forward does once,
  /// reads the weights again, and reads and writes their gradients.
  Cost training_cost() const {
    const Cost forward = forward_cost();
    return {forward.tokens, 3.0 * forward.flops, 4.0 * forward.bytes};
  }

 private:
  template <class L>
  struct WithCache {
    L layer;
    typename L::Cache cache = {};
  };
  using Routed = decltype(MoELayer(std::declval<LinearRouter<float>>(), SoftmaxTopK<float>(),
                                   Dropless(), std::declval<GluBank<float>>()));
  using WithShared = SharedExperts<Routed, Glu<float>>;
  using Own = std::variant<WithCache<Routed>, WithCache<WithShared>>;

  static Own make(const Shape& shape, MixtureWeights& weights) {
    // With one expert for a token, a renormalised weight would always be 1.
    Routed routed(
        LinearRouter<float>(std::move(weights.router)),
        SoftmaxTopK<float>({.k = shape.k, .renormalise = shape.k > 1}), Dropless(),
        GluBank<float>(std::move(weights.gate), std::move(weights.up), std::move(weights.down)));
    if (shape.shared == 0) return WithCache<Routed>{std::move(routed)};
    Rng rng(2);
    Glu<float> shared(shape.d_model, shape.shared * shape.d_hidden, rng);
    return WithCache<WithShared>{WithShared(std::move(routed), std::move(shared))};
  }

  Shape shape_;
  Storage storage_ = Storage::kTrainable;
  weir::Precision trained_ = weir::Precision::kFull;
  Own own_;
};

/// The mixture of `shape`, stored and trained as said. It is kept until one of another shape is
/// asked for: a layer takes up to 0.8 GB, twice that while its gradients live, and seconds to make.
inline Mixture& mixture(const Shape& shape, Storage storage,
                        weir::Precision precision = weir::Precision::kFull) {
  static std::unique_ptr<Mixture> kept;
  if (kept == nullptr || kept->shape().name != shape.name) {
    kept.reset();
    kept = std::make_unique<Mixture>(shape);
  }
  kept->set_storage(storage);
  if (storage == Storage::kTrainable) kept->set_precision(precision);
  return *kept;
}

}  // namespace weir::bench
