// SPDX-License-Identifier: MIT
/// \file
/// Experts that are two-matrix feed-forward networks: Switch, GShard, Shazeer 2017.
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
#include <weir/core/random.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/expert_linear.hpp>
#include <weir/nn/dropout.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/ops/activation.hpp>

namespace weir {

/// Settings of MlpBank.
struct MlpBankConfig {
  bool bias = false;
  double init_scale = 1.0;  ///< `scale` of `switch_init`. Switch trains its experts with 0.1.
  /// The probability with which a number between an expert's two maps becomes zero in training.
  /// Switch fine-tunes with 0.4 in its experts and 0.1 elsewhere.
  double dropout = 0.0;
};

/// `experts` networks
///
///     E_e(x) = act(x W1_e^T + b1_e) W2_e^T + b2_e
///
/// with W1_e [d_hidden, d_model] and W2_e [d_model, d_hidden], the biases optional, computed for
/// all experts at once on the packed slots. In training with dropout, act(.) is multiplied by 0
/// with that probability, else by 1 / (1 - dropout), one draw per element from `pass.rng`; nothing
/// is dropped where the weights are stored for inference. (Fedus et al. 2021, arXiv:2101.03961, act
/// = ReLU; dropout: section 2.4.)
template <std::floating_point T, Activation Act = Relu>
class MlpBank {
 public:
  using Scalar = T;

  struct Cache {
    Scratch<T> x, inner, hidden, out;  ///< [slots, .], from forward
    Scratch<T> factor;                 ///< [slots, d_hidden], of dropout, or empty
    Matrix<T> y, dx;                   ///< [tokens, .]
    Workspace workspace;               ///< For gradients of slots.
    typename ExpertLinear<T>::Products products;
    Adapted<T> adapted_in, adapted_out;
  };

  /// Weights from `switch_init`, with the fan-in of one expert; biases start at zero.
  /// \throws ConfigError  if a size is below 1, init_scale not positive, or unless 0 <= dropout
  /// < 1.
  MlpBank(Index d_model, Index experts, Index d_hidden, Rng& rng, MlpBankConfig config = {});

  /// From existing weights, one of each per expert; biases [1, .] one per expert, or none at all.
  /// \throws ConfigError  without experts or with different numbers of weights.
  /// \throws ShapeError   if a weight's shape does not fit the others.
  MlpBank(std::vector<Matrix<T>> in, std::vector<Matrix<T>> out,
          std::vector<Matrix<T>> in_bias = {}, std::vector<Matrix<T>> out_bias = {});

  /// \throws ConfigError  in training with dropout, without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const;

  /// The gradients of experts without tokens are left alone.
  /// \throws StateError   if the weights are stored for inference, see Pass::through_stored.
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache);

  /// See `weir::set_storage`; biases stay parameters. If memory runs out, nothing has changed.
  void set_storage(Storage storage) { ExpertLinear<T>::set_storage({&in_, &out_}, storage); }

  Storage storage() const { return in_.storage(); }

  /// Changes the experts; those that are stored for inference share memory with their clones.
  /// \throws ConfigError  if the map does not fit.
  /// \throws StateError   if weights are stored for inference and there is a cold expert.
  void remap_experts(const ExpertMap& map);

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (std::size_t e = 0; e < static_cast<std::size_t>(self.experts()); ++e) {
      ExpertLinear<T>::visit(self.in_, e, "in", visit);
      ExpertLinear<T>::visit(self.out_, e, "out", visit);
    }
  }

  Index experts() const { return in_.experts(); }
  Index d_in() const { return in_.d_in(); }
  Index d_hidden() const { return in_.d_out(); }
  Index d_out() const { return out_.d_out(); }

  double dropout() const { return dropout_; }

 private:
  ExpertLinear<T> in_, out_;
  double dropout_ = 0.0;
};

template <std::floating_point T, Activation Act>
MlpBank<T, Act>::MlpBank(Index d_model, Index experts, Index d_hidden, Rng& rng,
                         MlpBankConfig config)
    : dropout_(config.dropout) {
  expect_fraction("MlpBank", "dropout", config.dropout);
  expect_at_least<Index>("MlpBank", "d_model", d_model, 1);
  expect_at_least<Index>("MlpBank", "experts", experts, 1);
  expect_at_least<Index>("MlpBank", "d_hidden", d_hidden, 1);
  const auto add = [&](ExpertLinear<T>& linear, Index d_out, Index d_in) {
    linear.add(switch_init<T>(d_out, d_in, rng, config.init_scale),
               config.bias ? Matrix<T>::Zero(1, d_out) : Matrix<T>());
  };
  for (Index e = 0; e < experts; ++e) {
    add(in_, d_hidden, d_model);
    add(out_, d_model, d_hidden);
  }
}

