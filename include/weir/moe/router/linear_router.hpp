// SPDX-License-Identifier: MIT
/// \file
/// The usual router: one projection of the token.
#pragma once

#include <concepts>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/nn/linear.hpp>

namespace weir {

/// Settings of LinearRouter.
struct LinearRouterConfig {
  bool bias = false;
  double init_scale = 0.1;  ///< `scale` of `switch_init`.
};

/// logits = x W_r^T (+ b), W_r [experts, d_model]. Computed in T, which is never below fp32.
///
/// (Fedus et al. 2021, arXiv:2101.03961, eq. 1. Bias: gpt-oss, FastMoE.)
template <std::floating_point T>
class LinearRouter : public RouterBase<T> {
 public:
  using Cache = typename Linear<T>::Cache;

  /// Weights from `switch_init`; the bias starts at zero.
  /// \throws ConfigError  if a size is below 1 or init_scale not positive.
  LinearRouter(Index d_model, Index experts, Rng& rng, LinearRouterConfig config = {})
      : linear_(initial(d_model, experts, rng, config)) {}

  /// \param weight   [experts, d_model]
  /// \param bias     [1, experts], or empty.
  /// \throws ShapeError   if the bias does not fit the weight.
  explicit LinearRouter(Matrix<T> weight, Matrix<T> bias = {})
      : linear_(std::move(weight), std::move(bias)) {}

  /// \param x        [tokens, d_model]
  /// \return         [tokens, experts]
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    expect_columns("LinearRouter::forward", "x", x, d_model());
    return linear_.forward(x, pass, cache);
  }

  const Matrix<T>& backward(MatrixIn<T> d_logits, Cache& cache) {
    return linear_.backward(d_logits, cache);
  }

  /// \throws ConfigError  if the map does not fit.
  void remap_experts(const ExpertMap& map) {
    map.check("LinearRouter::remap_experts", experts());
    linear_.remap_outputs(map);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.linear_);
  }

  Index d_model() const { return linear_.d_in(); }
  Index experts() const { return linear_.d_out(); }

  Parameter<T>* expert_vectors() { return &linear_.weight(); }
  const Parameter<T>* expert_vectors() const { return &linear_.weight(); }

  /// [experts, d_model]
  const Parameter<T>& weight() const { return linear_.weight(); }
  Parameter<T>& weight() { return linear_.weight(); }

 private:
  static Linear<T> initial(Index d_model, Index experts, Rng& rng,
                           const LinearRouterConfig& config) {
    expect_at_least<Index>("LinearRouter", "d_model", d_model, 1);
    expect_at_least<Index>("LinearRouter", "experts", experts, 1);
    return Linear<T>(d_model, experts, rng, {config.bias, config.init_scale});
  }

  Linear<T> linear_;
};

}  // namespace weir
