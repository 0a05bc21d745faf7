// SPDX-License-Identifier: MIT
/// \file
/// Multi-head latent attention (DeepSeek-AI 2024, arXiv:2405.04434, section 2.1).
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <optional>
#include <span>

#include <weir/attention/latent_absorbed.hpp>
#include <weir/attention/latent_cache.hpp>
#include <weir/attention/latent_config.hpp>
#include <weir/attention/latent_expanded.hpp>
#include <weir/attention/spans.hpp>
#include <weir/core/decoding.hpp>
#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/precision.hpp>
#include <weir/core/random.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/token_rows.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/e4m3_rows.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/weight.hpp>
#include <weir/nn/adapted.hpp>
#include <weir/nn/linear.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/ops/padding.hpp>
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
/// Training takes the way of LatentExpanded, and so do prompts in decoding. Decoding may take
/// another way to the same result, see LatentDecoding and LatentAbsorbed. For inference, W_uk and
/// W_uv are stored twice, once for each way.
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
    CacheState state;
    Matrix<T> x;                     ///< The input; padding is zero.
    kernels::E4M3Rows<T> rounded_x;  ///< Instead of x, in training in FP8.
    Matrix<T> query_down;            ///< The latents of queries before their norm.
    Matrix<T> kv;                    ///< [latents before their norm | rotated keys of positions]
    typename RmsNorm<T>::Cache query_norm, kv_norm;
    Matrix<T> q;        ///< The queries, rotated.
    Matrix<T> context;  ///< The heads' outputs side by side, [tokens, heads * value_dim].
    Matrix<T> y;
    Matrix<T> dy, dx;
    Workspace workspace;  ///< For gradients between dy and dx.
    Scratch<T> angles;
    TokenRows rows;
    List<AttentionSpan> spans;
    List<Index> positions;
    typename LatentExpanded<T>::Cache expanded;
    typename LatentAbsorbed<T>::Cache absorbed;
    Adapted<T> adapted_query_down, adapted_query, adapted_kv_down, adapted_output;
  };

  /// Weights begin as `switch_init`, norms as one.
  /// \throws ConfigError  if the config is not sound, see `LatentConfig::check`.
  LatentAttention(Rng& rng, const Config& config);

  const Config& config() const { return config_; }

  /// See `weir::set_storage`; norms stay parameters. If memory runs out, nothing has changed.
  void set_storage(Storage storage);
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
  /// \param x       [new tokens, d_model], those of the sequences of `pass` one after the other.
  /// \param pass    Its sequences say how the rows of x divide; without, there is one.
  /// \param states  The tokens that each sequence has seen so far; the new ones are added.
  /// \param cache   Workspace. It cannot be followed by `backward`.
  /// \return        [new tokens, d_model], to rounding what `forward` of each whole sequence gives,
  ///                unless a state rounds what it holds, see CacheStorage.
  /// \throws ShapeError   if x does not have d_model columns, pass does not fit it, or a state is
  ///                      of another layer.
  /// \throws StateError   unless there is one state for each sequence, all different.
  /// \throws ConfigError  if a token is padding: a state has no place for it.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const;

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (self.query_norm_) {
      visit("query_down", self.query_down_.parameter());
      visit("query_norm", *self.query_norm_);
    }
    visit("query", self.query_.parameter());
    visit("kv_down", self.kv_down_.parameter());
    visit("kv_norm", self.kv_norm_);
    visit("", self.expanded_);
    visit("output", self.output_.parameter());
  }

 private:
  static const Config& checked(const Config& config) {
    config.check("LatentAttention");
    return config;
  }

  Matrix<T> initial(Index rows, Index cols, Rng& rng) const {
    return switch_init<T>(rows, cols, rng, config_.init_scale);
  }

  /// dx = dy W, or is increased by it; adds to the gradients of W and its adapters.
  static void multiply_back(MatrixIn<T> dy, MatrixIn<T> x, kernels::Weight<T>& weight,
                            MatrixOut<T> dx, Adapted<T>& adapted, bool accumulate = false) {
    Parameter<T> none;  // There are no biases.
    linear_backward<T>(dy, x, weight, none, dx, adapted, accumulate);
  }

  bool is_low_rank() const { return config_.q_rank > 0; }
  Rope::Part rotated_part() const { return {config_.query_dim(), config_.nope_dim}; }

  void check_decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states) const;

  /// Projects x to queries, latents and keys of positions, rotated to the positions of the spans.
  void project(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// Projects cache.context to cache.y.
  void project_out(const Pass& pass, Cache& cache) const {
    pass.show<T>(output_.parameter(), cache.context);
    set_shape(cache.y, cache.context.rows(), config_.d_model);
    kernels::multiply_weights<T, 1>(cache.context, {{{output_, cache.y}}});
    adapt<T>(output_.parameter(), cache.context, pass, cache.y, cache.adapted_output);
  }

  Config config_;
  Rope rope_;
  std::optional<RmsNorm<T>> query_norm_;
  RmsNorm<T> kv_norm_;
  kernels::Weight<T> query_down_, query_, kv_down_;
  LatentExpanded<T> expanded_;
  kernels::Weight<T> output_;
  LatentAbsorbed<T> absorbed_;
};

