// SPDX-License-Identifier: MIT
/// \file
/// Causal self-attention with rotary positions in which groups of query heads share keys and values
/// (Ainslie et al. 2023, arXiv:2305.13245).
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <span>
#include <string_view>

#include <weir/attention/causal.hpp>
#include <weir/attention/grouped_query_config.hpp>
#include <weir/attention/kv_cache.hpp>
#include <weir/attention/qkv_stages.hpp>
#include <weir/attention/spans.hpp>
#include <weir/core/decoding.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/precision.hpp>
#include <weir/core/random.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/token_rows.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/e4m3_rows.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/weight.hpp>
#include <weir/nn/adapted.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Each token looks at the tokens before it in its sequence, and at itself:
///
///     q = rope(x Wq^T + bq),    k = rope(x Wk^T + bk),    v = x Wv^T + bv
///     y = concat_h(softmax(scale q_h k_g^T) v_g) Wo^T + bo,    g = h / (heads / kv_heads)
///
/// The softmax runs over the keys of the same sequence up to the query's own position; positions
/// begin at 0 with the first token of each sequence that is not padding. `GroupedQueryConfig` lists
/// the options: windows, chunks, softcaps, sinks, and the stages of `QkvStages`.
///
/// Padding is seen by no one, is not read and yields zero, see PaddingRows. Before a sequence it
/// changes nothing at all; between real tokens it counts as a position.
///
/// Memory is linear in the number of tokens: probabilities are never stored (see CausalAttention).
/// With a window or chunks, time is linear too, and the state of decoding is bounded: it holds the
/// keys that are still in sight, so that 64 tokens can always be taken back.
template <std::floating_point T>
class GroupedQueryAttention {
 public:
  using Scalar = T;
  using Config = GroupedQueryConfig;
  using State = KvCache<T>;  ///< What `decode` remembers of one sequence.

  struct Cache {
    CacheState state;
    Matrix<T> x;                     ///< The input; padding is zero.
    kernels::E4M3Rows<T> rounded_x;  ///< Instead of x, in training in FP8.
    Matrix<T> q, k, v;               ///< The inputs of attention.
    Matrix<T> context;  ///< The heads' outputs side by side, [tokens, heads * head_dim].
    Matrix<T> y;
    Matrix<T> dy;  ///< Only used if there is padding.
    Matrix<T> dx;
    Workspace workspace;  ///< For gradients between dy and dx.
    TokenRows rows;
    List<AttentionSpan> spans;
    List<Index> positions;
    List<KeyValueRows<T>> kept;  ///< The contents of the states, in `decode`.
    typename QkvStages<T>::Cache stages;
    typename CausalAttention<T>::Cache attention;
    Adapted<T> adapted_query, adapted_key, adapted_value, adapted_output;
  };

  /// Weights begin as `switch_init` (see also `GroupedQueryConfig::fold_scale`), biases and sinks
  /// as zero, norms as one. \throws ConfigError  if the config is not sound, see
  /// `GroupedQueryConfig::checked`.
  GroupedQueryAttention(Rng& rng, const Config& config);

  /// The settings, with head_dim filled in.
  const Config& config() const { return config_; }

  /// The weights; without values where they are stored for inference.
  LinearParameter<T>& query() { return query_.parameter(); }  ///< [heads * head_dim, d_model]
  const LinearParameter<T>& query() const { return query_.parameter(); }
  LinearParameter<T>& key() { return key_.parameter(); }  ///< [kv_heads * head_dim, d_model]
  const LinearParameter<T>& key() const { return key_.parameter(); }
  LinearParameter<T>& value() { return value_.parameter(); }  ///< [kv_heads * head_dim, d_model]
  const LinearParameter<T>& value() const { return value_.parameter(); }
  LinearParameter<T>& output() { return output_.parameter(); }  ///< [d_model, heads * head_dim]
  const LinearParameter<T>& output() const { return output_.parameter(); }

