// SPDX-License-Identifier: MIT
/// \file
/// Experts that every token visits, beside the routed ones: DeepSeekMoE, Qwen2-MoE.
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <string_view>
#include <utility>

#include <weir/core/layer.hpp>
#include <weir/core/meanwhile.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/nn/linear.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of SharedExperts: what the terms of the sum are multiplied by.
struct SharedExpertsConfig {
  double routed_weight = 1.0;
  double shared_weight = 1.0;

  /// The mean of k routed experts, whose weights sum to 1, and the shared one:
  ///
  ///     y = k / (k + 1) moe(x) + 1 / (k + 1) shared(x)
  ///
  /// (MegaBlocks, `shared_expert_weighted_sum`.)
  /// \throws ConfigError  if k is below 1.
  static SharedExpertsConfig weighted_sum(Index k) {
    expect_at_least<Index>("SharedExpertsConfig::weighted_sum", "k", k, 1);
    const auto count = static_cast<double>(k);
    return {count / (count + 1.0), 1.0 / (count + 1.0)};
  }

  /// \throws ConfigError  unless both weights are finite.
  void check() const {
    expect_finite("SharedExperts", "routed_weight", routed_weight);
    expect_finite("SharedExperts", "shared_weight", shared_weight);
  }

  /// Whether both terms are taken as they are.
  bool is_plain_sum() const { return routed_weight == 1.0 && shared_weight == 1.0; }
};

/// A mixture of experts `Moe` with a dense network `Shared` beside it:
///
///     y = moe(x) + shared(x)                       DeepSeekMoE
///     y = moe(x) + sigmoid(x w_s^T) shared(x)      with a gate, w_s [1, d_model]: Qwen2-MoE
///
/// n shared experts of width f are one network of width n f: exactly their sum.
/// (Dai et al. 2024, arXiv:2401.06066, eq. 9-11.) Both terms may have a constant factor, see
/// SharedExpertsConfig. Where tokens travel to experts on other machines, the shared ones are
/// computed on the way, see Meanwhile.
template <Layer Moe, Layer Shared>
class SharedExperts {
 public:
  using Scalar = typename Moe::Scalar;
  using T = Scalar;

  struct Cache {
    CacheState state;
    typename Moe::Cache moe;
    typename Shared::Cache shared;
    typename Linear<T>::Cache gate;
    Matrix<T> open;        ///< [tokens, 1], the gate after its sigmoid.
    Matrix<T> shared_out;  ///< [tokens, d_model], kept where there is a gate.
    Matrix<T> y, dx, d_routed, d_shared, d_gate;
  };

  /// \throws ConfigError  unless the weights are finite.
  SharedExperts(Moe moe, Shared shared, SharedExpertsConfig config = {})
      : config_(config), moe_(std::move(moe)), shared_(std::move(shared)) {
    config_.check();
  }

  /// \param gate     A linear map d_model -> 1, the logit of the gate.
  /// \throws ConfigError  if it has another shape, or unless the weights are finite.
  SharedExperts(Moe moe, Shared shared, Linear<T> gate, SharedExpertsConfig config = {})
      : SharedExperts(std::move(moe), std::move(shared), config) {
    gate_.emplace(std::move(gate));
    if (gate_->d_in() != moe_.d_model() || gate_->d_out() != 1) {
      throw_error<ConfigError>("SharedExperts: the gate is [", gate_->d_out(), ", ", gate_->d_in(),
                               "], expected [1, ", moe_.d_model(), "]");
    }
  }

