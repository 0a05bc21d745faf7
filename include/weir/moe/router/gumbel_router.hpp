// SPDX-License-Identifier: MIT
/// \file
/// Sampled routing: Gumbel noise on the logits of any router.
#pragma once

#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/mapped_logits_router.hpp>
#include <weir/moe/router/noise.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Settings of GumbelRouter.
struct GumbelRouterConfig {
  double scale = 1.0;
};

/// In training the logits are
///
///     z + scale * G,    G standard Gumbel, one draw per token and expert
///
/// and otherwise z, those of the inner router. With scale 1 the k largest are k experts drawn
/// without replacement from softmax(z) (Kool et al. 2019, arXiv:1903.06059). Choice and weights are
/// both made of the noisy logits, as in NoisyRouter; for the weights of z, see SampledChoice. G is
/// constant to the derivative. Needs `pass.rng` in training.
///
/// If the inner router tells noise of its own, the logits without that noise are told with G on
/// them: what LoadLoss draws again is the normal noise alone.
template <Router Inner, class Noise = GumbelNoise>
requires NoiseSource<Noise, typename Inner::Scalar>
class GumbelRouter : public MappedLogitsRouter<Inner> {
 public:
  using T = typename Inner::Scalar;
  using typename MappedLogitsRouter<Inner>::Cache;

  /// \throws ConfigError  if scale < 0.
  explicit GumbelRouter(Inner inner, GumbelRouterConfig config = {}, Noise noise = {})
      : MappedLogitsRouter<Inner>(std::move(inner)), config_(config), noise_(std::move(noise)) {
    expect_at_least("GumbelRouter", "scale", config.scale, 0.0);
  }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, experts]
  /// \throws ShapeError   if x does not have d_model columns.
  /// \throws ConfigError  if pass.training without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    expect_columns("GumbelRouter::forward", "x", x, this->d_model());
    cache.is_mapped = false;
    if (!pass.training || config_.scale == 0.0) {
      return cache.state.finish(*this, pass, this->inner_.forward(x, pass, cache.inner));
    }
    set_shape(cache.logits, x.rows(), this->experts());
    noise_.fill(pass, MatrixOut<T>(cache.logits));
    cache.logits *= static_cast<T>(config_.scale);
    const Matrix<T>& z = this->inner_.forward(x, pass, cache.inner);
    add_rows<T>(z, cache.logits, cache.logits);
    return cache.state.finish(*this, pass,
                              this->finish_mapped("GumbelRouter", z, T(1), pass, cache));
  }

  /// \param d_logits  [tokens, experts], of the last forward pass.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    cache.state.begin_backward("GumbelRouter::backward", *this, d_logits);
    return this->backward_mapped(d_logits, cache);
  }

  const GumbelRouterConfig& config() const { return config_; }

 private:
  GumbelRouterConfig config_;
  Noise noise_;
};

}  // namespace weir