  /// See `weir::set_storage`; biases, norms and sinks stay parameters. If memory runs out, nothing
  /// has changed.
  void set_storage(Storage storage) {
    kernels::set_storage(std::array{&query_, &key_, &value_, &output_}, storage);
  }
  Storage storage() const { return output_.storage(); }

  /// \param x     [tokens, d_model], the sequences of `pass` one after the other.
  /// \param pass  Its sequences and its padding mask are used.
  /// \return      [tokens, d_model].
  /// \throws ShapeError   if x does not have d_model columns, or pass does not fit it.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// Adds to the gradients of the parameters.
  /// \param dy  [tokens, d_model], the gradient of what `forward` returned last.
  /// \return    The gradient of its x.
  /// \throws StateError   if the cache does not fit, see CacheState, or if the weights are stored
  ///                      for inference, see Pass::through_stored.
  /// \throws ShapeError   if dy is not shaped like the output.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache);

  /// Continues several sequences at once: token by token, in chunks, or with whole prompts.
  /// \param x       [new tokens, d_model], those of all sequences one after the other.
  /// \param pass    Its sequences say how the rows of x divide; without, there is one.
  /// \param states  The keys and values of each sequence so far; those of x are added.
  /// \param cache   Workspace. It cannot be followed by `backward`.
  /// \return        [new tokens, d_model], to the bit what `forward` of each whole sequence gives,
  ///                unless a state rounds what it holds, see CacheStorage.
  /// \throws ShapeError   if x does not have d_model columns, pass does not fit it, or a state is
  ///                      of another layer.
  /// \throws StateError   unless there is one state for each sequence, all different.
  /// \throws ConfigError  if a token is padding: a state has no place for it.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const;

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("query", self.query());
    visit("key", self.key());
    visit("value", self.value());
    visit("output", self.output());
    if (self.config_.qkv_bias) {
      visit("query_bias", self.query_bias_);
      visit("key_bias", self.key_bias_);
      visit("value_bias", self.value_bias_);
    }
    if (self.config_.output_bias) visit("output_bias", self.output_bias_);
    visit("", self.stages_);
    if (self.config_.sinks) visit("sinks", self.sinks_);
  }

 private:
  Matrix<T> initial(Index rows, Index cols, Rng& rng) const {
    return switch_init<T>(rows, cols, rng, config_.init_scale);
  }

  Index query_width() const { return config_.query_width(); }
  Index kv_width() const { return config_.kv_width(); }

  std::span<const T> sinks() const { return span_of(sinks_.value.data(), sinks_.value.size()); }
  std::span<T> d_sinks() {
    if (!config_.sinks) return {};
    return span_of(sinks_.gradient().data(), config_.heads);
  }

  void check_decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states) const;

  /// Lets a state forget what its next tokens do not see, and gives the remaining keys to the span.
  void make_sight(State& kv, AttentionSpan& span) const;

  /// Projects x to cache.q, k and v, at the positions that the spans give.
  void project(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  CausalAttention<T> core(const Cache& cache) const {
    return {config_.shape(), cache.spans, cache.rows.mask(), cache.q, cache.k, cache.v, sinks()};
  }

  /// Projects cache.context to cache.y.
  void project_out(const Pass& pass, Cache& cache) const {
    pass.show<T>(output(), cache.context);
    set_shape(cache.y, cache.context.rows(), config_.d_model);
    kernels::multiply_weights<T, 1>(cache.context, {{{output_, cache.y}}});
    adapt<T>(output(), cache.context, pass, cache.y, cache.adapted_output);
    if (config_.output_bias) add_to_each_row<T>(output_bias_.value.data(), cache.y);
  }

  Config config_;
  kernels::Weight<T> query_, key_, value_, output_;
  Parameter<T> query_bias_ = {}, key_bias_ = {}, value_bias_ = {}, output_bias_ = {};
  Parameter<T> sinks_ = {};  // [1, heads]
  QkvStages<T> stages_;
};

