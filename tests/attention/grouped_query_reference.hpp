// SPDX-License-Identifier: MIT
/// \file
/// Grouped-query attention with all its options, slowly, by its definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <variant>

#include <weir/attention/grouped_query.hpp>
#include <weir/core/layer.hpp>

namespace weir::test {

/// A layer whose parameters are all random, also those that begin as zero or one.
template <class T = double>
GroupedQueryAttention<T> random_attention(const GroupedQueryConfig& config,
                                          std::uint64_t seed = 1) {
  Rng rng(seed);
  GroupedQueryAttention<T> layer(rng, config);
  for (auto& [name, parameter] : parameters(layer)) {
    const Index width = parameter->value.cols();
    if (name.ends_with("bias")) parameter->value = normal_init<T>(1, width, 0.5, rng);
    if (name == "sinks") parameter->value = normal_init<T>(1, width, 1.0, rng);
    if (name.ends_with("norm")) parameter->value += normal_init<T>(1, width, 0.3, rng);
  }
  return layer;
}

/// `name` as the layer shows it to optimizers and checkpoints.
template <class T>
const Matrix<T>& weight(GroupedQueryAttention<T>& layer, const std::string& name) {
  for (auto& [candidate, parameter] : parameters(layer)) {
    if (candidate == name) return parameter->value;
  }
  throw std::out_of_range(name);
}

namespace detail {

/// Every `dim` numbers of `row` over their root mean square.
inline void normalise(Eigen::Ref<Matrix<double>> row, Index dim, double epsilon) {
  for (Index head = 0; head < row.cols(); head += dim) {
    auto part = row.middleCols(head, dim);
    part /= std::sqrt(part.squaredNorm() / static_cast<double>(dim) + epsilon);
  }
}

inline void rotate(Eigen::Ref<Matrix<double>> row, const GroupedQueryConfig& c, double position) {
  const Index half = (c.rotary_dim == 0 ? c.head_dim : c.rotary_dim) / 2;
  const Rope stretched(2 * half,
                       {.theta = c.rope_theta, .layout = c.rope_layout, .scaling = c.rope_scaling});
  for (Index head = 0; head < row.cols(); head += c.head_dim) {
    for (Index i = 0; i < half; ++i) {
      const double frequency =
          std::holds_alternative<NoScaling>(c.rope_scaling)
              ? std::pow(c.rope_theta, -static_cast<double>(i) / static_cast<double>(half))
              : stretched.frequencies()[i];
      const double angle = position * frequency;
      const bool split = c.rope_layout == RopeLayout::kHalfSplit;
      double& first = row(0, head + (split ? i : 2 * i));
      double& second = row(0, head + (split ? i + half : 2 * i + 1));
      const double a = first;
      first = stretched.scale() * (a * std::cos(angle) - second * std::sin(angle));
      second = stretched.scale() * (second * std::cos(angle) + a * std::sin(angle));
    }
  }
}

/// What becomes of a row of queries or keys before attention.
inline void prepare(Eigen::Ref<Matrix<double>> row, const GroupedQueryConfig& c,
                    const Matrix<double>* norm, double position) {
  if (c.clip_qkv > 0) row = row.cwiseMax(-c.clip_qkv).cwiseMin(c.clip_qkv).eval();
  if (norm != nullptr) {
    normalise(row, norm->cols(), c.qk_norm_epsilon);
    for (Index i = 0; i < row.cols(); ++i) row(0, i) *= (*norm)(0, i % norm->cols());
  }
  if (c.rope) rotate(row, c, position);
  if (c.qk_norm == QkNorm::kL2) normalise(row, c.head_dim, c.qk_norm_epsilon);
}

}  // namespace detail

/// The definition, written out: for each query all its scores, then their softmax. Padding yields
/// zero, and positions begin behind padding.
inline Matrix<double> reference(GroupedQueryAttention<double>& layer, const Matrix<double>& x,
                                const Pass& pass = {}) {
  const GroupedQueryConfig& c = layer.config();
  const Index dim = c.head_dim;
  const Sequences all({x.rows()});
  const Sequences& sequences = pass.sequences != nullptr ? *pass.sequences : all;
  Matrix<double> q = x * weight(layer, "query").transpose();
  Matrix<double> k = x * weight(layer, "key").transpose();
  Matrix<double> v = x * weight(layer, "value").transpose();
  if (c.qkv_bias) {
    q.rowwise() += weight(layer, "query_bias").row(0);
    k.rowwise() += weight(layer, "key_bias").row(0);
    v.rowwise() += weight(layer, "value_bias").row(0);
  }
  if (c.clip_qkv > 0) v = v.cwiseMax(-c.clip_qkv).cwiseMin(c.clip_qkv).eval();
  const bool normed = c.qk_norm == QkNorm::kFull || c.qk_norm == QkNorm::kPerHead;
  const Matrix<double>* const query_norm = normed ? &weight(layer, "query_norm") : nullptr;
  const Matrix<double>* const key_norm = normed ? &weight(layer, "key_norm") : nullptr;
  double scale = c.scale;
  if (scale == 0.0) scale = score_scale(c.rope_scaling) / std::sqrt(dim);

  Matrix<double> context = Matrix<double>::Zero(x.rows(), q.cols());
  for (Index s = 0; s < sequences.count(); ++s) {
    Index begin = sequences.begin(s);  // Of positions.
    while (begin < sequences.end(s) && pass.is_padding(begin)) ++begin;
    for (Index t = begin; t < sequences.end(s); ++t) {
      const Index position = t - begin;
      detail::prepare(q.row(t), c, query_norm, static_cast<double>(position));
      detail::prepare(k.row(t), c, key_norm, static_cast<double>(position));
      const double steps =
          std::floor(static_cast<double>(position + 1) / static_cast<double>(c.temperature_floor));
      q.row(t) *= std::log(steps + 1.0) * c.temperature_scale + 1.0;
      for (Index head = 0; head < c.heads; ++head) {
        const Index shared = head / (c.heads / c.kv_heads);
        double total = c.sinks ? std::exp(weight(layer, "sinks")(0, head)) : 0.0;
        for (Index j = begin; j <= t; ++j) {
          if (pass.is_padding(j) || (c.window > 0 && t - j >= c.window)) continue;
          if (c.chunk > 0 && (j - begin) / c.chunk != position / c.chunk) continue;
          double score =
              scale * q.row(t).segment(head * dim, dim).dot(k.row(j).segment(shared * dim, dim));
          if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
          const double p = std::exp(score);
          total += p;
          context.row(t).segment(head * dim, dim) += p * v.row(j).segment(shared * dim, dim);
        }
        if (total > 0.0) context.row(t).segment(head * dim, dim) /= total;
      }
    }
  }
  Matrix<double> y = context * weight(layer, "output").transpose();
  if (c.output_bias) y.rowwise() += weight(layer, "output_bias").row(0);
  for (Index t = 0; t < y.rows(); ++t) {
    if (pass.is_padding(t)) y.row(t).setZero();
  }
  return y;
}

}  // namespace weir::test
