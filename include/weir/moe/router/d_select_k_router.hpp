// SPDX-License-Identifier: MIT
/// \file
/// Sparse weights that are differentiable everywhere: the gate DSelect-k.
#pragma once

#include <bit>
#include <cmath>
#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// The smooth-step function and its derivative: a cubic from 0 at -gamma/2 to 1 at gamma/2, with
/// the slope 0 at both ends and beyond.
///
///     S(z) = -2 z^3 / gamma^3 + 3 z / (2 gamma) + 1/2
///
/// (Hazimeh et al. 2020, arXiv:2002.07772.)
template <class T>
T smooth_step(T z, T gamma) {
  const T u = z / gamma;
  if (u <= T(-0.5)) return T(0);
  if (u >= T(0.5)) return T(1);
  return u * (T(1.5) - T(2) * u * u) + T(0.5);
}

template <class T>
T smooth_step_slope(T z, T gamma) {
  const T u = z / gamma;
  return u > T(-0.5) && u < T(0.5) ? (T(1.5) - T(6) * u * u) / gamma : T(0);
}

/// Settings of DSelectKRouter.
struct DSelectKConfig {
  Index k = 2;         ///< The number of selectors: at most as many experts in the end.
  double gamma = 1.0;  ///< The width of the smooth step.
};

/// k selectors, each of which names an expert by its binary code, mixed by a softmax. With the m =
/// log2(experts) logits z_i of the selector i and the k logits of the mixture,
///
///     r_ie = prod_b [S(z_ib) if bit b of e, else 1 - S(z_ib)],   bit 0 the highest
///     [c_1, ..., c_k] = softmax(x W_mix^T + b_mix),   [z_1, ..., z_k] = x W_sel^T + b_sel
///     q_e = sum_i c_i r_ie
///
/// S is the smooth step. A selector whose z are all outside of (-gamma/2, gamma/2) names exactly
/// one expert; one that is undecided in j bits has 2^j. W_sel [k m, d_model], W_mix [k, d_model].
/// The weights q are not negative and sum to 1. q is a continuous function of x with a continuous
/// derivative, also where experts come and go.
///
/// What this router gives for logits are the weights q themselves, for ReluRouting, which sends a
/// token to all experts with q > 0 and multiplies by q: the derivative of the layer is then exact,
/// since q_e = 0 has the derivative zero. No other selector is of use behind it. At first every
/// token goes to nearly all experts, as evenly as the initial z are near zero; how many there are
/// falls as the selectors make up their minds.
///
/// (Hazimeh et al. 2021, arXiv:2106.03760; `DSelectKGate` of google-research/dselect_k_moe with
/// routing inputs, whose entropy regulariser, optional there, is not here. Nor is the one that it
/// has for other numbers of experts than powers of two, and they are refused.)
template <std::floating_point T>
class DSelectKRouter {
 public:
  using Scalar = T;

  struct Cache {
    typename Linear<T>::Cache selectors, mixture;
    Matrix<T> step;     ///< [tokens, k m], S(z).
    Matrix<T> share;    ///< [tokens, k], c.
    Matrix<T> weights;  ///< [tokens, experts], q.
    Matrix<T> d_z, d_share, d_mixture, dx;
  };

  /// Weights and biases uniform as in the source: within gamma / 100 for the selectors, 1 / 20 for
  /// the mixture.
  /// \throws ConfigError  unless d_model >= 1, experts is a power of two above 1, and the settings
  ///                      are in range.
  DSelectKRouter(Index d_model, Index experts, Rng& rng, DSelectKConfig config = {})
      : DSelectKRouter(
            experts,
            initial(checked_k(config) * bits_of(experts), d_model, config.gamma / 100.0, rng),
            initial(config.k, d_model, 0.05, rng), config) {}