template <std::floating_point T>
GroupedQueryAttention<T>::GroupedQueryAttention(Rng& rng, const Config& config)
    : config_(config.checked()),
      query_(initial(query_width(), config_.d_model, rng)),
      key_(initial(kv_width(), config_.d_model, rng)),
      value_(initial(kv_width(), config_.d_model, rng)),
      output_(initial(config_.d_model, query_width(), rng)),
      stages_(config_) {
  if (config_.fold_scale) query().value *= static_cast<T>(config_.query_init_factor());
  if (config_.qkv_bias) {
    query_bias_.value.setZero(1, query_width());
    key_bias_.value.setZero(1, kv_width());
    value_bias_.value.setZero(1, kv_width());
  }
  if (config_.output_bias) set_zero(output_bias_.value, 1, config_.d_model);
  if (config_.sinks) set_zero(sinks_.value, 1, config_.heads);
}

template <std::floating_point T>
const Matrix<T>& GroupedQueryAttention<T>::forward(MatrixIn<T> x, const Pass& pass,
                                                   Cache& cache) const {
  cache.state.begin();
  expect_columns("GroupedQueryAttention::forward", "x", x, config_.d_model);
  cache.rows.set("GroupedQueryAttention::forward", pass, x.rows());
  fill_spans(cache.rows, cache.spans);
  const auto mask = cache.rows.mask();
  const bool rounds = query().precision() == Precision::kFp8;
  if (pass.training && mask.empty() && !rounds) copy_rows<T>(x, cache.x);
  Matrix<T>& copy = rounds ? cache.dx : cache.x;  // Rounded, x is not kept a second time.
  const Eigen::Ref<const Matrix<T>> clean = without_padding<T>(x, mask, copy);
  cache.rounded_x.set(clean, pass.training && rounds);
  project(clean, pass, cache);
  set_shape(cache.context, x.rows(), query_width());
  core(cache).forward(cache.context, cache.attention);
  clear_padding<T>(mask, cache.context);
  project_out(pass, cache);
  clear_padding<T>(mask, cache.y);
  return cache.state.finish(*this, pass, cache.y);
}

template <std::floating_point T>
const Matrix<T>& GroupedQueryAttention<T>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.adapted_query.expect_differentiable("GroupedQueryAttention::backward", query_.storage());
  cache.state.begin_backward("GroupedQueryAttention::backward", *this, dy);
  const Index tokens = dy.rows();
  Workspace::Frame frame(cache.workspace);
  auto d_context = frame.matrix<T>(tokens, query_width());
  auto dq = frame.matrix<T>(tokens, query_width());
  auto dk = frame.matrix<T>(tokens, kv_width());
  auto dv = frame.matrix<T>(tokens, kv_width());
  set_shape(cache.dx, tokens, config_.d_model);

  const auto mask = cache.rows.mask();
  const Eigen::Ref<const Matrix<T>> d = without_padding<T>(dy, mask, cache.dy);
  linear_backward<T>(d, cache.context, output_, output_bias_, d_context, cache.adapted_output);
  core(cache).backward(cache.context, d_context, dq, dk, dv, cache.attention, d_sinks());
  for (auto* gradient : {&dq, &dk, &dv}) clear_padding<T>(mask, *gradient);
  stages_.backward(cache.positions, cache.q, cache.k, dq, dk, dv, cache.stages);

  const Eigen::Ref<const Matrix<T>> x = cache.rounded_x.or_else(cache.x, frame);
  linear_backward<T>(dq, x, query_, query_bias_, cache.dx, cache.adapted_query);
  linear_backward<T>(dk, x, key_, key_bias_, cache.dx, cache.adapted_key, true);
  linear_backward<T>(dv, x, value_, value_bias_, cache.dx, cache.adapted_value, true);
  return cache.dx;
}

