// SPDX-License-Identifier: MIT
/// \file
/// How large a model is, computed from its sizes without allocating it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <variant>

#include <weir/attention/grouped_query.hpp>
#include <weir/attention/latent.hpp>
#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/presets/model_shape.hpp>

namespace weir::presets {

/// Counts of large models do not fit 32 bits, whatever an Index is.
using Count = std::int64_t;

/// The numbers of one attention layer.
struct AttentionCount {
  Count matrices = 0;      ///< Elements of the projections.
  Count vectors = 0;       ///< Elements of biases, of norms of queries and keys, of sinks.
  Count per_position = 0;  ///< Multiplications of a token with each position it sees.
  Count window = 0;        ///< How many positions it sees at most; 0: all.
  Count cache_values = 0;  ///< Values that the cache keeps of a token.
  Count multi_head_cache_values = 0;  ///< The same if each query head had its own key and value.

  /// All that is trained.
  Count parameters() const { return matrices + vectors; }
};

/// Counts grouped-query attention.
/// \param d_model  Width of a token, whatever the config says.
/// \throws ConfigError  as GroupedQueryConfig::checked.
inline AttentionCount count(GroupedQueryConfig a, Count d_model) {
  a.d_model = static_cast<Index>(d_model);
  a = a.checked();
  const Count query = Count{a.heads} * a.head_dim;
  const Count kv = Count{a.kv_heads} * a.head_dim;
  AttentionCount count;
  count.matrices = 2 * d_model * (query + kv);
  if (a.qkv_bias) count.vectors += query + 2 * kv;
  if (a.output_bias) count.vectors += d_model;
  if (a.qk_norm == QkNorm::kFull) count.vectors += query + kv;
  if (a.qk_norm == QkNorm::kPerHead) count.vectors += 2 * Count{a.head_dim};
  if (a.sinks) count.vectors += a.heads;
  count.per_position = 2 * query;
  count.window = a.window > 0 && a.chunk > 0 ? std::min(a.window, a.chunk) : a.window + a.chunk;
  count.cache_values = 2 * kv;
  count.multi_head_cache_values = 2 * query;
  return count;
}

/// Counts latent attention. Multi-head attention of the same width would have keys and values of
/// value_dim numbers per head, as in the comparison of DeepSeek-V2's report (arXiv:2405.04434,
/// table 1).
inline AttentionCount count(const LatentConfig& a, Count d_model) {
  const Count heads = a.heads;
  const Count query = heads * (a.nope_dim + a.rope_dim);
  const Count value = heads * a.value_dim;
  AttentionCount count;
  count.matrices = a.q_rank > 0 ? a.q_rank * (d_model + query) : d_model * query;
  count.matrices += d_model * (a.kv_rank + a.rope_dim) +
                    a.kv_rank * heads * (a.nope_dim + a.value_dim) + value * d_model;
  count.vectors = Count{a.q_rank} + a.kv_rank;
  count.per_position = query + value;
  count.cache_values = Count{a.kv_rank} + a.rope_dim;
  count.multi_head_cache_values = 2 * value;
  return count;
}

/// Counts either kind of attention.
inline AttentionCount count(const AttentionShape& attention, Count d_model) {
  return std::visit([&](const auto& a) { return count(a, d_model); }, attention);
}

/// The numbers of a model. A part that it does not have counts 0.
struct ModelCount {
  // Trained numbers, by what they belong to.
  Count embedding = 0;
  Count head = 0;  ///< 0 if tied: then the embedding is counted once.
  Count attention = 0;
  Count norms = 0;
  Count routers = 0;
  Count experts = 0;
  Count shared = 0;
  Count dense = 0;            ///< Networks of dense layers, and those behind mixtures.
  Count position_tables = 0;  ///< Tables of relative positions.
  Count selection_bias = 0;   ///< Biases moved by a rule; part of the model, but not parameters.

