// SPDX-License-Identifier: MIT
/// \file
/// Sparse weights that are differentiable everywhere: the gate DSelect-k.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/smooth_step.hpp>
#include <weir/ops/softmax.hpp>

namespace weir {

/// Settings of DSelectKRouter.
struct DSelectKRouterConfig {
  Index k = 2;           ///< The number of selectors: at most as many experts in the end.
  double gamma = 1.0;    ///< The width of the smooth step.
  double entropy = 0.0;  ///< Coefficient of the entropy of the selectors; 1e-6 in the source.
  double epsilon = 0.0;  ///< Added to the r of the logarithm; 1e-6 in the source.
  double reach = 1.0;    ///< Coefficient of what keeps selectors from codes that no expert has.
  double least_reach = 1e-6;  ///< The least s_i that it is divided by; the source has none.
};

/// k selectors, each of which names an expert by its binary code, mixed by a softmax. With the m =
/// ceil(log2(experts)) logits z_i of the selector i and the k logits of the mixture,
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
/// falls as the selectors make up their minds, the faster the larger `entropy` is:
///
///     loss = mean_t sum_i [entropy * H(r_i) + reach / s_i]
///     H(r) = -sum_e r_e log(r_e + epsilon),    s_i = sum_e r_ie
///
/// It is an auxiliary loss of the pass, called "d_select_k". The second term is there only if the
/// number of experts is no power of two: what a selector has on codes beyond the last expert is
/// missing from s_i and from q, whose sum may be below 1, and the loss draws it back. Where s_i is
/// below `least_reach` it counts as that, without a derivative. The source adds both terms up over
/// the tokens; with the mean the coefficients do not depend on the batch. Padding is not counted.
/// Experts that the pass forbids are, unlike in other losses: they have their codes still, and a
/// selector that has made up its mind for one of them has no derivative that could draw it back,
/// only a loss of reach / `least_reach` while that expert is off.
///
/// (Hazimeh et al. 2021, arXiv:2106.03760; `DSelectKGate` of google-research/dselect_k_moe with
/// routing inputs, which has the losses in training alone.)
template <std::floating_point T>
class DSelectKRouter : public RouterBase<T> {
 public:
  struct Cache {
    CacheState state;
    typename Linear<T>::Cache selectors, mixture;
    Matrix<T> step;      ///< [tokens, k m], S(z).
    Matrix<T> share;     ///< [tokens, k], c.
    Matrix<T> weights;   ///< [tokens, experts], q.
    Matrix<T> loss;      ///< [tokens, 1], the loss of each token by itself.
    Matrix<T> per_loss;  ///< [tokens, 1], what it is multiplied by in the pass's loss: zero for
                         ///< padding, and where there is no loss.
    Matrix<T> d_z, d_share, d_mixture, dx;
  };

  /// Weights and biases uniform as in the source: within gamma / 100 for the selectors, 1 / 20 for
  /// the mixture.
  /// \throws ConfigError  unless d_model >= 1, experts >= 2, and the settings are in range.
  DSelectKRouter(Index d_model, Index experts, Rng& rng, DSelectKRouterConfig config = {})
      : DSelectKRouter(
            experts,
            initial(checked_k(config) * bits_of(experts), d_model, config.gamma / 100.0, rng),
            initial(config.k, d_model, 0.05, rng), config) {}

  /// \param selectors d_model -> k m; row i m + b is z_ib.
  /// \param mixture   d_model -> k
  /// \throws ConfigError  as above.
  /// \throws ShapeError   if the maps do not fit.
  DSelectKRouter(Index experts, Linear<T> selectors, Linear<T> mixture,
                 DSelectKRouterConfig config = {});

  /// \param x        [tokens, d_model]
  /// \return         [tokens, experts], q.
  /// \throws ShapeError   if x does not have d_model columns, or the mask does not fit.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// \param dq       [tokens, experts], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dq does not have the shape of q.
  const Matrix<T>& backward(MatrixIn<T> dq, Cache& cache);

  /// Parameters `selectors.*` and `mixture.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("selectors", self.selectors_);
    visit("mixture", self.mixture_);
  }

  Index d_model() const { return selectors_.d_in(); }
  Index experts() const { return experts_; }
  const DSelectKRouterConfig& config() const { return config_; }

 private:
  static constexpr Index kNone = -1;

