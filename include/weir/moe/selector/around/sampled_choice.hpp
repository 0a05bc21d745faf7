// SPDX-License-Identifier: MIT
/// \file
/// Experts drawn at random, with the weights of the logits as they are: DeepSpeed, NLLB.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/router/noise.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/routing_trace.hpp>
#include <weir/moe/selector/around/selector_wrapper.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Settings of SampledChoice.
struct SampledChoiceConfig {
  double scale = 1.0;     ///< Multiplies the noise.
  Index certain = 0;      ///< How many of a token's experts are its best, not drawn.
  bool evaluate = false;  ///< Whether passes that do not train draw too.
};

template <ImposableSelector Inner, class Noise>
requires NoiseSource<Noise, typename Inner::Scalar>
class SampledChoice;

namespace detail {

template <class S>
inline constexpr bool kIsSampledChoice = false;
template <class Inner, class Noise>
inline constexpr bool kIsSampledChoice<SampledChoice<Inner, Noise>> = true;

}  // namespace detail

/// Any selector of the k best (see ImposableSelector), with noise on its choice alone:
///
///     S = the `certain` best of z,  and of the others the k - certain best of z + scale * G
///     g_te, p_te = the inner selector's formulas for S and z
///
/// G is standard Gumbel noise, one draw per token and expert. With scale 1 and a selector that
/// chooses by logits, or by what grows with them, the drawn experts are drawn without replacement
/// from softmax(z) over those that are not certain. The inner selector's group limit and bias apply
/// to the noisy logits; with a bias a certain expert may lose its place. A token's experts are
/// listed by what the inner selector would choose by without noise, best first, whatever the order
/// in which they were drawn. The choice is constant to the derivative. Forbidden experts are not
/// drawn. What a token gets depends on no other token: causal.
///
/// (Kool et al. 2019, arXiv:1903.06059, the sampling. k = 1: DeepSpeed's noisy_gate_policy
/// "RSample". k = 2 with one certain: DeepSpeed's top-2, and NLLB's second_expert_policy "sampling"
/// (NLLB Team 2022, arXiv:2207.04672), both of which draw in evaluation too. Hugging Face's NLLB
/// lets its losses see the noisy logits; here they see z.)
template <ImposableSelector Inner, class Noise = GumbelNoise>
requires NoiseSource<Noise, typename Inner::Scalar>
class SampledChoice : public SelectorWrapper<Inner> {
 public:
  using T = typename Inner::Scalar;

  static_assert(!detail::kIsSampledChoice<Inner>,
                "a SampledChoice inside another one would take the noisy logits of the outer one "
                "for clean: give one SampledChoice all the noise instead");

  struct Cache : SelectorWrapper<Inner>::Cache {
    Matrix<T> noisy;      ///< [tokens, experts], the logits that the inner selector chooses by.
    RoutingTrace choice;  ///< What it chose.
  };

  /// \throws ConfigError  if scale or certain is below 0.
  explicit SampledChoice(Inner inner, SampledChoiceConfig config = {}, Noise noise = {})
      : SelectorWrapper<Inner>(std::move(inner)), config_(config), noise_(std::move(noise)) {
    expect_at_least("SampledChoice", "scale", config_.scale, 0.0);
    expect_at_least<Index>("SampledChoice", "certain", config_.certain, 0);
  }

  /// \param logits   [tokens, experts]
  /// \throws ConfigError     as the inner selector; if it draws without pass.rng.
  /// \throws NonFiniteError  as the inner selector; if a weight that it makes is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const {
    const bool draws = (pass.training || config_.evaluate) && config_.scale > 0.0;
    if (!draws || config_.certain > 0) inner_.forward(logits, pass, routing, cache.inner);
    if (!draws) return;
    inner_.check(logits.cols());
    set_shape(cache.noisy, logits.rows(), logits.cols());
    noise_.fill(pass, MatrixOut<T>(cache.noisy));
    scale_rows<T>(static_cast<T>(config_.scale), cache.noisy, cache.noisy);
    add_rows<T>(logits, cache.noisy, cache.noisy);
    if (config_.certain > 0) prefer_certain(routing, cache.noisy);
    inner_.forward(cache.noisy, pass, routing, cache.inner);
    cache.choice.record(routing);
    inner_.forward_imposed(logits, pass, cache.choice, routing, cache.inner);
    expect_finite_weights("SampledChoice", routing);
  }

  /// `forward` with an imposed choice, see Replay: nothing is drawn.
  void forward_imposed(MatrixIn<T> logits, const Pass& pass, const RoutingTrace& imposed,
                       Routing<T>& routing, Cache& cache) const {
    inner_.forward_imposed(logits, pass, imposed, routing, cache.inner);
  }

  const SampledChoiceConfig& config() const { return config_; }

 private:
  /// Lifts the first experts of each token above all others. Not by much: the inner selector is to
  /// tell the others apart.
  void prefer_certain(const Routing<T>& routing, Matrix<T>& noisy) const {
    routing.rows.for_each_real(2 * routing.experts(), [&](Index t) {
      T top = std::numeric_limits<T>::lowest();
      for (Index e = 0; e < routing.experts(); ++e) {
        if (!routing.is_forbidden(t, e)) top = std::max(top, noisy(t, e));
      }
      top += T(1) + T(8) * std::numeric_limits<T>::epsilon() * std::abs(top);
      const Index last = std::min(routing.last(t), routing.first(t) + config_.certain);
      for (Index a = routing.first(t); a < last; ++a) noisy(t, routing.expert[a]) = top;
    });
  }

  using SelectorWrapper<Inner>::inner_;
  SampledChoiceConfig config_;
  Noise noise_;
};

}  // namespace weir
