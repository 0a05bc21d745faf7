// SPDX-License-Identifier: MIT
/// \file
/// Routing on the hypersphere: cosines between a projection of the token and expert embeddings (Chi
/// et al. 2022, arXiv:2204.09179).
#pragma once

#include <cmath>
#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/init.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/unit_rows.hpp>

namespace weir {

/// Settings of CosineRouter; the defaults are those of Tutel.
struct CosineRouterConfig {
  Index d_projection = 256;
  bool bias = true;  ///< Whether the projection has a bias; in the paper it has none.
  double temperature = 0.5;
  double least_temperature = 0.01;
};

/// The logits are cosines over a learned temperature:
///
///     u_t = W x_t (+ b),    logits_te = u_t . v_e / (|u_t| |v_e| tau)
///     1/tau = min(exp(s), 1 / least_temperature)
///
/// W [d_projection, d_model], v_e row e of the embedding [experts, d_projection]. Low dimensions
/// and unit vectors keep tokens from gathering around the experts' embeddings. A zero
/// vector has cosine zero and no gradient; where the temperature is at its bound, s has none.
/// (Chi et al. 2022, arXiv:2204.09179, section 3; exp(s), its bound and the initial temperature and
/// embedding are those of Tutel's gates/cosine_top.py. Its projection begins as PyTorch's `Linear`,
/// weights and bias uniform within 1 / sqrt(d_model); here it begins as `switch_init`.)
template <std::floating_point T>
class CosineRouter : public RouterBase<T> {
 public:
  struct Cache {
    CacheState state;
    typename Linear<T>::Cache projection;
    Matrix<T> u, v;               ///< Unit vectors, or zero.
    RowVector<T> u_norm, v_norm;  ///< Norms before; zero where the vector counts as zero.
    Matrix<T> logits;
    Matrix<T> d_cosine, du, dv;
  };

  /// W from switch_init with scale 1, the embedding from N(0, 0.01^2).
  /// \throws ConfigError  if a size is below 1, or unless 0 < least_temperature <= temperature.
  CosineRouter(Index d_model, Index experts, Rng& rng, CosineRouterConfig config = {})
      : projection_(initial(d_model, experts, rng, config)), config_(config) {
    embedding_.value = normal_init<T>(experts, config.d_projection, 0.01, rng);
    log_scale_.value.setConstant(1, 1, static_cast<T>(-std::log(config.temperature)));
  }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, experts]
  /// \throws ShapeError   if x does not have d_model columns.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// \param d_logits  [tokens, experts], of the last forward pass.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if d_logits does not have the shape of the logits.
  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache);

  /// Parameters `projection.*`, `embedding` and `log_scale` (s, [1, 1]).
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("projection", self.projection_);
    visit("embedding", self.embedding_);
    visit("log_scale", self.log_scale_);
  }

  /// Embeddings go with their experts.
  /// \throws ConfigError  if the map does not fit, or has cold experts: no embedding has a constant
  ///                      cosine.
  void remap_experts(const ExpertMap& map) {
    map.check("CosineRouter::remap_experts", experts());
    if (map.has_cold()) {
      throw_error<ConfigError>("CosineRouter::remap_experts: the map has a cold expert, expected ",
                               "none: no embedding has a constant cosine");
    }
    map.remap_rows(embedding_);
  }

  Index d_model() const { return projection_.d_in(); }
  Index experts() const { return embedding_.value.rows(); }

  Parameter<T>* expert_vectors() { return &embedding_; }
  const Parameter<T>* expert_vectors() const { return &embedding_; }

  const CosineRouterConfig& config() const { return config_; }

  /// tau
  double temperature() const { return 1.0 / static_cast<double>(scale()); }

  Linear<T>& projection() { return projection_; }
  Parameter<T>& embedding() { return embedding_; }
  Parameter<T>& log_scale() { return log_scale_; }

 private:
  static Linear<T> initial(Index d_model, Index experts, Rng& rng,
                           const CosineRouterConfig& config);

  bool bounded() const {
    return static_cast<double>(log_scale_.value(0, 0)) > -std::log(config_.least_temperature);
  }
  T scale() const {
    return bounded() ? static_cast<T>(1.0 / config_.least_temperature)
                     : std::exp(log_scale_.value(0, 0));
  }

  static void normalise(MatrixIn<T> rows, Matrix<T>& unit, RowVector<T>& norm) {
    set_shape(unit, rows.rows(), rows.cols());
    set_shape(norm, rows.rows());
    unit_rows<T>(rows, unit, norm.data());
  }

  Linear<T> projection_;
  CosineRouterConfig config_;
  Parameter<T> embedding_, log_scale_;
};

template <std::floating_point T>
const Matrix<T>& CosineRouter<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  expect_columns("CosineRouter::forward", "x", x, d_model());
  normalise(projection_.forward(x, pass, cache.projection), cache.u, cache.u_norm);
  normalise(embedding_.value, cache.v, cache.v_norm);
  set_shape(cache.logits, x.rows(), experts());
  multiply_nt<T>(cache.u, cache.v, cache.logits);
  cache.logits *= scale();
  return cache.state.finish(*this, pass, cache.logits);
}

template <std::floating_point T>
const Matrix<T>& CosineRouter<T>::backward(MatrixIn<T> d_logits, Cache& cache) {
  cache.state.begin_backward("CosineRouter::backward", *this, d_logits);
  Matrix<T>& d_log_scale = log_scale_.gradient();
  if (!bounded()) {
    double sum = 0.0;  // d logits / d s = logits.
    for (Index t = 0; t < d_logits.rows(); ++t) {
      for (Index e = 0; e < experts(); ++e) {
        sum += static_cast<double>(d_logits(t, e)) * static_cast<double>(cache.logits(t, e));
      }
    }
    d_log_scale(0, 0) += static_cast<T>(sum);
  }
  scale_rows<T>(scale(), d_logits, cache.d_cosine);
  set_shape(cache.du, cache.u.rows(), cache.u.cols());
  set_shape(cache.dv, cache.v.rows(), cache.v.cols());
  const Product<T> products[] = {product_nn<T>(cache.d_cosine, cache.v, cache.du),
                                 product_tn<T>(cache.d_cosine, cache.u, cache.dv)};
  multiply<T>(products);
  unit_rows_backward<T>(cache.u, cache.u_norm.data(), cache.du);
  unit_rows_backward<T>(cache.v, cache.v_norm.data(), cache.dv);
  embedding_.gradient() += cache.dv;
  return projection_.backward(cache.du, cache.projection);
}

template <std::floating_point T>
Linear<T> CosineRouter<T>::initial(Index d_model, Index experts, Rng& rng,
                                   const CosineRouterConfig& config) {
  expect_at_least<Index>("CosineRouter", "d_model", d_model, 1);
  expect_at_least<Index>("CosineRouter", "experts", experts, 1);
  expect_at_least<Index>("CosineRouter", "d_projection", config.d_projection, 1);
  expect_positive("CosineRouter", "least_temperature", config.least_temperature);
  expect_at_least("CosineRouter", "temperature", config.temperature, config.least_temperature);
  return Linear<T>(d_model, config.d_projection, rng, {config.bias, 1.0});
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::CosineRouter<float>;
extern template class weir::CosineRouter<double>;
#endif