  /// \param selectors d_model -> k m; row i m + b is z_ib.
  /// \param mixture   d_model -> k
  /// \throws ConfigError  as above.
  /// \throws ShapeError   if the maps do not fit.
  DSelectKRouter(Index experts, Linear<T> selectors, Linear<T> mixture, DSelectKConfig config = {})
      : experts_(experts),
        bits_(bits_of(experts)),
        config_(config),
        selectors_(std::move(selectors)),
        mixture_(std::move(mixture)) {
    checked_k(config_);
    expect_positive("DSelectKRouter", "gamma", config_.gamma);
    expect_map("selectors", selectors_, config_.k * bits_);
    expect_map("mixture", mixture_, config_.k);
  }

  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, experts], q.
  /// \throws ShapeError   if x does not have d_model columns.
  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const {
    expect_columns("DSelectKRouter::forward", "x", x, d_model());
    const Matrix<T>& z = selectors_.forward(x, cache.selectors);
    const Matrix<T>& mixture = mixture_.forward(x, cache.mixture);
    cache.step.resize(z.rows(), z.cols());
    cache.share.resize(z.rows(), config_.k);
    cache.weights.resize(z.rows(), experts_);
    softmax<T>(mixture, cache.share);
    parallel_rows(z.rows(), row_cost(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index j = 0; j < z.cols(); ++j) cache.step(t, j) = smooth_step(z(t, j), gamma());
        for (Index e = 0; e < experts_; ++e) {
          T q = T(0);
          for (Index i = 0; i < config_.k; ++i) q += cache.share(t, i) * chance(cache, t, i, e);
          cache.weights(t, e) = q;
        }
      }
    });
    return cache.weights;
  }

  /// \param dq       [tokens, experts], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws ShapeError   if dq does not have the shape of q.
  const Matrix<T>& backward(MatrixIn<T> dq, Cache& cache) {
    expect_shape("DSelectKRouter::backward", "dq", dq, cache.weights.rows(), experts_);
    const Matrix<T>& z = cache.selectors.y;
    cache.d_z.resize(z.rows(), z.cols());
    cache.d_share.resize(z.rows(), config_.k);
    parallel_rows(z.rows(), 2 * bits_ * row_cost(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (Index i = 0; i < config_.k; ++i) {
          T d_share = T(0);
          for (Index e = 0; e < experts_; ++e) d_share += dq(t, e) * chance(cache, t, i, e);
          cache.d_share(t, i) = d_share;
          for (Index b = 0; b < bits_; ++b) {
            T d_step = T(0);
            for (Index e = 0; e < experts_; ++e) {
              const T d = dq(t, e) * chance(cache, t, i, e, b);
              d_step += has_bit(e, b) ? d : -d;
            }
            const Index j = i * bits_ + b;
            cache.d_z(t, j) = cache.share(t, i) * d_step * smooth_step_slope(z(t, j), gamma());
          }
        }
      }
    });
    cache.d_mixture.setZero(z.rows(), config_.k);
    add_softmax_backward<T>(cache.share, cache.d_share, cache.d_mixture);
    const Matrix<T>& through_z = selectors_.backward(cache.d_z, cache.selectors);
    cache.dx.resize(z.rows(), d_model());
    add_rows<T>(through_z, mixture_.backward(cache.d_mixture, cache.mixture), cache.dx);
    return cache.dx;
  }

  /// Parameters `selectors.*` and `mixture.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("selectors", self.selectors_);
    visit("mixture", self.mixture_);
  }

  Index d_model() const { return selectors_.d_in(); }
  Index experts() const { return experts_; }
  const DSelectKConfig& config() const { return config_; }

 private:
  static constexpr Index kNone = -1;

  static Index checked_k(const DSelectKConfig& config) {
    expect_at_least<Index>("DSelectKRouter", "k", config.k, 1);
    return config.k;
  }

  static Index bits_of(Index experts) {
    if (experts < 2 || !std::has_single_bit(static_cast<std::size_t>(experts))) {
      fail<ConfigError>("DSelectKRouter: experts = ", experts, ", expected a power of two above 1");
    }
    return std::countr_zero(static_cast<std::size_t>(experts));
  }

  static Linear<T> initial(Index rows, Index d_model, double bound, Rng& rng) {
    expect_at_least<Index>("DSelectKRouter", "d_model", d_model, 1);
    const auto draw = [&] { return static_cast<T>(rng.uniform(-bound, bound)); };
    Matrix<T> weight = Matrix<T>::NullaryExpr(rows, d_model, draw);
    Matrix<T> bias = Matrix<T>::NullaryExpr(1, rows, draw);
    return Linear<T>(std::move(weight), std::move(bias));
  }

  void expect_map(const char* name, const Linear<T>& map, Index rows) const {
    if (map.d_out() == rows && map.d_in() == d_model()) return;
    fail<ShapeError>("DSelectKRouter: ", name, " is [", map.d_out(), ", ", map.d_in(),
                     "], expected [", rows, ", ", d_model(), "]");
  }

  T gamma() const { return static_cast<T>(config_.gamma); }
  Index row_cost() const { return 2 * config_.k * bits_ * experts_; }

  bool has_bit(Index e, Index b) const { return ((e >> (bits_ - 1 - b)) & 1) != 0; }

  /// r_ie, or what it is without the factor of one bit.
  T chance(const Cache& cache, Index t, Index i, Index e, Index without = kNone) const {
    T product = T(1);
    for (Index b = 0; b < bits_; ++b) {
      const T step = cache.step(t, i * bits_ + b);
      if (b != without) product *= has_bit(e, b) ? step : T(1) - step;
    }
    return product;
  }

  Index experts_, bits_;
  DSelectKConfig config_;
  Linear<T> selectors_, mixture_;
};

}  // namespace weir