  static Index checked_k(const DSelectKRouterConfig& config) {
    expect_at_least<Index>("DSelectKRouter", "k", config.k, 1);
    expect_at_least("DSelectKRouter", "entropy", config.entropy, 0.0);
    expect_at_least("DSelectKRouter", "epsilon", config.epsilon, 0.0);
    expect_at_least("DSelectKRouter", "reach", config.reach, 0.0);
    expect_positive("DSelectKRouter", "least_reach", config.least_reach);
    return config.k;
  }

  static Index bits_of(Index experts) {
    expect_at_least<Index>("DSelectKRouter", "experts", experts, 2);
    return static_cast<Index>(std::bit_width(static_cast<std::size_t>(experts - 1)));
  }

  bool has_entropy() const { return config_.entropy > 0.0; }
  bool has_reach() const { return config_.reach > 0.0 && experts_ < Index(1) << bits_; }

  /// s_i
  T reached(const Cache& cache, Index t, Index i) const {
    T sum = T(0);
    for (Index e = 0; e < experts_; ++e) sum += chance(cache, t, i, e);
    return sum;
  }

  void add_up_loss(const Pass& pass, Cache& cache) const;

  T loss_of(const Cache& cache, Index t, Index i) const;

  /// Adds the derivative of the loss by r_ie to `d_chance[e]`.
  void add_loss_gradient(const Cache& cache, Index t, Index i, T* d_chance) const;

  static Linear<T> initial(Index rows, Index d_model, double bound, Rng& rng) {
    expect_at_least<Index>("DSelectKRouter", "d_model", d_model, 1);
    const auto draw = [&] { return static_cast<T>(rng.uniform(-bound, bound)); };
    Matrix<T> weight = Matrix<T>::NullaryExpr(rows, d_model, draw);
    Matrix<T> bias = Matrix<T>::NullaryExpr(1, rows, draw);
    return Linear<T>(std::move(weight), std::move(bias));
  }

  void expect_map(const char* name, const Linear<T>& map, Index rows) const {
    if (map.d_out() == rows && map.d_in() == d_model()) return;
    throw_error<ShapeError>("DSelectKRouter: ", name, " is [", map.d_out(), ", ", map.d_in(),
                            "], expected [", rows, ", ", d_model(), "]");
  }

  T gamma() const { return static_cast<T>(config_.gamma); }
  T epsilon() const { return static_cast<T>(config_.epsilon); }
  T least_reach() const { return static_cast<T>(config_.least_reach); }
  Index row_cost() const { return 2 * config_.k * bits_ * experts_; }

  bool has_bit(Index e, Index b) const { return ((e >> (bits_ - 1 - b)) & 1) != 0; }

  /// r_ie, or what it is without the factor of one bit.
  T chance(const Cache& cache, Index t, Index i, Index e, Index without = kNone) const;

  Index experts_ = 0;
  Index bits_ = 0;
  DSelectKRouterConfig config_;
  Linear<T> selectors_, mixture_;
};

template <std::floating_point T>
DSelectKRouter<T>::DSelectKRouter(Index experts, Linear<T> selectors, Linear<T> mixture,
                                  DSelectKRouterConfig config)
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

template <std::floating_point T>
const Matrix<T>& DSelectKRouter<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  expect_columns("DSelectKRouter::forward", "x", x, d_model());
  pass.check("DSelectKRouter::forward", x.rows());
  const Matrix<T>& z = selectors_.forward(x, pass, cache.selectors);
  const Matrix<T>& mixture = mixture_.forward(x, pass, cache.mixture);
  set_shape(cache.step, z.rows(), z.cols());
  set_shape(cache.share, z.rows(), config_.k);
  set_shape(cache.weights, z.rows(), experts_);
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
  add_up_loss(pass, cache);
  return cache.state.finish(*this, pass, cache.weights);
}