  /// \param x        [tokens, d_model]. The shared experts compute padding too.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    const Matrix<T>* shared_out = nullptr;
    const auto compute_shared = [&] { shared_out = &forward_shared(x, pass, cache); };
    Meanwhile beside(compute_shared);
    const Matrix<T>& routed = moe_.forward(x, pass, cache.moe);
    beside.finish();
    const Matrix<T>& shared = *shared_out;
    expect_shape("SharedExperts::forward", "the shared experts' output", shared, routed.rows(),
                 routed.cols());
    set_shape(cache.y, routed.rows(), routed.cols());
    if (gate_) {
      forward_gated(x, routed, shared, pass, cache);
    } else if (config_.is_plain_sum()) {
      add_rows<T>(routed, shared, cache.y);
    } else {
      parallel_pieces(routed.rows(), routed.cols(), 3, [&](Index t, Index col, Index count) {
        loops::blend(count, routed_weight(), &routed(t, col), shared_weight(), &shared(t, col),
                     &cache.y(t, col));
      });
    }
    return cache.state.finish(*this, pass, cache.y);
  }

  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, the mixture's auxiliary losses included.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    cache.state.begin_backward("SharedExperts::backward", *this, dy);
    const Matrix<T>* through_shared = nullptr;
    const auto compute_shared = [&] {
      if (gate_) backward_gate(dy, cache);
      const Eigen::Ref<const Matrix<T>> d_shared =
          gate_ ? Eigen::Ref<const Matrix<T>>(cache.d_shared)
                : scaled(shared_weight(), dy, cache.d_shared);
      through_shared = &shared_.backward(d_shared, cache.shared);
    };
    Meanwhile beside(compute_shared);
    const Matrix<T>& d_routed =
        moe_.backward(scaled(routed_weight(), dy, cache.d_routed), cache.moe);
    beside.finish();
    set_shape(cache.dx, d_routed.rows(), d_routed.cols());
    add_rows<T>(d_routed, *through_shared, cache.dx);
    if (gate_) add_rows<T>(cache.dx, gate_->backward(cache.d_gate, cache.gate), cache.dx);
    return cache.dx;
  }

  /// The mixture's members, `shared.*` and, with a gate, `shared_gate.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.moe_);
    visit("shared", self.shared_);
    if (self.gate_) visit("shared_gate", *self.gate_);
  }
  /// The gate keeps full precision in every storage.
  template <class Self, class Visit>
  static void visit_stored(Self& self, Visit& visit) {
    visit("", self.moe_);
    visit("shared", self.shared_);
  }

  Index d_model() const { return moe_.d_model(); }
  Index experts() const requires HasExperts<Moe> { return moe_.experts(); }
  const SharedExpertsConfig& config() const { return config_; }

  Moe& moe() { return moe_; }
  const Moe& moe() const { return moe_; }
  Shared& shared() { return shared_; }
  const Shared& shared() const { return shared_; }

 private:
  T routed_weight() const { return static_cast<T>(config_.routed_weight); }
  T shared_weight() const { return static_cast<T>(config_.shared_weight); }

  const Matrix<T>& forward_shared(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    const PassRecord::Scope scope(pass.record, "shared");
    return shared_.forward(x, pass, cache.shared);
  }

  void forward_gated(MatrixIn<T> x, const Matrix<T>& routed, const Matrix<T>& shared,
                     const Pass& pass, Cache& cache) const {
    cache.open = gate_->forward(x, pass, cache.gate).unaryExpr([](T z) {
      return T(1) / (T(1) + std::exp(-z));
    });
    set_shape(cache.shared_out, shared.rows(), shared.cols());
    parallel_rows(x.rows(), 3 * x.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        loops::blend(routed.cols(), routed_weight(), &routed(t, 0),
                     shared_weight() * cache.open(t, 0), &shared(t, 0), &cache.y(t, 0));
        std::copy_n(&shared(t, 0), shared.cols(), &cache.shared_out(t, 0));
      }
    });
  }

  /// The gradients of the gate's logit and of the shared experts' output.
  void backward_gate(MatrixIn<T> dy, Cache& cache) const {
    set_shape(cache.d_gate, dy.rows(), 1);
    set_shape(cache.d_shared, dy.rows(), dy.cols());
    parallel_rows(dy.rows(), 4 * dy.cols(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        const T open = cache.open(t, 0);
        const T* const d = &dy.coeffRef(t, 0);
        cache.d_gate(t, 0) = shared_weight() *
                             loops::dot<T>(dy.cols(), d, &cache.shared_out(t, 0)) * open *
                             (T(1) - open);
        loops::scale(dy.cols(), shared_weight() * open, d, &cache.d_shared(t, 0));
      }
    });
  }

  /// factor * dy, in `space` unless it is dy.
  static Eigen::Ref<const Matrix<T>> scaled(T factor, MatrixIn<T> dy, Matrix<T>& space) {
    if (factor == T(1)) return dy;
    scale_rows<T>(factor, dy, space);
    return space;
  }

  SharedExpertsConfig config_;
  Moe moe_;
  Shared shared_;
  std::optional<Linear<T>> gate_;
};

}  // namespace weir
