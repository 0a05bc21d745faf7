// SPDX-License-Identifier: MIT
/// \file
/// The router of noisy top-k gating: a second projection says how much noise the logits get.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <span>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/noise.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Settings of NoisyRouter.
struct NoisyRouterConfig {
  double min_std = 0.01;  ///< Added to the noise's standard deviation.
};

/// In training the logits are
///
///     H = C + eps * std,    C = x W_g^T,    std = softplus(x W_n^T) + min_std,    eps ~ N(0, 1)
///
/// elementwise, one draw per token and expert; otherwise they are C. W_g and W_n are [experts,
/// d_model]. Followed by TopKSoftmax this is the gate of Shazeer et al. 2017 (arXiv:1701.06538, eq.
/// 3-5; the paper has no min_std, tensor2tensor has 0.01). Noise lets experts that are not chosen
/// be tried: without it, weights that start at zero send every token to the same experts.
///
/// Balancers are told C and std in training, and may return gradients of them: LoadLoss does. eps
/// is constant to the derivative.
///
/// \tparam Noise   What eps is drawn from.
template <std::floating_point T, class Noise = NormalNoise>
requires NoiseSource<Noise, T>
class NoisyRouter : public RouterBase<T> {
 public:
  struct Cache {
    CacheState state;
    Matrix<T> x;
    Matrix<T> logits;              ///< H, or C without noise.
    Matrix<T> raw;                 ///< x W_n^T
    Matrix<T> eps;                 ///< The noise of the last pass.
    NoiseLevel<T> level;           ///< C and std
    bool noisy = false;            ///< The last pass drew noise.
    Matrix<T> d_clean, d_raw, dx;  ///< Gradients, those of balancers first.
  };

  /// Both weights start at zero, as in the paper (appendix A).
  /// \throws ConfigError  if a size is below 1 or min_std not positive.
  NoisyRouter(Index d_model, Index experts, NoisyRouterConfig config = {}, Noise noise = {})
      : config_(config), noise_(std::move(noise)) {
    expect_at_least<Index>("NoisyRouter", "d_model", d_model, 1);
    expect_at_least<Index>("NoisyRouter", "experts", experts, 1);
    expect_positive("NoisyRouter", "min_std", config.min_std);
    weight_.value.setZero(experts, d_model);
    noise_weight_.value.setZero(experts, d_model);
  }

  /// \param weight        W_g [experts, d_model]
  /// \param noise_weight  W_n, of the same shape.
  /// \throws ShapeError   if the shapes differ.
  /// \throws ConfigError  if min_std is not positive.
  NoisyRouter(Matrix<T> weight, Matrix<T> noise_weight, NoisyRouterConfig config = {},
              Noise noise = {})
      : NoisyRouter(weight.cols(), weight.rows(), config, std::move(noise)) {
    expect_shape("NoisyRouter", "noise_weight", noise_weight, experts(), d_model());
    weight_.value = std::move(weight);
    noise_weight_.value = std::move(noise_weight);
  }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, experts]
  /// \throws ShapeError   if x does not have d_model columns.
  /// \throws ConfigError  if pass.training without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    expect_columns("NoisyRouter::forward", "x", x, d_model());
    cache.noisy = pass.training;
    set_shape(cache.logits, x.rows(), experts());
    if (cache.noisy) {
      forward_noisy(x, pass, cache);
    } else {
      multiply_nt<T>(x, weight_.value, cache.logits);
    }
    return cache.state.finish(*this, pass, cache.logits);
  }

  /// C and std, if the last pass drew noise.
  std::span<const NoiseLevel<T>> noise(const Cache& cache) const {
    return {&cache.level, cache.noisy ? std::size_t(1) : std::size_t(0)};
  }

  void add_noise_gradient(std::span<const NoiseLevel<T>> d_noise, Cache& cache) const {
    if (d_noise.empty()) return;
    cache.d_clean += d_noise.back().clean;
    cache.d_raw += d_noise.back().deviation;  // d std for now.
  }

  /// \param d_logits  dL/dH [tokens, experts], of the last forward pass.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    cache.state.begin_backward("NoisyRouter::backward", *this, d_logits);
    cache.d_clean += d_logits;
    cache.d_raw += d_logits.cwiseProduct(cache.eps);
    for_each_element(
        cache, [&](Index i) { cache.d_raw.data()[i] /= T(1) + std::exp(-cache.raw.data()[i]); });
    set_shape(cache.dx, d_logits.rows(), d_model());
    const Product<T> products[] = {
        product_nn<T>(cache.d_clean, weight_.value, cache.dx),
        product_tn<T>(cache.d_clean, cache.x, weight_.gradient(), true),
        product_tn<T>(cache.d_raw, cache.x, noise_weight_.gradient(), true)};
    multiply<T>(products);
    multiply_nn<T>(cache.d_raw, noise_weight_.value, cache.dx, true);
    return cache.dx;
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight_);
    visit("noise_weight", self.noise_weight_);
  }

  /// Rows of both weights go with their experts; those of cold ones are zero.
  /// \throws ConfigError  if the map does not fit, or has cold experts with a logit other than 0:
  ///                      there are no biases.
  void remap_experts(const ExpertMap& map) {
    map.check("NoisyRouter::remap_experts", experts());
    if (map.has_cold() && map.cold_logit != 0.0) {
      throw_error<ConfigError>("NoisyRouter::remap_experts: cold_logit = ", map.cold_logit,
                               ", expected 0: the router has no biases");
    }
    map.remap_rows(weight_);
    map.remap_rows(noise_weight_);
  }

  Index d_model() const { return weight_.value.cols(); }
  Index experts() const { return weight_.value.rows(); }

  Parameter<T>* expert_vectors() { return &weight_; }
  const Parameter<T>* expert_vectors() const { return &weight_; }

  const NoisyRouterConfig& config() const { return config_; }

  /// W_g
  Parameter<T>& weight() { return weight_; }
  const Parameter<T>& weight() const { return weight_; }
  /// W_n
  Parameter<T>& noise_weight() { return noise_weight_; }
  const Parameter<T>& noise_weight() const { return noise_weight_; }

 private:
  void forward_noisy(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    set_shape(cache.eps, x.rows(), experts());
    noise_.fill(pass, MatrixOut<T>(cache.eps));
    copy_rows<T>(x, cache.x);
    Matrix<T>& clean = cache.level.clean;
    Matrix<T>& deviation = cache.level.deviation;
    for (Matrix<T>* matrix : {&clean, &deviation, &cache.raw}) matrix->resize(x.rows(), experts());
    const Product<T> products[] = {product_nt<T>(x, weight_.value, clean),
                                   product_nt<T>(x, noise_weight_.value, cache.raw)};
    multiply<T>(products);
    for_each_element(cache, [&](Index i) {
      const T raw = cache.raw.data()[i];
      const T softplus = std::max(raw, T(0)) + std::log1p(std::exp(-std::abs(raw)));
      deviation.data()[i] = softplus + static_cast<T>(config_.min_std);
      cache.logits.data()[i] = clean.data()[i] + cache.eps.data()[i] * deviation.data()[i];
    });
    set_zero(cache.d_clean, x.rows(), experts());
    set_zero(cache.d_raw, x.rows(), experts());
  }

  template <class Body>
  static void for_each_element(const Cache& cache, Body&& body) {
    parallel_rows(cache.raw.size(), 32, [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) body(i);
    });
  }

  NoisyRouterConfig config_;
  Noise noise_;
  Parameter<T> weight_, noise_weight_;
};

}  // namespace weir