template <std::floating_point T>
const Matrix<T>& DSelectKRouter<T>::backward(MatrixIn<T> dq, Cache& cache) {
  cache.state.begin_backward("DSelectKRouter::backward", *this, dq);
  const Matrix<T>& z = cache.selectors.y;
  set_shape(cache.d_z, z.rows(), z.cols());
  set_shape(cache.d_share, z.rows(), config_.k);
  parallel_rows(z.rows(), 2 * bits_ * row_cost(), [&](Index begin, Index end) {
    auto& space = ThreadSpace<T, DSelectKRouter>::of_this_thread();
    space.reserve(experts_);
    T* const d_chance = space.take(experts_);  // The gradient of r_i.
    for (Index t = begin; t < end; ++t) {
      for (Index i = 0; i < config_.k; ++i) {
        T d_share = T(0);
        for (Index e = 0; e < experts_; ++e) {
          d_share += dq(t, e) * chance(cache, t, i, e);
          d_chance[e] = cache.share(t, i) * dq(t, e);
        }
        cache.d_share(t, i) = d_share;
        add_loss_gradient(cache, t, i, d_chance);
        for (Index b = 0; b < bits_; ++b) {
          T d_step = T(0);
          for (Index e = 0; e < experts_; ++e) {
            const T d = d_chance[e] * chance(cache, t, i, e, b);
            d_step += has_bit(e, b) ? d : -d;
          }
          const Index j = i * bits_ + b;
          cache.d_z(t, j) = d_step * smooth_step_slope(z(t, j), gamma());
        }
      }
    }
  });
  set_zero(cache.d_mixture, z.rows(), config_.k);
  add_softmax_backward<T>(cache.share, cache.d_share, cache.d_mixture);
  const Matrix<T>& through_z = selectors_.backward(cache.d_z, cache.selectors);
  set_shape(cache.dx, z.rows(), d_model());
  add_rows<T>(through_z, mixture_.backward(cache.d_mixture, cache.mixture), cache.dx);
  return cache.dx;
}

template <std::floating_point T>
void DSelectKRouter<T>::add_up_loss(const Pass& pass, Cache& cache) const {
  const Index tokens = cache.weights.rows();
  set_zero(cache.per_loss, tokens, 1);
  if (!pass.has_aux_losses() || !(has_entropy() || has_reach())) return;
  Index real = 0;
  for (Index t = 0; t < tokens; ++t) real += pass.is_padding(t) ? 0 : 1;
  set_shape(cache.loss, tokens, 1);
  parallel_rows(tokens, 8 * row_cost(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      cache.loss(t, 0) = T(0);
      if (pass.is_padding(t)) continue;
      cache.per_loss(t, 0) = static_cast<T>(pass.aux_scale / static_cast<double>(real));
      for (Index i = 0; i < config_.k; ++i) cache.loss(t, 0) += loss_of(cache, t, i);
    }
  });
  if (pass.record == nullptr) return;
  const T loss = cache.loss.cwiseProduct(cache.per_loss).sum();
  pass.record->add_loss("d_select_k", static_cast<double>(loss));
}

template <std::floating_point T>
T DSelectKRouter<T>::loss_of(const Cache& cache, Index t, Index i) const {
  T loss = T(0);
  if (has_entropy()) {
    T entropy = T(0);
    for (Index e = 0; e < experts_; ++e) {
      const T r = chance(cache, t, i, e);
      if (r > T(0)) entropy -= r * std::log(r + epsilon());
    }
    loss += static_cast<T>(config_.entropy) * entropy;
  }
  if (has_reach()) {
    loss += static_cast<T>(config_.reach) / std::max(reached(cache, t, i), least_reach());
  }
  return loss;
}

template <std::floating_point T>
void DSelectKRouter<T>::add_loss_gradient(const Cache& cache, Index t, Index i, T* d_chance) const {
  const T scale = cache.per_loss(t, 0);
  if (scale == T(0)) return;
  if (has_entropy()) {
    for (Index e = 0; e < experts_; ++e) {
      const T r = chance(cache, t, i, e);
      if (r <= T(0)) continue;  // The derivative of r by z is zero there, and faster than the log.
      const T slope = std::log(r + epsilon()) + r / (r + epsilon());
      d_chance[e] -= scale * static_cast<T>(config_.entropy) * slope;
    }
  }
  if (has_reach()) {
    const T sum = reached(cache, t, i);
    if (!(sum > least_reach())) return;
    const T d = scale * static_cast<T>(config_.reach) / (sum * sum);
    for (Index e = 0; e < experts_; ++e) d_chance[e] -= d;
  }
}

template <std::floating_point T>
T DSelectKRouter<T>::chance(const Cache& cache, Index t, Index i, Index e, Index without) const {
  T product = T(1);
  for (Index b = 0; b < bits_; ++b) {
    const T step = cache.step(t, i * bits_ + b);
    if (b != without) product *= has_bit(e, b) ? step : T(1) - step;
  }
  return product;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::DSelectKRouter<float>;
extern template class weir::DSelectKRouter<double>;
#endif
