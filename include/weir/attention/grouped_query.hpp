// SPDX-License-Identifier: MIT
/// \file
/// Causal self-attention with rotary positions in which groups of query heads share keys and values
/// (Ainslie et al. 2023, arXiv:2305.13245).
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/causal.hpp>
#include <weir/attention/grouped_query_config.hpp>
#include <weir/attention/kv_cache.hpp>
#include <weir/attention/qk_norm.hpp>
#include <weir/core/decode_states.hpp>
#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/weight.hpp>
#include <weir/ops/clamp.hpp>
#include <weir/ops/rope.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Each token looks at the tokens before it in its sequence, and at itself:
///
///     q = rope(x Wq^T + bq),    k = rope(x Wk^T + bk),    v = x Wv^T + bv
///     y = concat_h(softmax(scale q_h k_g^T) v_g) Wo^T + bo,    g = h / (heads / kv_heads)
///
/// The softmax runs over the keys of the same sequence up to the query's own position; positions
/// begin at 0 in each sequence of the pass. `GroupedQueryConfig` says what else there may be:
/// windows, chunks, softcaps, sinks, norms, clamps.
///
/// Padding tokens are seen by no one. Their own rows are computed like any other; a query that sees
/// no key, not even itself, gets zero from the attention (so y = bo) and passes no gradient through
/// it. Padding still counts as a position.
///
/// Memory is linear in the number of tokens: probabilities are never stored (see CausalAttention).
/// With a window or chunks, so is time, and the state of decoding is bounded: it holds the keys
/// that are still in sight, and 64 tokens can always be taken back.
template <std::floating_point T>
class GroupedQueryAttention {
 public:
  using Scalar = T;
  using Config = GroupedQueryConfig;
  using State = KvCache<T>;  ///< What `decode` remembers of one sequence.

  struct Cache {
    bool recorded = false;  ///< Whether the last pass was a `forward`, which `backward` can follow.
    Matrix<T> x;
    Matrix<T> q, k, v;  ///< As attention gets them.
    Matrix<T> context;  ///< The heads' outputs side by side, [tokens, heads * head_dim].
    Matrix<T> y;
    Matrix<T> d_context, dq, dk, dv, dx;
    typename HeadNorm<T>::Cache query_norm, key_norm;
    Scratch<T> query_inverse, key_inverse;                                ///< See `HeadL2Norm`.
    std::vector<std::uint8_t> query_outside, key_outside, value_outside;  ///< See `Clamp`.
    Scratch<T> angles;
    std::vector<Index> positions;
    std::vector<AttentionSpan> spans;
    std::vector<KeyValueRows<T>> rows;
    std::vector<std::uint8_t> mask;
    typename CausalAttention<T>::Cache attention;
  };

  /// Weights begin as `switch_init` with scale 1, biases and sinks as zero, norms as one.
  /// \throws ConfigError  if the config is not sound, see `GroupedQueryConfig::checked`.
  GroupedQueryAttention(const Config& config, Rng& rng)
      : config_(config.checked()),
        query_(switch_init<T>(query_width(), config_.d_model, rng, 1.0)),
        key_(switch_init<T>(kv_width(), config_.d_model, rng, 1.0)),
        value_(switch_init<T>(kv_width(), config_.d_model, rng, 1.0)),
        output_(switch_init<T>(config_.d_model, query_width(), rng, 1.0)) {
    if (config_.qkv_bias) {
      query_bias_.value.setZero(1, query_width());
      key_bias_.value.setZero(1, kv_width());
      value_bias_.value.setZero(1, kv_width());
    }
    if (config_.output_bias) output_bias_.value.setZero(1, config_.d_model);
    if (config_.sinks) sinks_.value.setZero(1, config_.heads);
    if (config_.rope) {
      rope_.emplace(config_.head_dim, config_.rope_theta, config_.rope_layout, config_.yarn);
    }
    if (config_.qk_norm == QkNorm::kFull) {
      query_norm_.emplace(query_width(), config_.qk_norm_epsilon);
      key_norm_.emplace(kv_width(), config_.qk_norm_epsilon);
    } else if (config_.qk_norm == QkNorm::kPerHead) {
      query_norm_.emplace(config_.head_dim, config_.qk_norm_epsilon);
      key_norm_.emplace(config_.head_dim, config_.qk_norm_epsilon);
    }
  }

