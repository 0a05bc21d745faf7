// SPDX-License-Identifier: MIT
/// \file
/// SparseMixer-v2, the router of Phi-3.5-MoE.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/random.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of SparseMixer.
struct SparseMixerConfig {
  double epsilon = 0.01;  ///< `router_jitter_noise`.
};

/// Chooses two experts one after the other, each from a softmax of its own over those whose logits
/// are near the largest:
///
///     q = softmax(z) over the experts e with (m - z_e) / max(|z_e|, m) <= 2 epsilon, m = max z
///     e_1 = argmax z                                in evaluation
///     e_1 drawn from q, by Gumbel noise             in training
///     g_1 = q_{e_1} * h,   h = 1 if e_1 = argmax q or u > 0.75, else 0.3333; in evaluation h = 1
///
/// and in the same way e_2 and g_2 with e_1 left out, q and m being made anew. The two weights do
/// not sum to 1; where logits are well apart, both are 1.
///
/// The derivative of each weight is that of its softmax,
///
///     d g_i / d z_j = q_{e_i} (1[j = e_i] - q_j),
///
/// in training too: leaving out h there is what makes the estimate third-order (Heun) on average,
/// and so training's derivative is not that of its forward pass. The choice is constant to the
/// derivative. The probabilities that balancers see are the softmax over all experts. Needs
/// `pass.rng` in training; the draws do not depend on the number of threads. Causal. Equal logits:
/// the lowest index.
///
/// (Liu et al. 2024, arXiv:2409.12136, GRIN; `sparsemixer` and `MultiplierProcessor` of PhiMoE in
/// Hugging Face's transformers, whose constants these are.)
template <std::floating_point T>
class SparseMixer : public SelectorBase<T> {
 public:
  using typename SelectorBase<T>::Cache;

  explicit SparseMixer(SparseMixerConfig config = {}) : config_(config) {}

  /// \throws ConfigError  unless experts >= 2 and epsilon is finite and >= 0.
  void check(Index experts) const {
    expect_at_least<Index>("SparseMixer", "experts", experts, 2);
    expect_at_least("SparseMixer", "epsilon", config_.epsilon, 0.0);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  /// \throws ConfigError     as `check`; in training without pass.rng.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& /*cache*/) const;

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& /*cache*/) const;

  const SparseMixerConfig& config() const { return config_; }

 private:
  static constexpr Index kChosen = 2;
  static constexpr Index kNone = -1;

  static Index best_of(const T* z, Index experts, Index left_out) {
    Index best = left_out == 0 ? 1 : 0;
    for (Index e = best + 1; e < experts; ++e) {
      if (e != left_out && z[e] > z[best]) best = e;
    }
    return best;
  }

  /// q over all experts except `left_out`; zero for those that are not near.
  void near_softmax(const T* z, Index experts, Index left_out, T* q) const;

  /// argmax of z + Gumbel noise over the experts with q > 0.
  static Index sample(const T* z, const T* q, Index experts, const Rng& draws, std::uint64_t first);

  SparseMixerConfig config_;
};

template <std::floating_point T>
void SparseMixer<T>::forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing,
                             Cache& /*cache*/) const {
  check(logits.cols());
  routing.begin("SparseMixer", logits, pass, kChosen);
  const Rng draws = pass.training ? pass.generator("SparseMixer").split() : Rng(0);
  routing.assign_each(kChosen);
  const Index experts = routing.experts();
  routing.rows.for_each_real(64 * experts, [&](Index t) {
    T* const q = routing.probabilities.row(t).data();
    const T* const z = routing.logits.row(t).data();
    Index* const chosen = routing.expert.data() + routing.first(t);
    T* const weight = routing.weight.data() + routing.first(t);
    Index left_out = kNone;
    for (Index i = 0; i < kChosen; ++i) {
      near_softmax(z, experts, left_out, q);
      const Index best = best_of(z, experts, left_out);
      chosen[i] = best;
      weight[i] = q[best];
      if (pass.training) {
        const auto first = static_cast<std::uint64_t>((t * kChosen + i) * (experts + 1));
        chosen[i] = sample(z, q, experts, draws, first);
        const double u = unit_interval(draws.at(first + static_cast<std::uint64_t>(experts)));
        const bool whole = chosen[i] == best || u > 0.75;
        weight[i] = q[chosen[i]] * (whole ? T(1) : T(0.3333));
      }
      left_out = chosen[i];
    }
    softmax_row<T>(span_of(z, experts), span_of(q, experts));
  });
}

template <std::floating_point T>
void SparseMixer<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                              Cache& /*cache*/) const {
  const Index experts = routing.experts();
  routing.rows.for_each_real(32 * experts, [&](Index t) {
    T* const dz = gradient.logits.row(t).data();
    T* const q = gradient.probabilities.row(t).data();
    add_softmax_backward_row<T>(row_span(routing.probabilities, t), span_of(q, experts),
                                span_of(dz, experts));
    Index left_out = kNone;
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      const Index e = routing.expert[a];
      near_softmax(routing.logits.row(t).data(), experts, left_out, q);
      const T d = gradient.weights[a] * q[e];
      loops::add_scaled(experts, -d, q, dz);
      dz[e] += d;
      left_out = e;
    }
  });
}

template <std::floating_point T>
void SparseMixer<T>::near_softmax(const T* z, Index experts, Index left_out, T* q) const {
  const T m = z[best_of(z, experts, left_out)];
  const auto reach = static_cast<T>(2.0 * config_.epsilon);
  T sum = T(0);
  for (Index e = 0; e < experts; ++e) {
    const bool out = e == left_out || m - z[e] > reach * std::max(std::abs(z[e]), m);
    q[e] = out ? T(0) : std::exp(z[e] - m);
    sum += q[e];
  }
  for (Index e = 0; e < experts; ++e) q[e] /= sum;
}

template <std::floating_point T>
Index SparseMixer<T>::sample(const T* z, const T* q, Index experts, const Rng& draws,
                             std::uint64_t first) {
  Index best = kNone;
  double largest = -std::numeric_limits<double>::infinity();
  for (Index e = 0; e < experts; ++e) {
    if (!(q[e] > T(0))) continue;
    const double u = unit_interval(draws.at(first + static_cast<std::uint64_t>(e)));
    const double noisy = static_cast<double>(z[e]) - std::log(-std::log1p(-u));
    if (best == kNone || noisy > largest) {
      largest = noisy;
      best = e;
    }
  }
  return best;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::SparseMixer<float>;
extern template class weir::SparseMixer<double>;
#endif