  Count idle_experts = 0;     ///< Numbers of the experts that one token does not visit.
  Count multiplications = 0;  ///< Multiplications of a token with matrices, output head included.
  Count per_position = 0;     ///< Multiplications with each position seen, in layers that see all.
  Count per_windowed = 0;     ///< The same in layers that see only a window or chunk.
  Count window = 0;           ///< The longest such window or chunk; 0 without any.
  Count cache_values = 0;     ///< Values that caches keep of a token.
  Count windowed_cache_values = 0;    ///< Those that are forgotten once the window has passed.
  Count multi_head_cache_values = 0;  ///< The same with multi-head attention of the same width.
  Count prediction = 0;  ///< Numbers of one module of multi-token prediction; in no sum.

  /// All that belongs to the model.
  Count total() const {
    return embedding + head + attention + norms + routers + experts + shared + dense +
           position_tables + selection_bias;
  }
  /// What one token uses.
  Count active() const { return total() - idle_experts; }
  /// What one token uses, without the embedding, in which it only looks up a row.
  Count active_without_embedding() const { return active() - embedding; }
  /// What one token uses, without embedding and head.
  Count active_without_vocab() const { return active() - embedding - head; }
  /// The share of the total that one token uses.
  double active_share() const {
    return static_cast<double>(active()) / static_cast<double>(total());
  }

  /// Floating-point operations of a forward pass for one token that sees `positions` positions in
  /// each layer, or as many as a window or chunk allows. Each multiplication, with a weight or with
  /// a position, counts as two operations, a product and a sum. Norms, activations and softmaxes
  /// are not counted.
  Count flops(Count positions = 0) const {
    return 2 * (multiplications + positions * per_position +
                std::min(positions, window) * per_windowed);
  }

  /// Bytes that a token adds to the cache.
  double cache_bytes(double bits = 16.0) const {
    return static_cast<double>(cache_values) * bits / 8.0;
  }
  /// The same with multi-head attention of the same width.
  double multi_head_cache_bytes(double bits = 16.0) const {
    return static_cast<double>(multi_head_cache_values) * bits / 8.0;
  }
};

namespace detail {

/// One stack of layers: its attention, norms, networks and mixtures, added to a count.
class StackCounter {
 public:
  StackCounter(const ModelShape& shape, ModelCount& to)
      : shape_(shape), to_(to), d_(shape.d_model) {}

  /// \param attentions  How many there are in each layer: 2 where one of them is to an encoder.
  void add(Index layers, Index attentions) {
    const Count sparse = shape_.count_sparse(layers);
    const Count norms_of_branch = shape_.post_norms ? 2 : 1;
    for (Index layer = 0; layer < layers; ++layer) add_attention(layer, attentions);
    to_.norms += layers * norm() * norms_of_branch * (attentions + 1) + norm();
    to_.position_tables += Count{shape_.position_buckets} * heads();
    add_mixtures(sparse);
    add_dense((layers - sparse) * network(shape_.dense_hidden));
    if (shape_.extra_hidden > 0) {
      to_.norms += sparse * norm() * norms_of_branch;
      add_dense(sparse * network(shape_.extra_hidden));
    }
  }

  /// Adds what the caches of the decoder keep.
  void add_cache(Index layers) {
    for (Index layer = 0; layer < layers; ++layer) {
      const AttentionCount attention = count(shape_.attention_of(layer), d_);
      to_.cache_values += attention.cache_values;
      if (attention.window > 0) to_.windowed_cache_values += attention.cache_values;
      to_.multi_head_cache_values += attention.multi_head_cache_values;
    }
  }

 private:
  void add_attention(Index layer, Count attentions) {
    const AttentionCount attention = count(shape_.attention_of(layer), d_);
    to_.attention += attentions * attention.parameters();
    to_.multiplications += attentions * attention.matrices;
    (attention.window > 0 ? to_.per_windowed : to_.per_position) +=
        attentions * attention.per_position;
    to_.window = std::max(to_.window, attention.window);
  }