template <std::floating_point T>
LatentAttention<T>::LatentAttention(Rng& rng, const Config& config)
    : config_(checked(config)),
      rope_(config_.rope_dim, RopeConfig{.theta = config_.rope_theta,
                                         .layout = RopeLayout::kInterleaved,
                                         .scaling = config_.rope_scaling}),
      kv_norm_(config_.kv_rank, {.epsilon = config_.norm_epsilon}),
      query_(initial(config_.heads * config_.query_dim(),
                     is_low_rank() ? config_.q_rank : config_.d_model, rng)),
      kv_down_(initial(config_.kv_rank + config_.rope_dim, config_.d_model, rng)),
      expanded_(rng, config_),
      output_(initial(config_.d_model, config_.heads * config_.value_dim, rng)),
      absorbed_(config_) {
  if (is_low_rank()) {
    query_down_ = kernels::Weight<T>(initial(config_.q_rank, config_.d_model, rng));
    query_norm_.emplace(config_.q_rank, RmsNormConfig{.epsilon = config_.norm_epsilon});
  }
}

template <std::floating_point T>
void LatentAttention<T>::set_storage(Storage storage) {
  if (storage == output_.storage()) return;
  LatentAttention to = *this;
  if (config_.decoding != LatentDecoding::kExpanded) {
    to.expanded_.set_storage(Storage::kTrainable);
    to.absorbed_.set_storage(to.expanded_.key_up(), to.expanded_.value_up(), storage);
  }
  to.expanded_.set_storage(storage);
  kernels::set_storage(std::array{&to.query_down_, &to.query_, &to.kv_down_, &to.output_}, storage);
  *this = std::move(to);
}

template <std::floating_point T>
const Matrix<T>& LatentAttention<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  expect_columns("LatentAttention::forward", "x", x, config_.d_model);
  cache.rows.set("LatentAttention::forward", pass, x.rows());
  fill_spans(cache.rows, cache.spans);
  const auto mask = cache.rows.mask();
  const bool rounds = output_.parameter().precision() == Precision::kFp8;
  if (pass.training && mask.empty() && !rounds) copy_rows<T>(x, cache.x);
  Matrix<T>& copy = rounds ? cache.dx : cache.x;  // Rounded, x is not kept a second time.
  const Eigen::Ref<const Matrix<T>> clean = without_padding<T>(x, mask, copy);
  cache.rounded_x.set(clean, pass.training && rounds);
  project(clean, pass, cache);
  set_shape(cache.context, x.rows(), config_.heads * config_.value_dim);
  expanded_.forward(cache.q, cache.kv_norm.y, cache.kv.rightCols(config_.rope_dim), cache.spans,
                    mask, cache.context, cache.expanded);
  clear_padding<T>(mask, cache.context);
  project_out(pass, cache);
  return cache.state.finish(*this, pass, cache.y);
}

template <std::floating_point T>
const Matrix<T>& LatentAttention<T>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.adapted_output.expect_differentiable("LatentAttention::backward", output_.storage());
  cache.state.begin_backward("LatentAttention::backward", *this, dy);
  const Index tokens = dy.rows();
  Workspace::Frame frame(cache.workspace);
  auto d_context = frame.matrix<T>(tokens, cache.context.cols());
  auto dq = frame.matrix<T>(tokens, cache.q.cols());
  auto d_latent = frame.matrix<T>(tokens, config_.kv_rank);
  auto d_kv = frame.matrix<T>(tokens, cache.kv.cols());
  set_shape(cache.dx, tokens, config_.d_model);
  auto d_rope_keys = d_kv.rightCols(config_.rope_dim);

  const auto mask = cache.rows.mask();
  const Eigen::Ref<const Matrix<T>> d = without_padding<T>(dy, mask, cache.dy);
  multiply_back(d, cache.context, output_, d_context, cache.adapted_output);
  expanded_.backward(cache.q, cache.kv_norm.y, cache.spans, mask, cache.context, d_context, dq,
                     d_latent, d_rope_keys, cache.expanded);
  clear_padding<T>(mask, dq);
  rope_.template rotate_back<T>(dq, cache.angles, rotated_part());
  rope_.template rotate_back<T>(d_rope_keys, cache.angles);

  d_kv.leftCols(config_.kv_rank) = kv_norm_.backward(d_latent, cache.kv_norm);
  const Eigen::Ref<const Matrix<T>> x = cache.rounded_x.or_else(cache.x, frame);
  multiply_back(d_kv, x, kv_down_, cache.dx, cache.adapted_kv_down);

  if (is_low_rank()) {
    auto d_query_latent = frame.matrix<T>(tokens, config_.q_rank);
    multiply_back(dq, cache.query_norm.y, query_, d_query_latent, cache.adapted_query);
    const Matrix<T>& d_down = query_norm_->backward(d_query_latent, cache.query_norm);
    multiply_back(d_down, x, query_down_, cache.dx, cache.adapted_query_down, true);
  } else {
    multiply_back(dq, x, query_, cache.dx, cache.adapted_query, true);
  }
  return cache.dx;
}

