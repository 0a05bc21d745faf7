// SPDX-License-Identifier: MIT
/// \file
/// Experts that are gated networks with clamped pre-activations and biases: gpt-oss.
#pragma once

#include <concepts>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/init.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/workspace.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/expert_linear.hpp>
#include <weir/ops/exp.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of ClampedGluBank.
struct ClampedGluBankConfig {
  double alpha = 1.702;     ///< Slope of the sigmoid: x sigmoid(1.702 x) is close to GELU.
  double limit = 7.0;       ///< Where pre-activations are cut.
  double init_scale = 1.0;  ///< `scale` of `switch_init`.
};

/// The weights of a ClampedGluBank, one of each per expert.
template <class T>
struct ClampedGluWeights {
  std::vector<Matrix<T>> gate, up;            ///< [d_hidden, d_model]
  std::vector<Matrix<T>> gate_bias, up_bias;  ///< [1, d_hidden]
  std::vector<Matrix<T>> down;                ///< [d_out, d_hidden]
  std::vector<Matrix<T>> down_bias;           ///< [1, d_out]
};

/// `experts` networks
///
///     g = min(x Wg_e^T + bg_e, limit)
///     u = max(-limit, min(x Wu_e^T + bu_e, limit))
///     E_e(x) = (g sigmoid(alpha g) (u + 1)) Wd_e^T + bd_e
///
/// with Wg_e, Wu_e [d_hidden, d_model] and Wd_e [d_model, d_hidden], computed for all experts at
/// once on the packed slots. Where a pre-activation is cut, its derivative is zero; at the limit
/// itself it is one. The bias bd_e is multiplied by the token's weight like the rest of E_e.
/// (OpenAI 2025, arXiv:2508.10925; GptOssExperts of Hugging Face's transformers, which keeps gate
/// and up as the even and odd columns of one matrix.)
template <std::floating_point T>
class ClampedGluBank {
 public:
  using Scalar = T;

  struct Cache {
    Scratch<T> x, gate, up, hidden, out;  ///< [slots, .], from forward
    Matrix<T> y, dx;                      ///< [tokens, .]
    Workspace workspace;                  ///< For gradients of slots.
    typename ExpertLinear<T>::Products products;
    Adapted<T> adapted_gate, adapted_up, adapted_down;
  };

  /// Weights from `switch_init`, with the fan-in of one expert; biases start at zero.
  /// \throws ConfigError  if a size is below 1, or if a setting is out of range.
  ClampedGluBank(Index d_model, Index experts, Index d_hidden, Rng& rng,
                 ClampedGluBankConfig config = {});

  /// From existing weights.
  /// \throws ConfigError  without experts, with different numbers of weights, or if a setting is
  ///                      out of range.
  /// \throws ShapeError   if a weight's shape does not fit the others.
  explicit ClampedGluBank(ClampedGluWeights<T> weights, ClampedGluBankConfig config = {});

  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const;

  /// The gradients of experts without tokens are left alone.
  /// \throws StateError   if the weights are stored for inference, see Pass::through_stored.
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache);

  /// See `weir::set_storage`; biases stay parameters. If memory runs out, nothing has changed.
  void set_storage(Storage storage) {
    ExpertLinear<T>::set_storage({&gate_, &up_, &down_}, storage);
  }

  Storage storage() const { return gate_.storage(); }

  /// Changes the experts; those that are stored for inference share memory with their clones.
  /// \throws ConfigError  if the map does not fit.
  /// \throws StateError   if weights are stored for inference and there is a cold expert.
  void remap_experts(const ExpertMap& map);

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (std::size_t e = 0; e < static_cast<std::size_t>(self.experts()); ++e) {
      ExpertLinear<T>::visit(self.gate_, e, "gate", visit);
      ExpertLinear<T>::visit(self.up_, e, "up", visit);
      ExpertLinear<T>::visit(self.down_, e, "down", visit);
    }
  }

  Index experts() const { return gate_.experts(); }
  Index d_in() const { return gate_.d_in(); }
  Index d_hidden() const { return gate_.d_out(); }
  Index d_out() const { return down_.d_out(); }
  const ClampedGluBankConfig& config() const { return config_; }

 private:
  void check() const {
    expect_positive("ClampedGluBank", "alpha", config_.alpha);
    expect_positive("ClampedGluBank", "limit", config_.limit);
  }

  static constexpr Index kCost = 16;

  void activate(MatrixIn<T> gate, MatrixIn<T> up, MatrixOut<T> hidden) const;

  /// With q = sigmoid(alpha g): d_gate = dh (u + 1) q (1 + alpha g (1 - q)), d_up = dh g q.
  void activate_backward(MatrixIn<T> gate, MatrixIn<T> up, MatrixIn<T> dh, MatrixOut<T> d_gate,
                         MatrixOut<T> d_up) const;

  /// min(x, limit) and max(x, limit); a NaN stays a NaN.
  static Lanes<T> below(const Lanes<T>& x, T limit) { return x > limit ? Lanes<T>{} + limit : x; }
  static Lanes<T> above(const Lanes<T>& x, T limit) { return x < limit ? Lanes<T>{} + limit : x; }

  ClampedGluBankConfig config_;
  ExpertLinear<T> gate_, up_, down_;
};

