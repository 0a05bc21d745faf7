// SPDX-License-Identifier: MIT
/// \file
/// Causal self-attention with rotary positions in which groups of query heads share keys and values
/// (Ainslie et al. 2023, arXiv:2305.13245).
#pragma once

#include <array>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include <weir/attention/causal.hpp>
#include <weir/attention/decode_states.hpp>
#include <weir/attention/kv_cache.hpp>
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
#include <weir/ops/lanes.hpp>
#include <weir/ops/rope.hpp>

namespace weir {

/// The numbers of a `GroupedQueryAttention`.
struct GroupedQueryConfig {
  Index d_model = 0;
  Index heads = 0;
  Index kv_heads = 0;  ///< Divides heads: `heads` is multi-head, 1 is multi-query attention.
  Index head_dim = 0;  ///< Even; 0 stands for d_model / heads.
  double rope_theta = 1e4;
  RopeLayout rope_layout = RopeLayout::kHalfSplit;
  bool qkv_bias = false;     ///< On the projections to queries, keys and values.
  bool output_bias = false;  ///< On the projection of the heads' outputs.
};

/// Each token looks at the tokens before it in its sequence, and at itself:
///
///     q = rope(x Wq^T + bq),    k = rope(x Wk^T + bk),    v = x Wv^T + bv
///     y = concat_h(softmax(q_h k_g^T / sqrt(head_dim)) v_g) Wo^T + bo,    g = h / (heads /
///     kv_heads)
///
/// The softmax runs over the keys of the same sequence up to the query's own position; positions
/// begin at 0 in each sequence of the pass. Padding tokens are seen by no one. Their own rows are
/// computed like any other; a query that sees no key, not even itself, gets zero from the attention
/// (so y = bo) and passes no gradient through it. Padding still counts as a position.
///
/// Memory is linear in the number of tokens: probabilities are never stored (see CausalAttention).
template <std::floating_point T>
class GroupedQueryAttention {
 public:
  using Scalar = T;
  using Config = GroupedQueryConfig;
  using State = KvCache<T>;  ///< What `decode` remembers of one sequence.

  struct Cache {
    bool recorded = false;  ///< Whether the last pass was a `forward`, which `backward` can follow.
    Matrix<T> x;
    Matrix<T> q, k, v;  ///< Queries and keys after rotation.
    Matrix<T> context;  ///< The heads' outputs side by side, [tokens, heads * head_dim].
    Matrix<T> y;
    Matrix<T> d_context, dq, dk, dv, dx;
    Scratch<T> angles;
    std::vector<Index> positions;
    std::vector<AttentionSpan> spans;
    std::vector<std::uint8_t> mask;
    typename CausalAttention<T>::Cache attention;
  };

  /// Weights begin as `switch_init` with scale 1, biases as zero.
  /// \throws ConfigError  if a size is below 1, head_dim is odd, or heads do not divide evenly.
  GroupedQueryAttention(const Config& config, Rng& rng)
      : config_(checked(config)),
        rope_(config_.head_dim, config_.rope_theta, config_.rope_layout),
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

  /// See `weir::set_storage`; biases stay parameters.
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
    fill_spans(pass, cache);
    project(cache);
    cache.context.resize(x.rows(), query_width());
    core(cache, cache.spans, cache.k, cache.v).forward(cache.context, cache.attention);
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
    core(cache, cache.spans, cache.k, cache.v)
        .backward(cache.context, cache.d_context, cache.dq, cache.dk, cache.dv, cache.attention);
    rope_.template rotate_back<T>(cache.dq, cache.angles);
    rope_.template rotate_back<T>(cache.dk, cache.angles);

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
    fill_spans(pass, cache);
    for (std::size_t s = 0; s < states.size(); ++s) {
      cache.spans[s].key_begin = 0;
      cache.spans[s].keys += states[s]->length();
    }
    project(cache);
    cache.context.resize(x.rows(), query_width());
    for (std::size_t s = 0; s < states.size(); ++s) {
      const AttentionSpan& span = cache.spans[s];
      states[s]->append(cache.k.middleRows(span.query_begin, span.queries),
                        cache.v.middleRows(span.query_begin, span.queries));
      core(cache, {&span, 1}, states[s]->keys(), states[s]->values())
          .forward(cache.context, cache.attention);
    }
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
  }