  Count norm() const { return shape_.norm_bias ? 2 * d_ : d_; }

  Count network(Count d_hidden) const { return matrices_of(shape_.network) * d_ * d_hidden; }

  Index heads() const {
    return std::visit([](const auto& a) { return a.heads; }, shape_.attention);
  }

  void add_dense(Count weights) {
    to_.dense += weights;
    to_.multiplications += weights;
  }

  void add_mixtures(Count mixtures) {
    const Count experts = shape_.experts;
    const Count in_bias = (matrices_of(shape_.network) - 1) * Count{shape_.d_hidden};
    const Count expert = network(shape_.d_hidden) + (shape_.expert_bias ? in_bias + d_ : 0);
    to_.experts += mixtures * experts * expert;
    to_.idle_experts += mixtures * (experts - shape_.k) * expert;
    to_.multiplications += mixtures * (shape_.k * network(shape_.d_hidden) + experts * d_);
    to_.routers += mixtures * experts * (d_ + (shape_.router_bias ? 1 : 0));
    if (shape_.selection_bias) to_.selection_bias += mixtures * experts;
    const Count shared = network(shape_.shared_hidden) + (shape_.shared_gate ? d_ : 0);
    to_.shared += mixtures * shared;
    to_.multiplications += mixtures * shared;
  }

  const ModelShape& shape_;
  ModelCount& to_;
  Count d_;
};

/// Counts a module of multi-token prediction as DeepSeek-V3 has it: a projection of two tokens side
/// by side, three norms and a sparse layer. It shares embedding and head with the model.
/// (DeepSeek-AI 2024, arXiv:2412.19437, section 2.2.)
inline Count count_prediction(ModelShape shape) {
  const Count d = shape.d_model;
  shape.interleave = {};
  ModelCount module;
  StackCounter(shape, module).add(1, 1);  // Its final norm is one of the three.
  return module.total() + 2 * d * d + (shape.norm_bias ? 4 : 2) * d;
}

}  // namespace detail

/// Counts the published model. An encoder-decoder is counted with both halves, as if each token
/// passed through both.
/// \throws ConfigError  as ModelShape::check.
inline ModelCount count(const ModelShape& shape) {
  shape.check();
  ModelCount count;
  const Count table = Count{shape.vocab} * shape.d_model;
  count.embedding = table;
  count.head = shape.tied ? 0 : table + (shape.head_bias ? shape.vocab : 0);
  count.multiplications = table;
  detail::StackCounter stack(shape, count);
  stack.add(shape.layers, shape.encoder_layers > 0 ? 2 : 1);
  stack.add_cache(shape.layers);
  if (shape.encoder_layers > 0) stack.add(shape.encoder_layers, 1);
  if (shape.prediction_modules > 0) count.prediction = detail::count_prediction(shape);
  return count;
}

/// Counts a preset by its sizes.
template <Preset Config>
ModelCount count(const Config& config) {
  return count(config.shape);
}

/// In how many ways `chosen` of `experts` experts can be combined:
///
///     C(experts, chosen) = experts! / (chosen! (experts - chosen)!)
///
/// \throws ConfigError  unless 0 <= chosen <= experts and the result fits 63 bits.
inline Count combinations(Count experts, Count chosen) {
  if (chosen < 0 || chosen > experts) {
    throw_error<ConfigError>("combinations: chosen = ", chosen,
                             ", expected 0 <= chosen <= experts = ", experts);
  }
  Count ways = 1;
  for (Count i = 1; i <= chosen; ++i) {
    const Count factor = experts - chosen + i;
    // ways * factor / i without a product beyond the result.
    const Count whole = ways / i;
    const Count rest = ways % i * factor / i;
    if (whole > (std::numeric_limits<Count>::max() - rest) / factor) {
      throw_error<ConfigError>("combinations: C(", experts, ", ", chosen, ") does not fit 63 bits");
    }
    ways = whole * factor + rest;
  }
  return ways;
}

}  // namespace weir::presets
