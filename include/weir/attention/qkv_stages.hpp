// SPDX-License-Identifier: MIT
/// \file
/// The changes to queries, keys and values before attention.
#pragma once

#include <concepts>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

#include <weir/attention/grouped_query_config.hpp>
#include <weir/attention/qk_norm.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/clamp.hpp>
#include <weir/ops/rope.hpp>

namespace weir {

/// The part of `GroupedQueryAttention` between its projections and attention itself, in place:
/// clamp, norms kFull and kPerHead, rotation, norm kL2, temperature, in this order and as far as
/// `GroupedQueryConfig` asks for them.
template <std::floating_point T>
class QkvStages {
 public:
  using Scalar = T;

  struct Cache {
    List<std::uint8_t> query_outside, key_outside, value_outside;  ///< See `clamp_forward`.
    typename HeadNorm<T>::Cache query_norm, key_norm;
    typename HeadL2Norm<T>::Cache query_l2, key_l2;
    Scratch<T> angles;
  };

  /// \param config  Has to be checked, with head_dim filled in.
  explicit QkvStages(GroupedQueryConfig config);

  /// \param positions  One per token.
  /// \param q          [tokens, heads * head_dim]
  /// \param k          [tokens, kv_heads * head_dim]
  /// \param v          [tokens, kv_heads * head_dim]
  void forward(std::span<const Index> positions, const Pass& pass, Matrix<T>& q, Matrix<T>& k,
               Matrix<T>& v, Cache& cache) const;

  /// Turns the gradients of the outputs of `forward` into those of its inputs.
  /// \param q  The queries that `forward` left.
  /// \param k  The keys that `forward` left.
  void backward(std::span<const Index> positions, const Matrix<T>& q, const Matrix<T>& k,
                MatrixOut<T> dq, MatrixOut<T> dk, MatrixOut<T> dv, Cache& cache);

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (self.query_norm_) {
      visit("query_norm", self.query_norm_->weight());
      visit("key_norm", self.key_norm_->weight());
    }
  }

 private:
  Rope::Part rotated_part() const { return {config_.head_dim, 0}; }

  /// Multiplies each row by the temperature of its position.
  void temper(std::span<const Index> positions, MatrixOut<T> rows) const {
    for (Index t = 0; t < rows.rows(); ++t) {
      rows.row(t) *= static_cast<T>(config_.temperature(element(positions, t)));
    }
  }

  GroupedQueryConfig config_;
  std::optional<HeadNorm<T>> query_norm_, key_norm_;
  std::optional<Rope> rope_;
  std::optional<HeadL2Norm<T>> l2_norm_;
};

template <std::floating_point T>
QkvStages<T>::QkvStages(GroupedQueryConfig config) : config_(std::move(config)) {
  const RmsNormConfig norm = {.epsilon = config_.qk_norm_epsilon};
  if (config_.rope) {
    rope_.emplace(config_.rotated(), RopeConfig{.theta = config_.rope_theta,
                                                .layout = config_.rope_layout,
                                                .scaling = config_.rope_scaling});
  }
  if (config_.qk_norm == QkNorm::kFull) {
    query_norm_.emplace(config_.query_width(), norm);
    key_norm_.emplace(config_.kv_width(), norm);
  } else if (config_.qk_norm == QkNorm::kPerHead) {
    query_norm_.emplace(config_.head_dim, norm);
    key_norm_.emplace(config_.head_dim, norm);
  } else if (config_.qk_norm == QkNorm::kL2) {
    l2_norm_.emplace(config_.head_dim, norm);
  }
}

template <std::floating_point T>
void QkvStages<T>::forward(std::span<const Index> positions, const Pass& pass, Matrix<T>& q,
                           Matrix<T>& k, Matrix<T>& v, Cache& cache) const {
  if (config_.clip_qkv > 0.0) {
    const auto clamp = [&](Matrix<T>& x, List<std::uint8_t>& outside) {
      clamp_forward(config_.clip_qkv, x, pass.training ? &outside : nullptr);
    };
    clamp(q, cache.query_outside);
    clamp(k, cache.key_outside);
    clamp(v, cache.value_outside);
  }
  if (query_norm_) {
    query_norm_->forward(q, pass, cache.query_norm);
    key_norm_->forward(k, pass, cache.key_norm);
  }
  if (rope_) {
    rope_->tabulate(positions, cache.angles);
    rope_->template rotate<T>(q, cache.angles, rotated_part());
    rope_->template rotate<T>(k, cache.angles, rotated_part());
  }
  if (l2_norm_) {
    l2_norm_->forward(q, pass, cache.query_l2);
    l2_norm_->forward(k, pass, cache.key_l2);
  }
  if (config_.temperature_scale > 0.0) temper(positions, q);
}

template <std::floating_point T>
void QkvStages<T>::backward(std::span<const Index> positions, const Matrix<T>& q,
                            const Matrix<T>& k, MatrixOut<T> dq, MatrixOut<T> dk, MatrixOut<T> dv,
                            Cache& cache) {
  if (config_.temperature_scale > 0.0) temper(positions, dq);
  if (l2_norm_) {
    l2_norm_->backward(q, dq, cache.query_l2);
    l2_norm_->backward(k, dk, cache.key_l2);
  }
  if (rope_) {
    rope_->template rotate_back<T>(dq, cache.angles, rotated_part());
    rope_->template rotate_back<T>(dk, cache.angles, rotated_part());
  }
  if (query_norm_) {
    query_norm_->backward(dq, cache.query_norm);
    key_norm_->backward(dk, cache.key_norm);
  }
  if (config_.clip_qkv > 0.0) {
    clamp_backward(cache.query_outside, dq);
    clamp_backward(cache.key_outside, dk);
    clamp_backward(cache.value_outside, dv);
  }
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::QkvStages<float>;
extern template class weir::QkvStages<double>;
#endif