 private:
  static Config checked(Config config) {
    constexpr auto kWhere = "GroupedQueryAttention";
    expect_at_least<Index>(kWhere, "d_model", config.d_model, 1);
    expect_at_least<Index>(kWhere, "heads", config.heads, 1);
    expect_at_least<Index>(kWhere, "kv_heads", config.kv_heads, 1);
    expect_at_least<Index>(kWhere, "head_dim", config.head_dim, 0);
    if (config.heads % config.kv_heads != 0) {
      fail<ConfigError>(kWhere, ": kv_heads = ", config.kv_heads,
                        ", expected a divisor of heads = ", config.heads);
    }
    if (config.head_dim == 0) {
      if (config.d_model % config.heads != 0) {
        fail<ConfigError>(kWhere, ": heads = ", config.heads,
                          ", expected a divisor of d_model = ", config.d_model,
                          " where head_dim is not given");
      }
      config.head_dim = config.d_model / config.heads;
    }
    if (config.head_dim % 2 != 0) {
      fail<ConfigError>(kWhere, ": head_dim = ", config.head_dim, ", expected an even number");
    }
    expect_positive(kWhere, "rope_theta", config.rope_theta);
    return config;
  }

  Index query_width() const { return config_.heads * config_.head_dim; }
  Index kv_width() const { return config_.kv_heads * config_.head_dim; }

  /// Each sequence of the pass with its own tokens as keys.
  static void fill_spans(const Pass& pass, Cache& cache) {
    cache.spans.clear();
    if (pass.sequences == nullptr) {
      cache.spans.push_back({0, cache.x.rows(), 0, cache.x.rows()});
      return;
    }
    for (Index s = 0; s < pass.sequences->count(); ++s) {
      const Index begin = pass.sequences->begin(s);
      const Index length = pass.sequences->length(s);
      cache.spans.push_back({begin, length, begin, length});
    }
  }

  void check_decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states) const {
    constexpr auto kWhere = "GroupedQueryAttention::decode";
    expect_columns(kWhere, "x", x, config_.d_model);
    pass.check(kWhere, x.rows());
    expect_states<State>(kWhere, pass, states);
    for (const State* kv : states) {
      if (kv->empty()) continue;
      expect_shape(kWhere, "kv.keys", kv->keys(), kv->length(), kv_width());
      expect_shape(kWhere, "kv.values", kv->values(), kv->length(), kv_width());
    }
  }

  /// cache.x to cache.q, k and v, rotated to the positions that the spans give them.
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
    cache.positions.resize(static_cast<std::size_t>(tokens));
    for (const AttentionSpan& s : cache.spans) {
      const auto first = cache.positions.begin() + s.query_begin;
      std::iota(first, first + s.queries, s.first_position());
    }
    rope_.tabulate(std::span<const Index>(cache.positions), cache.angles);
    rope_.template rotate<T>(cache.q, cache.angles);
    rope_.template rotate<T>(cache.k, cache.angles);
  }

  CausalAttention<T> core(const Cache& cache, std::span<const AttentionSpan> spans,
                          MatrixIn<T> keys, MatrixIn<T> values) const {
    const double scale = 1.0 / std::sqrt(static_cast<double>(config_.head_dim));
    return {{config_.heads, config_.kv_heads, config_.head_dim, config_.head_dim, scale},
            spans,
            cache.mask,
            cache.q,
            keys,
            values};
  }

  /// cache.context to cache.y.
  void project_out(Cache& cache) const {
    cache.y.resize(cache.context.rows(), config_.d_model);
    kernels::multiply_weights<T, 1>(cache.context, {{{output_, cache.y}}});
    if (config_.output_bias) cache.y.rowwise() += output_bias_.value.row(0);
  }

  Config config_;
  Rope rope_;
  kernels::Weight<T> query_, key_, value_, output_;
  Parameter<T> query_bias_ = {}, key_bias_ = {}, value_bias_ = {}, output_bias_ = {};
};

}  // namespace weir
