// SPDX-License-Identifier: MIT
/// \file
/// Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/causal.hpp>
#include <weir/attention/latent_absorbed.hpp>
#include <weir/attention/latent_cache.hpp>
#include <weir/attention/latent_config.hpp>
#include <weir/core/decode_states.hpp>
#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/weight.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/ops/rope.hpp>

namespace weir {

/// Causal self-attention whose keys and values of all heads are made from one short latent c per
/// token, so that a latent and one key of position are all that decoding has to remember:
///
///     c = norm(x W_dkv^T),    k_rope = rope(x W_kr^T)                   (shared by all heads)
///     q_h = [q_nope_h | rope(q_rope_h)] = norm(x W_dq^T) W_q_h^T        (or x W_q_h^T)
///     k_h = [c W_uk_h^T | k_rope],    v_h = c W_uv_h^T
///     y = concat_h(softmax(scale q_h k_h^T) v_h) W_o^T,    scale = m / sqrt(nope_dim + rope_dim)
///
/// norm is `RmsNorm`, rope rotates neighbouring numbers (RopeLayout::kInterleaved), and m is 1 or,
/// with a Yarn, its `score_scale()`. Sequences, positions and padding are as in
/// GroupedQueryAttention.
///
/// Decoding may go another way to the same result, see LatentDecoding and LatentAbsorbed. Stored
/// for inference, W_uk and W_uv are there twice, once for either way.
///
/// Released checkpoints have W_dkv above W_kr in one matrix, as here, and for each head W_uk_h
/// above W_uv_h, which are two parameters here.
template <std::floating_point T>
class LatentAttention {
 public:
  using Scalar = T;
  using Config = LatentConfig;
  using State = LatentCache<T>;  ///< What `decode` remembers of one sequence.

  struct Cache {
    bool recorded = false;  ///< Whether the last pass was a `forward`, which `backward` can follow.
    Matrix<T> x;
    Matrix<T> query_down;  ///< Latents of queries before their norm.
    Matrix<T> kv;          ///< [latents before their norm | rotated keys of positions]
    typename RmsNorm<T>::Cache query_norm, kv_norm;
    Matrix<T> q;                ///< Rotated.
    Scratch<T> key_nope, k, v;  ///< Of all tokens that queries look at.
    Matrix<T> context;          ///< The heads' outputs side by side, [tokens, heads * value_dim].
    Matrix<T> y;
    Matrix<T> d_context, dq, d_query_latent, dk, d_key_nope, dv, d_latent, d_kv, dx;
    Scratch<T> angles;
    std::vector<Index> positions;
    std::vector<AttentionSpan> spans;
    std::vector<std::uint8_t> mask;
    typename CausalAttention<T>::Cache attention;
    typename LatentAbsorbed<T>::Cache absorbed;
  };

  /// Weights begin as `switch_init` with scale 1.
  /// \throws ConfigError  if a size is below 1, rope_dim is odd, or Rope or RmsNorm refuse theirs.
  LatentAttention(const Config& config, Rng& rng)
      : config_(checked(config)),
        rope_(config_.rope_dim, config_.rope_theta, RopeLayout::kInterleaved, config_.yarn),
        kv_norm_(config_.kv_rank, config_.norm_epsilon),
        query_(switch_init<T>(config_.heads * config_.query_dim(),
                              is_low_rank() ? config_.q_rank : config_.d_model, rng, 1.0)),
        kv_down_(switch_init<T>(config_.kv_rank + config_.rope_dim, config_.d_model, rng, 1.0)),
        key_up_(switch_init<T>(config_.heads * config_.nope_dim, config_.kv_rank, rng, 1.0)),
        value_up_(switch_init<T>(config_.heads * config_.value_dim, config_.kv_rank, rng, 1.0)),
        output_(switch_init<T>(config_.d_model, config_.heads * config_.value_dim, rng, 1.0)),
        absorbed_(config_) {
    if (is_low_rank()) {
      query_down_ = kernels::Weight<T>(switch_init<T>(config_.q_rank, config_.d_model, rng, 1.0));
      query_norm_.emplace(config_.q_rank, config_.norm_epsilon);
    }
  }

  const Config& config() const { return config_; }

