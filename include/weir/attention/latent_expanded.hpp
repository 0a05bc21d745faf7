// SPDX-License-Identifier: MIT
/// \file
/// Latent attention by the expanded way, with keys and values of all heads (DeepSeek-AI 2024,
/// arXiv:2405.04434, section 2.1.1).
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <span>

#include <weir/attention/causal.hpp>
#include <weir/attention/latent_cache.hpp>
#include <weir/attention/latent_config.hpp>
#include <weir/attention/spans.hpp>
#include <weir/core/init.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/weight.hpp>
#include <weir/ops/padding.hpp>

namespace weir {

/// The part of `LatentAttention` that makes keys and values from latents c and keys of positions
/// k_rope, and attends to them:
///
///     k_h = [c W_uk_h^T | k_rope],    v_h = c W_uv_h^T
///     out_h = softmax(scale q_h k_h^T) v_h
template <std::floating_point T>
class LatentExpanded {
 public:
  using Scalar = T;

  struct Cache {
    Scratch<T> key_nope, k, v;  ///< Keys and values of all tokens that queries see.
    Workspace workspace;        ///< For their gradients.
    typename CausalAttention<T>::Cache attention;
  };

  /// \param config  Has to be checked.
  LatentExpanded(Rng& rng, const LatentConfig& config)
      : config_(config),
        key_up_(
            switch_init<T>(config.heads * config.nope_dim, config.kv_rank, rng, config.init_scale)),
        value_up_(switch_init<T>(config.heads * config.value_dim, config.kv_rank, rng,
                                 config.init_scale)) {}

  /// [heads * nope_dim, kv_rank], empty if it is stored for inference.
  const Matrix<T>& key_up() const { return key_up_.parameter().value; }
  /// [heads * value_dim, kv_rank], empty if it is stored for inference.
  const Matrix<T>& value_up() const { return value_up_.parameter().value; }

  void set_storage(Storage storage) {
    key_up_.set_storage(storage);
    value_up_.set_storage(storage);
  }

  /// Sets the rows of `context` that belong to the spans.
  /// \param q          [tokens, heads * query_dim], rotated.
  /// \param latents    [keys, kv_rank]
  /// \param rope_keys  [keys, rope_dim], rotated.
  /// \param mask       One byte per key, 0 for padding; or empty.
  /// \param context    [tokens, heads * value_dim]
  void forward(MatrixIn<T> q, MatrixIn<T> latents, MatrixIn<T> rope_keys,
               std::span<const AttentionSpan> spans, std::span<const std::uint8_t> mask,
               MatrixOut<T> context, Cache& cache) const {
    expand(latents, rope_keys, cache);
    core(q, spans, mask, cache).forward(context, cache.attention);
  }

  /// The same for the queries of one sequence and all tokens that it has seen.
  void forward(MatrixIn<T> q, const LatentCache<T>& seen, const AttentionSpan& span,
               MatrixOut<T> context, Cache& cache) const {
    Workspace::Frame frame(cache.workspace);
    auto rows = frame.matrix<T>(seen.length(), config_.kv_rank + config_.rope_dim);
    seen.copy_to(rows);
    forward(q, rows.leftCols(config_.kv_rank), rows.rightCols(config_.rope_dim), {&span, 1}, {},
            context, cache);
  }

  /// Adds to the gradients of the weights and sets those of the inputs of the last `forward`.
  /// \param context    The result of `forward`.
  void backward(MatrixIn<T> q, MatrixIn<T> latents, std::span<const AttentionSpan> spans,
                std::span<const std::uint8_t> mask, MatrixIn<T> context, MatrixIn<T> d_context,
                MatrixOut<T> dq, MatrixOut<T> d_latents, MatrixOut<T> d_rope_keys, Cache& cache);

  /// Shows what the weights are multiplied with, see `Pass::show`.
  void show(const Pass& pass, MatrixIn<T> latents) const {
    pass.show<T>(key_up_.parameter(), latents);
    pass.show<T>(value_up_.parameter(), latents);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (self.key_up_.storage() != Storage::kTrainable) return;
    // Without adapters, which LatentAbsorbed could not compute.
    visit("key_up", static_cast<Parameter<T>&>(self.key_up_.parameter()));
    visit("value_up", static_cast<Parameter<T>&>(self.value_up_.parameter()));
  }