template <std::floating_point T>
const Matrix<T>& LatentAttention<T>::decode(MatrixIn<T> x, const Pass& pass,
                                            std::span<State* const> states, Cache& cache) const {
  check_decode(x, pass, states);
  cache.state.begin();
  cache.rows.set("LatentAttention::decode", pass, x.rows());
  fill_spans(cache.rows, cache.spans);
  for (std::size_t s = 0; s < states.size(); ++s) {
    cache.spans.at(s).key_begin = 0;
    cache.spans.at(s).keys += states[s]->length();
  }
  project(x, Pass{.adapters = pass.adapters}, cache);
  const auto rope_keys = cache.kv.rightCols(config_.rope_dim);
  set_shape(cache.context, x.rows(), config_.heads * config_.value_dim);
  cache.absorbed.clear();
  for (std::size_t s = 0; s < states.size(); ++s) {
    const AttentionSpan& span = cache.spans.at(s);
    State& state = *states[s];
    state.append(cache.kv_norm.y.middleRows(span.query_begin, span.queries),
                 rope_keys.middleRows(span.query_begin, span.queries));
    if (config_.is_absorbed(span.queries, span.keys)) {
      cache.absorbed.add(span, state);
    } else {
      expanded_.forward(cache.q, state, span, cache.context, cache.expanded);
    }
  }
  absorbed_.attend(cache.q, expanded_.key_up(), expanded_.value_up(), cache.context,
                   cache.absorbed);
  project_out(pass, cache);
  return cache.y;
}

template <std::floating_point T>
void LatentAttention<T>::check_decode(MatrixIn<T> x, const Pass& pass,
                                      std::span<State* const> states) const {
  constexpr auto kWhere = "LatentAttention::decode";
  expect_columns(kWhere, "x", x, config_.d_model);
  pass.check(kWhere, x.rows());
  expect_states(kWhere, pass, states);
  for (const State* held : states) {
    held->expect_widths(kWhere, config_.kv_rank, config_.rope_dim);
  }
}

template <std::floating_point T>
void LatentAttention<T>::project(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  const Index tokens = x.rows();
  set_shape(cache.q, tokens, config_.heads * config_.query_dim());
  set_shape(cache.kv, tokens, config_.kv_rank + config_.rope_dim);
  pass.show<T>(kv_down_.parameter(), x);
  if (is_low_rank()) {
    pass.show<T>(query_down_.parameter(), x);
    set_shape(cache.query_down, tokens, config_.q_rank);
    kernels::multiply_weights<T, 2>(x, {{{query_down_, cache.query_down}, {kv_down_, cache.kv}}});
    adapt<T>(query_down_.parameter(), x, pass, cache.query_down, cache.adapted_query_down);
    query_norm_->forward(cache.query_down, pass, cache.query_norm);
    pass.show<T>(query_.parameter(), cache.query_norm.y);
    kernels::multiply_weights<T, 1>(cache.query_norm.y, {{{query_, cache.q}}});
    adapt<T>(query_.parameter(), cache.query_norm.y, pass, cache.q, cache.adapted_query);
  } else {
    pass.show<T>(query_.parameter(), x);
    kernels::multiply_weights<T, 2>(x, {{{query_, cache.q}, {kv_down_, cache.kv}}});
    adapt<T>(query_.parameter(), x, pass, cache.q, cache.adapted_query);
  }
  adapt<T>(kv_down_.parameter(), x, pass, cache.kv, cache.adapted_kv_down);
  kv_norm_.forward(cache.kv.leftCols(config_.kv_rank), pass, cache.kv_norm);
  expanded_.show(pass, cache.kv_norm.y);
  fill_positions(cache.spans, tokens, cache.positions);
  rope_.tabulate(std::span<const Index>(cache.positions), cache.angles);
  rope_.template rotate<T>(cache.q, cache.angles, rotated_part());
  rope_.template rotate<T>(cache.kv.rightCols(config_.rope_dim), cache.angles);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::LatentAttention<float>;
extern template class weir::LatentAttention<double>;
#endif