template <std::floating_point T, Activation Act>
MlpBank<T, Act>::MlpBank(std::vector<Matrix<T>> in, std::vector<Matrix<T>> out,
                         std::vector<Matrix<T>> in_bias, std::vector<Matrix<T>> out_bias) {
  if (in.empty() || in.size() != out.size() || in_bias.size() != out_bias.size() ||
      (!in_bias.empty() && in_bias.size() != in.size())) {
    throw_error<ConfigError>("MlpBank: ", in.size(), " in, ", out.size(), " out, ", in_bias.size(),
                             " in_bias and ", out_bias.size(),
                             " out_bias weights, expected one of each per expert, or no biases");
  }
  for (std::size_t e = 0; e < in.size(); ++e) {
    const std::string which = "[" + std::to_string(e) + "]";
    expect_shape("MlpBank", "in" + which, in[e], in[0].rows(), in[0].cols());
    expect_shape("MlpBank", "out" + which, out[e], out[0].rows(), in[0].rows());
    if (!in_bias.empty()) {
      expect_shape("MlpBank", "in_bias" + which, in_bias[e], 1, in[0].rows());
      expect_shape("MlpBank", "out_bias" + which, out_bias[e], 1, out[0].rows());
    }
  }
  in_bias.resize(in.size());  // Empty ones for none.
  out_bias.resize(in.size());
  for (std::size_t e = 0; e < in.size(); ++e) {
    in_.add(std::move(in[e]), std::move(in_bias[e]));
    out_.add(std::move(out[e]), std::move(out_bias[e]));
  }
}

template <std::floating_point T, Activation Act>
const Matrix<T>& MlpBank<T, Act>::forward(MatrixIn<T> x, const Dispatch<T>& dispatch,
                                          const Pass& pass, Cache& cache) const {
  const Index slots = dispatch.slots();
  gather<T>(x, dispatch, cache.x.reshape(slots, d_in()));
  auto inner = cache.inner.reshape(slots, d_hidden());
  auto hidden = cache.hidden.reshape(slots, d_hidden());
  auto out = cache.out.reshape(slots, d_out());

  in_.show(pass, cache.x.view(), dispatch);
  in_.forward(cache.x.view(), dispatch, pass, inner, cache.products, cache.adapted_in);
  activation_forward<Act, T>(inner, hidden);
  const double rate = storage() == Storage::kTrainable ? dropout_ : 0.0;
  drop_hidden<T>("MlpBank::forward", rate, pass, hidden, cache.factor);
  out_.show(pass, hidden, dispatch);
  out_.forward(hidden, dispatch, pass, out, cache.products, cache.adapted_out);

  set_shape(cache.y, x.rows(), d_out());
  combine<T>(out, dispatch, cache.y);
  return cache.y;
}

template <std::floating_point T, Activation Act>
const Matrix<T>& MlpBank<T, Act>::backward(MatrixIn<T> dy, const Dispatch<T>& dispatch,
                                           std::span<T> d_weight, Cache& cache) {
  cache.adapted_in.expect_differentiable("MlpBank::backward", storage());
  const Index slots = dispatch.slots();
  Workspace::Frame frame(cache.workspace);
  auto d_out_packed = frame.matrix<T>(slots, d_out());
  auto d_hidden_packed = frame.matrix<T>(slots, d_hidden());
  auto d_inner = frame.matrix<T>(slots, d_hidden());
  auto d_packed = frame.matrix<T>(slots, d_in());

  combine_backward<T>(dy, cache.out.view(), dispatch, d_out_packed, d_weight);
  out_.backward(d_out_packed, cache.hidden.view(), dispatch, d_hidden_packed, false, cache.products,
                cache.adapted_out);
  apply_dropout<T>(cache.factor, d_hidden_packed);
  activation_backward<Act, T>(cache.inner.view(), d_hidden_packed, d_inner);
  in_.backward(d_inner, cache.x.view(), dispatch, d_packed, false, cache.products,
               cache.adapted_in);

  set_shape(cache.dx, dy.rows(), d_in());
  gather_backward<T>(d_packed, dispatch, cache.dx);
  return cache.dx;
}

template <std::floating_point T, Activation Act>
void MlpBank<T, Act>::remap_experts(const ExpertMap& map) {
  map.check("MlpBank::remap_experts", experts());
  if (map.has_cold()) expect_trainable("MlpBank::remap_experts", storage());
  MlpBank next = *this;
  next.in_.remap_experts(
      map, [&](Index d_out, Index d_in) { return switch_init<T>(d_out, d_in, *map.rng, 1.0); });
  next.out_.remap_experts(
      map, [](Index d_out, Index d_in) -> Matrix<T> { return Matrix<T>::Zero(d_out, d_in); });
  *this = std::move(next);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::MlpBank<float>;
extern template class weir::MlpBank<double>;
#endif