  /// See `weir::set_storage`; norms stay parameters.
  void set_storage(Storage storage) {
    if (storage == output_.storage()) return;
    for (kernels::Weight<T>* weight :
         {&query_down_, &query_, &kv_down_, &key_up_, &value_up_, &output_}) {
      weight->set_storage(Storage::kTrainable);
    }
    if (config_.decoding != LatentDecoding::kExpanded) {
      absorbed_.set_storage(value_of(key_up_), value_of(value_up_), storage);
    }
    for (kernels::Weight<T>* weight :
         {&query_down_, &query_, &kv_down_, &key_up_, &value_up_, &output_}) {
      weight->set_storage(storage);
    }
  }

  /// \param x  [tokens, d_model], one sequence.
  /// \return   [tokens, d_model].
  /// \throws ShapeError   if x does not have d_model columns.
  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    forward(x, cache);
    return std::move(cache.y);
  }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, Pass{}, cache); }

  /// \param x     [tokens, d_model], the sequences of `pass` one after the other.
  /// \param pass  Its sequences and its padding mask are looked at.
  /// \throws ShapeError   if x does not have d_model columns, or pass does not fit it.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    expect_columns("LatentAttention::forward", "x", x, config_.d_model);
    pass.check("LatentAttention::forward", x.rows());
    cache.x = x;
    cache.mask.assign(pass.mask.begin(), pass.mask.end());
    fill_spans(pass, x.rows(), cache.spans);
    project(x, cache);
    expand(cache.kv_norm.y, cache.kv.rightCols(config_.rope_dim), cache);
    cache.context.resize(x.rows(), config_.heads * config_.value_dim);
    expanded(cache, cache.spans).forward(cache.context, cache.attention);
    finish(cache);
    cache.recorded = true;
    return cache.y;
  }

  /// Adds to the gradients of the parameters.
  /// \param dy  [tokens, d_model], the gradient of what `forward` returned last.
  /// \return    The gradient of its x.
  /// \throws StateError   unless the cache comes from `forward`, or if the weights are stored for
  ///                      inference.
  /// \throws ShapeError   if dy is not shaped like the output.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    constexpr auto kWhere = "LatentAttention::backward";
    expect_trainable(kWhere, output_.storage());
    if (!cache.recorded) fail<StateError>(kWhere, ": the cache holds no forward pass");
    expect_shape(kWhere, "dy", dy, cache.y.rows(), cache.y.cols());
    const Index tokens = dy.rows();
    cache.d_context.resize(tokens, cache.context.cols());
    cache.dq.resize(tokens, cache.q.cols());
    cache.dk.resize(tokens, cache.k.cols());
    cache.dv.resize(tokens, cache.v.cols());
    cache.d_key_nope.resize(tokens, cache.key_nope.cols());
    cache.d_latent.resize(tokens, config_.kv_rank);
    cache.d_kv.resize(tokens, cache.kv.cols());
    cache.dx.resize(tokens, config_.d_model);

    multiply_nn<T>(dy, value_of(output_), cache.d_context);
    multiply_tn<T>(dy, cache.context, gradient_of(output_), true);
    expanded(cache, cache.spans)
        .backward(cache.context, cache.d_context, cache.dq, cache.dk, cache.dv, cache.attention);
    rope_.template rotate_back<T>(cache.dq, cache.angles, rotated_part());
    take_apart(cache);
    rope_.template rotate_back<T>(cache.d_kv.rightCols(config_.rope_dim), cache.angles);

    const Matrix<T>& latent = cache.kv_norm.y;
    const std::array<Product<T>, 2> ups = {
        product_tn<T>(cache.d_key_nope, latent, gradient_of(key_up_), true),
        product_tn<T>(cache.dv, latent, gradient_of(value_up_), true)};
    multiply<T>(ups);
    multiply_nn<T>(cache.d_key_nope, value_of(key_up_), cache.d_latent);
    multiply_nn<T>(cache.dv, value_of(value_up_), cache.d_latent, true);
    cache.d_kv.leftCols(config_.kv_rank) = kv_norm_.backward(cache.d_latent, cache.kv_norm);
    multiply_tn<T>(cache.d_kv, cache.x, gradient_of(kv_down_), true);
    multiply_nn<T>(cache.d_kv, value_of(kv_down_), cache.dx);

    if (is_low_rank()) {
      cache.d_query_latent.resize(tokens, config_.q_rank);
      multiply_tn<T>(cache.dq, cache.query_norm.y, gradient_of(query_), true);
      multiply_nn<T>(cache.dq, value_of(query_), cache.d_query_latent);
      const Matrix<T>& d_down = query_norm_->backward(cache.d_query_latent, cache.query_norm);
      multiply_tn<T>(d_down, cache.x, gradient_of(query_down_), true);
      multiply_nn<T>(d_down, value_of(query_down_), cache.dx, true);
    } else {
      multiply_tn<T>(cache.dq, cache.x, gradient_of(query_), true);
      multiply_nn<T>(cache.dq, value_of(query_), cache.dx, true);
    }
    return cache.dx;
  }

  /// Continues several sequences at once: token by token, in chunks, or with whole prompts.
  /// \param x       [new tokens, d_model], those of the sequences of `pass` one after the other.
  /// \param pass    Its sequences are looked at. Null is one; padding is refused.
  /// \param states  For each sequence what it has seen so far; the new tokens are added.
  /// \param cache   Workspace. It cannot be followed by `backward`.
  /// \return        [new tokens, d_model], to rounding what `forward` of the wholes gives.
  /// \throws ShapeError   if x does not have d_model columns, pass does not fit it, or a state is
  ///                      of another layer.
  /// \throws StateError   unless there is one state for each sequence, all different.
  /// \throws ConfigError  if a token is padding: a state holds none.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const {
    check_decode(x, pass, states);
    cache.recorded = false;
    cache.mask.clear();
    fill_spans(pass, x.rows(), cache.spans);
    for (std::size_t s = 0; s < states.size(); ++s) {
      cache.spans[s].key_begin = 0;
      cache.spans[s].keys += states[s]->length();
    }
    project(x, cache);
    const auto rope_keys = cache.kv.rightCols(config_.rope_dim);
    for (std::size_t s = 0; s < states.size(); ++s) {
      const AttentionSpan& span = cache.spans[s];
      states[s]->append(cache.kv_norm.y.middleRows(span.query_begin, span.queries),
                        rope_keys.middleRows(span.query_begin, span.queries));
    }
    cache.context.resize(x.rows(), config_.heads * config_.value_dim);
    cache.absorbed.clear();
    for (std::size_t s = 0; s < states.size(); ++s) {
      if (is_absorbed(cache.spans[s])) {
        cache.absorbed.add(cache.spans[s], *states[s]);
      } else {
        expand(states[s]->latents(), states[s]->rope_keys(), cache);
        expanded(cache, {&cache.spans[s], 1}).forward(cache.context, cache.attention);
      }
    }
    absorbed_.attend(cache.q, value_of(key_up_), value_of(value_up_), cache.context,
                     cache.absorbed);
    finish(cache);
    return cache.y;
  }

  /// The same for one sequence.
  const Matrix<T>& decode(MatrixIn<T> x, State& state, Cache& cache) const {
    State* const only = &state;
    return decode(x, Pass{}, {&only, 1}, cache);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    const bool trainable = self.output_.storage() == Storage::kTrainable;
    if (self.query_norm_) {
      if (trainable) visit("query_down", self.query_down_.parameter());
      visit("query_norm", *self.query_norm_);
    }
    if (trainable) {
      visit("query", self.query_.parameter());
      visit("kv_down", self.kv_down_.parameter());
    }
    visit("kv_norm", self.kv_norm_);
    if (trainable) {
      visit("key_up", self.key_up_.parameter());
      visit("value_up", self.value_up_.parameter());
      visit("output", self.output_.parameter());
    }
  }

 private:
  static const Config& checked(const Config& config) {
    config.check("LatentAttention");
    return config;
  }

  static Matrix<T>& gradient_of(kernels::Weight<T>& weight) {
    return weight.parameter().gradient();
  }
  static const Matrix<T>& value_of(const kernels::Weight<T>& weight) {
    return weight.parameter().value;
  }

  bool is_low_rank() const { return config_.q_rank > 0; }
  Rope::Part rotated_part() const { return {config_.query_dim(), config_.nope_dim}; }

  void check_decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states) const {
    constexpr auto kWhere = "LatentAttention::decode";
    expect_columns(kWhere, "x", x, config_.d_model);
    pass.check(kWhere, x.rows());
    expect_states(kWhere, pass, states);
    for (const State* held : states) {
      if (held->empty()) continue;
      expect_shape(kWhere, "latents", held->latents(), held->length(), config_.kv_rank);
      expect_shape(kWhere, "rope_keys", held->rope_keys(), held->length(), config_.rope_dim);
    }
  }

  /// x to queries, and to latents and keys of positions, rotated to the positions of the spans.
  void project(MatrixIn<T> x, Cache& cache) const {
    const Index tokens = x.rows();
    cache.q.resize(tokens, config_.heads * config_.query_dim());
    cache.kv.resize(tokens, config_.kv_rank + config_.rope_dim);
    if (is_low_rank()) {
      cache.query_down.resize(tokens, config_.q_rank);
      kernels::multiply_weights<T, 2>(x, {{{query_down_, cache.query_down}, {kv_down_, cache.kv}}});
      query_norm_->forward(cache.query_down, cache.query_norm);
      kernels::multiply_weights<T, 1>(cache.query_norm.y, {{{query_, cache.q}}});
    } else {
      kernels::multiply_weights<T, 2>(x, {{{query_, cache.q}, {kv_down_, cache.kv}}});
    }
    kv_norm_.forward(cache.kv.leftCols(config_.kv_rank), cache.kv_norm);

    fill_positions(cache.spans, tokens, cache.positions);
    rope_.tabulate(std::span<const Index>(cache.positions), cache.angles);
    rope_.template rotate<T>(cache.q, cache.angles, rotated_part());
    rope_.template rotate<T>(cache.kv.rightCols(config_.rope_dim), cache.angles);
  }

  /// Computes the keys and values of all heads.
  /// \param latents    [keys, kv_rank]
  /// \param rope_keys  [keys, rope_dim]
  void expand(MatrixIn<T> latents, MatrixIn<T> rope_keys, Cache& cache) const {
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

  /// The reverse for gradients: cache.dk to d_key_nope and, added up over heads, the right columns
  /// of d_kv.
  void take_apart(Cache& cache) const {
    const Index nope = config_.nope_dim;
    auto d_rope_key = cache.d_kv.rightCols(config_.rope_dim);
    parallel_rows(cache.dk.rows(), cache.dk.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        d_rope_key.row(t).setZero();
        for (Index h = 0; h < config_.heads; ++h) {
          const T* const from = &cache.dk(t, h * config_.query_dim());
          std::copy_n(from, nope, &cache.d_key_nope(t, h * nope));
          for (Index i = 0; i < config_.rope_dim; ++i) d_rope_key(t, i) += from[nope + i];
        }
      }
    });
  }

  CausalAttention<T> expanded(const Cache& cache, std::span<const AttentionSpan> spans) const {
    return {{config_.heads, config_.heads, config_.query_dim(), config_.value_dim, config_.scale()},
            spans,
            cache.mask,
            cache.q,
            cache.k.view(),
            cache.v.view()};
  }

  /// Whether a sequence takes the absorbed way. Both ways are counted in multiply-adds of one head:
  /// queries go down to the latents and come up again, or all keys go up.
  bool is_absorbed(const AttentionSpan& s) const {
    if (config_.decoding != LatentDecoding::kCheaper) {
      return config_.decoding == LatentDecoding::kAbsorbed;
    }
    const Index up = (config_.nope_dim + config_.value_dim) * config_.kv_rank;
    const Index pairs = s.queries * (s.keys - s.queries) + s.queries * (s.queries + 1) / 2;
    const Index absorbed = s.queries * up + pairs * (2 * config_.kv_rank + config_.rope_dim);
    const Index expanded = s.keys * up + pairs * (config_.query_dim() + config_.value_dim);
    return absorbed <= expanded;
  }

  /// cache.context to cache.y.
  void finish(Cache& cache) const {
    cache.y.resize(cache.context.rows(), config_.d_model);
    kernels::multiply_weights<T, 1>(cache.context, {{{output_, cache.y}}});
  }

  Config config_;
  Rope rope_;
  std::optional<RmsNorm<T>> query_norm_;
  RmsNorm<T> kv_norm_;
  kernels::Weight<T> query_down_, query_, kv_down_, key_up_, value_up_, output_;
  LatentAbsorbed<T> absorbed_;
};

}  // namespace weir