template <std::floating_point T>
const Matrix<T>& GroupedQueryAttention<T>::decode(MatrixIn<T> x, const Pass& pass,
                                                  std::span<State* const> states,
                                                  Cache& cache) const {
  check_decode(x, pass, states);
  cache.state.begin();
  cache.rows.set("GroupedQueryAttention::decode", pass, x.rows());
  fill_spans(cache.rows, cache.spans);
  for (std::size_t s = 0; s < states.size(); ++s) make_sight(*states[s], cache.spans.at(s));
  project(x, Pass{.adapters = pass.adapters}, cache);
  cache.kept.clear();
  for (std::size_t s = 0; s < states.size(); ++s) {
    const AttentionSpan& span = cache.spans.at(s);
    State& kv = *states[s];
    kv.append(cache.k.middleRows(span.query_begin, span.queries),
              cache.v.middleRows(span.query_begin, span.queries), config_.kv_heads);
    cache.kept.push_back(KeyValueRows<T>::of(kv));
  }
  set_shape(cache.context, x.rows(), query_width());
  CausalAttention<T>(config_.shape(), cache.spans, cache.q, cache.kept, sinks())
      .forward(cache.context, cache.attention);
  project_out(pass, cache);
  return cache.y;
}

template <std::floating_point T>
void GroupedQueryAttention<T>::check_decode(MatrixIn<T> x, const Pass& pass,
                                            std::span<State* const> states) const {
  constexpr auto kWhere = "GroupedQueryAttention::decode";
  expect_columns(kWhere, "x", x, config_.d_model);
  pass.check(kWhere, x.rows());
  expect_states<State>(kWhere, pass, states);
  for (const State* kv : states) {
    if (kv->empty()) continue;
    const auto expect_width = [&](std::string_view name, Index width) {
      if (width == kv_width()) return;
      detail::fail_shape(kWhere, name, kv->held(), width,
                         detail::shape_text(kv->held(), kv_width()));
    };
    expect_width("kv.keys", kv->key_width());
    expect_width("kv.values", kv->value_width());
    if (kv->heads() != config_.kv_heads) {
      throw_error<ShapeError>(kWhere, ": kv has ", kv->heads(), " heads, expected ",
                              config_.kv_heads);
    }
    const Index needed = config_.shape().first_visible(kv->length());
    if (kv->first() > needed) {
      throw_error<StateError>(kWhere, ": kv begins at position ", kv->first(), ", expected ",
                              needed, " or before: it is of a layer with a smaller window");
    }
  }
}

template <std::floating_point T>
void GroupedQueryAttention<T>::make_sight(State& kv, AttentionSpan& span) const {
  if (config_.window > 0 || config_.chunk > 0) {
    const Index from = std::max<Index>(0, kv.length() - State::kSlack);
    kv.forget(config_.shape().first_visible(from), from);
  }
  span.first_key = kv.first();
  span.keys += kv.held();
}

template <std::floating_point T>
void GroupedQueryAttention<T>::project(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  set_shape(cache.q, x.rows(), query_width());
  set_shape(cache.k, x.rows(), kv_width());
  set_shape(cache.v, x.rows(), kv_width());
  for (const Parameter<T>* weight : {&query(), &key(), &value()}) pass.show<T>(*weight, x);
  kernels::multiply_weights<T, 3>(x, {{{query_, cache.q}, {key_, cache.k}, {value_, cache.v}}});
  adapt<T>(query(), x, pass, cache.q, cache.adapted_query);
  adapt<T>(key(), x, pass, cache.k, cache.adapted_key);
  adapt<T>(value(), x, pass, cache.v, cache.adapted_value);
  if (config_.qkv_bias) {
    add_to_each_row<T>(query_bias_.value.data(), cache.q);
    add_to_each_row<T>(key_bias_.value.data(), cache.k);
    add_to_each_row<T>(value_bias_.value.data(), cache.v);
  }
  fill_positions(cache.spans, x.rows(), cache.positions);
  stages_.forward(cache.positions, pass, cache.q, cache.k, cache.v, cache.stages);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::GroupedQueryAttention<float>;
extern template class weir::GroupedQueryAttention<double>;
#endif