 private:
  /// Computes the keys and values of all heads.
  void expand(MatrixIn<T> latents, MatrixIn<T> rope_keys, Cache& cache) const;

  /// The reverse of `expand` for gradients: splits dk into d_key_nope and, summed over heads,
  /// d_rope_keys.
  void take_apart(MatrixIn<T> dk, MatrixOut<T> d_key_nope, MatrixOut<T>& d_rope_keys) const;

  CausalAttention<T> core(MatrixIn<T> q, std::span<const AttentionSpan> spans,
                          std::span<const std::uint8_t> mask, const Cache& cache) const;

  LatentConfig config_;
  kernels::Weight<T> key_up_, value_up_;
};

template <std::floating_point T>
void LatentExpanded<T>::backward(MatrixIn<T> q, MatrixIn<T> latents,
                                 std::span<const AttentionSpan> spans,
                                 std::span<const std::uint8_t> mask, MatrixIn<T> context,
                                 MatrixIn<T> d_context, MatrixOut<T> dq, MatrixOut<T> d_latents,
                                 MatrixOut<T> d_rope_keys, Cache& cache) {
  Workspace::Frame frame(cache.workspace);
  auto dk = frame.matrix<T>(cache.k.rows(), cache.k.cols());
  auto dv = frame.matrix<T>(cache.v.rows(), cache.v.cols());
  auto d_key_nope = frame.matrix<T>(cache.key_nope.rows(), cache.key_nope.cols());
  core(q, spans, mask, cache).backward(context, d_context, dq, dk, dv, cache.attention);
  clear_padding<T>(mask, dk);
  clear_padding<T>(mask, dv);
  take_apart(dk, d_key_nope, d_rope_keys);
  if (key_up_.storage() == Storage::kTrainable) {
    const std::array<Product<T>, 2> weights = {
        weight_gradient_product<T>(d_key_nope, latents, key_up_.parameter()),
        weight_gradient_product<T>(dv, latents, value_up_.parameter())};
    multiply<T>(weights);
  }
  multiply<T>(input_gradient_product<T>(d_key_nope, key_up_.value(), d_latents));
  multiply<T>(input_gradient_product<T>(dv, value_up_.value(), d_latents, true));
}

template <std::floating_point T>
void LatentExpanded<T>::expand(MatrixIn<T> latents, MatrixIn<T> rope_keys, Cache& cache) const {
  const Index keys = latents.rows();
  const Index nope = config_.nope_dim;
  auto key_nope = cache.key_nope.reshape(keys, config_.heads * nope);
  auto v = cache.v.reshape(keys, config_.heads * config_.value_dim);
  kernels::multiply_weights<T, 2>(latents, {{{key_up_, key_nope}, {value_up_, v}}});
  auto k = cache.k.reshape(keys, config_.heads * config_.query_dim());
  parallel_rows(keys, k.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      for (Index h = 0; h < config_.heads; ++h) {
        T* const to = &k(t, h * config_.query_dim());
        std::copy_n(&key_nope(t, h * nope), nope, to);
        std::copy_n(&rope_keys.coeffRef(t, 0), config_.rope_dim, to + nope);
      }
    }
  });
}

template <std::floating_point T>
void LatentExpanded<T>::take_apart(MatrixIn<T> dk, MatrixOut<T> d_key_nope,
                                   MatrixOut<T>& d_rope_keys) const {
  const Index nope = config_.nope_dim;
  parallel_rows(dk.rows(), dk.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      d_rope_keys.row(t).setZero();
      for (Index h = 0; h < config_.heads; ++h) {
        const T* const from = &dk.coeffRef(t, h * config_.query_dim());
        std::copy_n(from, nope, &d_key_nope(t, h * nope));
        for (Index i = 0; i < config_.rope_dim; ++i) d_rope_keys(t, i) += from[nope + i];
      }
    }
  });
}

template <std::floating_point T>
CausalAttention<T> LatentExpanded<T>::core(MatrixIn<T> q, std::span<const AttentionSpan> spans,
                                           std::span<const std::uint8_t> mask,
                                           const Cache& cache) const {
  return {{config_.heads, config_.heads, config_.query_dim(), config_.value_dim, config_.scale()},
          spans,
          mask,
          q,
          cache.k.view(),
          cache.v.view()};
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::LatentExpanded<float>;
extern template class weir::LatentExpanded<double>;
#endif