template <std::floating_point T>
ClampedGluBank<T>::ClampedGluBank(Index d_model, Index experts, Index d_hidden, Rng& rng,
                                  ClampedGluBankConfig config)
    : config_(config) {
  check();
  expect_at_least<Index>("ClampedGluBank", "d_model", d_model, 1);
  expect_at_least<Index>("ClampedGluBank", "experts", experts, 1);
  expect_at_least<Index>("ClampedGluBank", "d_hidden", d_hidden, 1);
  const auto initial = [&](Index rows, Index cols) {
    return switch_init<T>(rows, cols, rng, config.init_scale);
  };
  for (Index e = 0; e < experts; ++e) {
    gate_.add(initial(d_hidden, d_model), Matrix<T>::Zero(1, d_hidden));
    up_.add(initial(d_hidden, d_model), Matrix<T>::Zero(1, d_hidden));
    down_.add(initial(d_model, d_hidden), Matrix<T>::Zero(1, d_model));
  }
}

template <std::floating_point T>
ClampedGluBank<T>::ClampedGluBank(ClampedGluWeights<T> weights, ClampedGluBankConfig config)
    : config_(config) {
  check();
  auto& [gate, up, gate_bias, up_bias, down, down_bias] = weights;
  const std::size_t experts = gate.size();
  if (experts == 0 || up.size() != experts || gate_bias.size() != experts ||
      up_bias.size() != experts || down.size() != experts || down_bias.size() != experts) {
    throw_error<ConfigError>("ClampedGluBank: ", experts, " gate, ", up.size(), " up, ",
                             gate_bias.size(), " gate_bias, ", up_bias.size(), " up_bias, ",
                             down.size(), " down and ", down_bias.size(),
                             " down_bias weights, expected one of each per expert");
  }
  const Index d_hidden = gate[0].rows();
  const Index d_out = down[0].rows();
  for (std::size_t e = 0; e < experts; ++e) {
    const std::string which = "[" + std::to_string(e) + "]";
    expect_shape("ClampedGluBank", "gate" + which, gate[e], d_hidden, gate[0].cols());
    expect_shape("ClampedGluBank", "up" + which, up[e], d_hidden, gate[0].cols());
    expect_shape("ClampedGluBank", "gate_bias" + which, gate_bias[e], 1, d_hidden);
    expect_shape("ClampedGluBank", "up_bias" + which, up_bias[e], 1, d_hidden);
    expect_shape("ClampedGluBank", "down" + which, down[e], d_out, d_hidden);
    expect_shape("ClampedGluBank", "down_bias" + which, down_bias[e], 1, d_out);
  }
  for (std::size_t e = 0; e < experts; ++e) {
    gate_.add(std::move(gate[e]), std::move(gate_bias[e]));
    up_.add(std::move(up[e]), std::move(up_bias[e]));
    down_.add(std::move(down[e]), std::move(down_bias[e]));
  }
}

template <std::floating_point T>
const Matrix<T>& ClampedGluBank<T>::forward(MatrixIn<T> x, const Dispatch<T>& dispatch,
                                            const Pass& pass, Cache& cache) const {
  const Index slots = dispatch.slots();
  auto packed = cache.x.reshape(slots, d_in());
  auto gate = cache.gate.reshape(slots, d_hidden());
  auto up = cache.up.reshape(slots, d_hidden());
  auto hidden = cache.hidden.reshape(slots, d_hidden());
  auto out = cache.out.reshape(slots, d_out());
  gather<T>(x, dispatch, packed);
  for (const ExpertLinear<T>* linear : {&gate_, &up_}) linear->show(pass, packed, dispatch);
  gate_.forward(packed, dispatch, pass, gate, cache.products, cache.adapted_gate);
  up_.forward(packed, dispatch, pass, up, cache.products, cache.adapted_up);
  activate(gate, up, hidden);
  down_.show(pass, hidden, dispatch);
  down_.forward(hidden, dispatch, pass, out, cache.products, cache.adapted_down);
  set_shape(cache.y, x.rows(), d_out());
  combine<T>(out, dispatch, cache.y);
  return cache.y;
}