  /// With head_dim filled in.
  const Config& config() const { return config_; }

  /// The weights; empty where they are stored for inference.
  Parameter<T>& query() { return query_.parameter(); }  ///< [heads * head_dim, d_model]
  const Parameter<T>& query() const { return query_.parameter(); }
  Parameter<T>& key() { return key_.parameter(); }  ///< [kv_heads * head_dim, d_model]
  const Parameter<T>& key() const { return key_.parameter(); }
  Parameter<T>& value() { return value_.parameter(); }  ///< [kv_heads * head_dim, d_model]
  const Parameter<T>& value() const { return value_.parameter(); }
  Parameter<T>& output() { return output_.parameter(); }  ///< [d_model, heads * head_dim]
  const Parameter<T>& output() const { return output_.parameter(); }

  /// See `weir::set_storage`; biases, norms and sinks stay parameters.
  void set_storage(Storage storage) {
    for (kernels::Weight<T>* weight : {&query_, &key_, &value_, &output_}) {
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
    expect_columns("GroupedQueryAttention::forward", "x", x, config_.d_model);
    pass.check("GroupedQueryAttention::forward", x.rows());
    cache.x = x;
    cache.mask.assign(pass.mask.begin(), pass.mask.end());
    fill_spans(pass, cache.x.rows(), cache.spans);
    project(cache);
    cache.context.resize(x.rows(), query_width());
    core(cache).forward(cache.context, cache.attention);
    project_out(cache);
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
    expect_trainable("GroupedQueryAttention::backward", query_.storage());
    if (!cache.recorded) {
      fail<StateError>("GroupedQueryAttention::backward: the cache holds no forward pass");
    }
    expect_shape("GroupedQueryAttention::backward", "dy", dy, cache.y.rows(), cache.y.cols());
    const Index tokens = dy.rows();
    cache.d_context.resize(tokens, query_width());
    cache.dq.resize(tokens, query_width());
    cache.dk.resize(tokens, kv_width());
    cache.dv.resize(tokens, kv_width());
    cache.dx.resize(tokens, config_.d_model);

    multiply_nn<T>(dy, output().value, cache.d_context);
    multiply_tn<T>(dy, cache.context, output().gradient(), true);
    core(cache).backward(cache.context, cache.d_context, cache.dq, cache.dk, cache.dv,
                         cache.attention, d_sinks());
    prepare_backward(cache);

    const std::array<Product<T>, 3> weights = {
        product_tn<T>(cache.dq, cache.x, query().gradient(), true),
        product_tn<T>(cache.dk, cache.x, key().gradient(), true),
        product_tn<T>(cache.dv, cache.x, value().gradient(), true)};
    multiply<T>(weights);
    if (config_.qkv_bias) {
      add_rows_to<T>(cache.dq, query_bias_.gradient().data());
      add_rows_to<T>(cache.dk, key_bias_.gradient().data());
      add_rows_to<T>(cache.dv, value_bias_.gradient().data());
    }
    if (config_.output_bias) add_rows_to<T>(dy, output_bias_.gradient().data());
    multiply_nn<T>(cache.dq, query().value, cache.dx);
    multiply_nn<T>(cache.dk, key().value, cache.dx, true);
    multiply_nn<T>(cache.dv, value().value, cache.dx, true);
    return cache.dx;
  }

  /// Continues one sequence: token by token, in chunks, or with a whole prompt at once.
  /// \param x      [new tokens, d_model], following on what `kv` holds.
  /// \param kv     The keys and values so far; those of x are added.
  /// \param cache  Workspace. It cannot be followed by `backward`.
  /// \return       [new tokens, d_model], to rounding what `forward` of the whole sequence gives.
  /// \throws ShapeError   if x does not have d_model columns, or kv is of another layer.
  const Matrix<T>& decode(MatrixIn<T> x, State& kv, Cache& cache) const {
    State* const states[] = {&kv};
    return decode(x, Pass{}, states, cache);
  }

  /// Continues several sequences at once, each by any number of tokens.
  /// \param x       [new tokens, d_model], those of all sequences one after the other.
  /// \param pass    Its sequences say how the rows of x divide; without, there is one.
  /// \param states  One for each sequence, all different.
  /// \return        [new tokens, d_model], for each sequence to rounding what it gets alone.
  /// \throws ShapeError   if x does not have d_model columns, pass does not fit it, or a state is
  /// of
  ///                      another layer.
  /// \throws StateError   unless there is one state for each sequence.
  /// \throws ConfigError  if a token is padding: a state holds none.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const {
    check_decode(x, pass, states);
    cache.recorded = false;
    cache.x = x;
    cache.mask.clear();
    fill_spans(pass, cache.x.rows(), cache.spans);
    for (std::size_t s = 0; s < states.size(); ++s) {
      State& kv = *states[s];
      if (config_.window > 0 || config_.chunk > 0) {
        const Index from = std::max<Index>(0, kv.length() - State::kSlack);
        kv.forget(config_.shape().first_visible(from), from);
      }
      cache.spans[s].first_key = kv.first();
      cache.spans[s].keys += kv.held();
    }
    project(cache);
    cache.rows.clear();
    for (std::size_t s = 0; s < states.size(); ++s) {
      const AttentionSpan& span = cache.spans[s];
      State& kv = *states[s];
      kv.append(cache.k.middleRows(span.query_begin, span.queries),
                cache.v.middleRows(span.query_begin, span.queries));
      cache.rows.push_back({kv.keys().data(), kv_width(), kv.values().data(), kv_width()});
    }
    cache.context.resize(x.rows(), query_width());
    CausalAttention<T>(config_.shape(), cache.spans, cache.q, cache.rows, sinks())
        .forward(cache.context, cache.attention);
    project_out(cache);
    return cache.y;
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (self.query_.storage() == Storage::kTrainable) {
      visit("query", self.query());
      visit("key", self.key());
      visit("value", self.value());
      visit("output", self.output());
    }
    if (self.config_.qkv_bias) {
      visit("query_bias", self.query_bias_);
      visit("key_bias", self.key_bias_);
      visit("value_bias", self.value_bias_);
    }
    if (self.config_.output_bias) visit("output_bias", self.output_bias_);
    if (self.query_norm_) {
      visit("query_norm", self.query_norm_->weight());
      visit("key_norm", self.key_norm_->weight());
    }
    if (self.config_.sinks) visit("sinks", self.sinks_);
  }