template <std::floating_point T>
const Matrix<T>& ClampedGluBank<T>::backward(MatrixIn<T> dy, const Dispatch<T>& dispatch,
                                             std::span<T> d_weight, Cache& cache) {
  cache.adapted_gate.expect_differentiable("ClampedGluBank::backward", storage());
  const Index slots = dispatch.slots();
  Workspace::Frame frame(cache.workspace);
  auto d_out_packed = frame.matrix<T>(slots, d_out());
  auto d_hidden_packed = frame.matrix<T>(slots, d_hidden());
  auto d_gate = frame.matrix<T>(slots, d_hidden());
  auto d_up = frame.matrix<T>(slots, d_hidden());
  auto d_packed = frame.matrix<T>(slots, d_in());
  combine_backward<T>(dy, cache.out.view(), dispatch, d_out_packed, d_weight);
  down_.backward(d_out_packed, cache.hidden.view(), dispatch, d_hidden_packed, false,
                 cache.products, cache.adapted_down);
  activate_backward(cache.gate.view(), cache.up.view(), d_hidden_packed, d_gate, d_up);
  gate_.backward(d_gate, cache.x.view(), dispatch, d_packed, false, cache.products,
                 cache.adapted_gate);
  up_.backward(d_up, cache.x.view(), dispatch, d_packed, true, cache.products, cache.adapted_up);
  set_shape(cache.dx, dy.rows(), d_in());
  gather_backward<T>(d_packed, dispatch, cache.dx);
  return cache.dx;
}

template <std::floating_point T>
void ClampedGluBank<T>::activate(MatrixIn<T> gate, MatrixIn<T> up, MatrixOut<T> hidden) const {
  const T alpha = static_cast<T>(config_.alpha);
  const T limit = static_cast<T>(config_.limit);
  parallel_pieces(gate.rows(), gate.cols(), kCost, [&](Index s, Index col, Index count) {
    const auto f = [=](const Lanes<T>& z, const Lanes<T>& v) -> Lanes<T> {
      const Lanes<T> g = below(z, limit);
      return g * sigmoid_lanes<T>(alpha * g) * (above(below(v, limit), -limit) + T(1));
    };
    map_lanes<T>(count, f, &hidden(s, col), &gate.coeffRef(s, col), &up.coeffRef(s, col));
  });
}

template <std::floating_point T>
void ClampedGluBank<T>::activate_backward(MatrixIn<T> gate, MatrixIn<T> up, MatrixIn<T> dh,
                                          MatrixOut<T> d_gate, MatrixOut<T> d_up) const {
  const T alpha = static_cast<T>(config_.alpha);
  const T limit = static_cast<T>(config_.limit);
  parallel_pieces(gate.rows(), gate.cols(), kCost, [&](Index s, Index col, Index count) {
    const auto of_gate = [=](const Lanes<T>& z, const Lanes<T>& v, const Lanes<T>& d) -> Lanes<T> {
      const Lanes<T> q = sigmoid_lanes<T>(alpha * z);
      const Lanes<T> u = above(below(v, limit), -limit);
      const Lanes<T> inside = d * (u + T(1)) * q * (T(1) + alpha * z * (T(1) - q));
      return z > limit ? Lanes<T>{} : inside;
    };
    const auto of_up = [=](const Lanes<T>& z, const Lanes<T>& v, const Lanes<T>& d) -> Lanes<T> {
      const Lanes<T> g = below(z, limit);
      const Lanes<T> inside = d * g * sigmoid_lanes<T>(alpha * g);
      const Lanes<T> not_above = v > limit ? Lanes<T>{} : inside;
      return v < -limit ? Lanes<T>{} : not_above;
    };
    const T* const z = &gate.coeffRef(s, col);
    const T* const v = &up.coeffRef(s, col);
    const T* const d = &dh.coeffRef(s, col);
    map_lanes<T>(count, of_gate, &d_gate(s, col), z, v, d);
    map_lanes<T>(count, of_up, &d_up(s, col), z, v, d);
  });
}

template <std::floating_point T>
void ClampedGluBank<T>::remap_experts(const ExpertMap& map) {
  map.check("ClampedGluBank::remap_experts", experts());
  if (map.has_cold()) expect_trainable("ClampedGluBank::remap_experts", storage());
  const auto drawn = [&](Index rows, Index cols) {
    return switch_init<T>(rows, cols, *map.rng, 1.0);
  };
  ClampedGluBank next = *this;
  next.gate_.remap_experts(map, drawn);
  next.up_.remap_experts(map, drawn);
  next.down_.remap_experts(
      map, [](Index rows, Index cols) -> Matrix<T> { return Matrix<T>::Zero(rows, cols); });
  *this = std::move(next);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::ClampedGluBank<float>;
extern template class weir::ClampedGluBank<double>;
#endif