 private:
  Index query_width() const { return config_.query_width(); }
  Index kv_width() const { return config_.kv_width(); }

  std::span<const T> sinks() const {
    return {sinks_.value.data(), static_cast<std::size_t>(sinks_.value.size())};
  }
  std::span<T> d_sinks() {
    if (!config_.sinks) return {};
    return {sinks_.gradient().data(), static_cast<std::size_t>(config_.heads)};
  }

  void check_decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states) const {
    constexpr auto kWhere = "GroupedQueryAttention::decode";
    expect_columns(kWhere, "x", x, config_.d_model);
    pass.check(kWhere, x.rows());
    expect_states<State>(kWhere, pass, states);
    for (const State* kv : states) {
      if (kv->empty()) continue;
      expect_shape(kWhere, "kv.keys", kv->keys(), kv->held(), kv_width());
      expect_shape(kWhere, "kv.values", kv->values(), kv->held(), kv_width());
      const Index needed = config_.shape().first_visible(kv->length());
      if (kv->first() > needed) {
        fail<StateError>(kWhere, ": kv begins at position ", kv->first(), ", expected ", needed,
                         " or before: it is of a layer with a smaller window");
      }
    }
  }

  /// cache.x to cache.q, k and v, at the positions that the spans give them.
  void project(Cache& cache) const {
    const Index tokens = cache.x.rows();
    cache.q.resize(tokens, query_width());
    cache.k.resize(tokens, kv_width());
    cache.v.resize(tokens, kv_width());
    kernels::multiply_weights<T, 3>(cache.x,
                                    {{{query_, cache.q}, {key_, cache.k}, {value_, cache.v}}});
    if (config_.qkv_bias) {
      cache.q.rowwise() += query_bias_.value.row(0);
      cache.k.rowwise() += key_bias_.value.row(0);
      cache.v.rowwise() += value_bias_.value.row(0);
    }
    fill_positions(cache.spans, tokens, cache.positions);
    prepare(cache);
  }

  /// What happens to queries, keys and values between the projections and attention.
  void prepare(Cache& cache) const {
    if (config_.clip_qkv > 0.0) {
      const Clamp<T> clamp = {static_cast<T>(config_.clip_qkv)};
      clamp.forward(cache.q, cache.query_outside);
      clamp.forward(cache.k, cache.key_outside);
      clamp.forward(cache.v, cache.value_outside);
    }
    if (query_norm_) {
      query_norm_->forward(cache.q, cache.query_norm);
      key_norm_->forward(cache.k, cache.key_norm);
    }
    if (rope_) {
      rope_->tabulate(std::span<const Index>(cache.positions), cache.angles);
      rope_->template rotate<T>(cache.q, cache.angles);
      rope_->template rotate<T>(cache.k, cache.angles);
    }
    if (config_.qk_norm == QkNorm::kL2) {
      l2_norm().forward(cache.q, cache.query_inverse);
      l2_norm().forward(cache.k, cache.key_inverse);
    }
    if (config_.temperature_scale > 0.0) temper(cache.positions, cache.q);
  }

  /// The gradients of what `prepare` left to those of what it was given.
  void prepare_backward(Cache& cache) {
    if (config_.temperature_scale > 0.0) temper(cache.positions, cache.dq);
    if (config_.qk_norm == QkNorm::kL2) {
      l2_norm().backward(cache.q, cache.dq, cache.query_inverse);
      l2_norm().backward(cache.k, cache.dk, cache.key_inverse);
    }
    if (rope_) {
      rope_->template rotate_back<T>(cache.dq, cache.angles);
      rope_->template rotate_back<T>(cache.dk, cache.angles);
    }
    if (query_norm_) {
      query_norm_->backward(cache.dq, cache.query_norm);
      key_norm_->backward(cache.dk, cache.key_norm);
    }
    if (config_.clip_qkv > 0.0) {
      Clamp<T>::backward(cache.dq, cache.query_outside);
      Clamp<T>::backward(cache.dk, cache.key_outside);
      Clamp<T>::backward(cache.dv, cache.value_outside);
    }
  }

  HeadL2Norm<T> l2_norm() const { return {config_.head_dim, config_.qk_norm_epsilon}; }

  /// Multiplies each row by the temperature of its position.
  void temper(const std::vector<Index>& positions, Matrix<T>& rows) const {
    for (Index t = 0; t < rows.rows(); ++t) {
      rows.row(t) *= static_cast<T>(config_.temperature(positions[static_cast<std::size_t>(t)]));
    }
  }

  CausalAttention<T> core(const Cache& cache) const {
    return {config_.shape(), cache.spans, cache.mask, cache.q, cache.k, cache.v, sinks()};
  }

  /// cache.context to cache.y.
  void project_out(Cache& cache) const {
    cache.y.resize(cache.context.rows(), config_.d_model);
    kernels::multiply_weights<T, 1>(cache.context, {{{output_, cache.y}}});
    if (config_.output_bias) cache.y.rowwise() += output_bias_.value.row(0);
  }

  Config config_;
  std::optional<Rope> rope_;
  kernels::Weight<T> query_, key_, value_, output_;
  Parameter<T> query_bias_ = {}, key_bias_ = {}, value_bias_ = {}, output_bias_ = {};
  Parameter<T> sinks_ = {};  // [1, heads]
  std::optional<HeadNorm<T>> query_norm_, key_norm_;
};

}  // namespace weir
