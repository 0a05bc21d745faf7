// SPDX-License-Identifier: MIT
/// \file
/// A recorded choice of experts instead of the selector's own: routing replay.
#pragma once

#include <utility>

#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/routing_trace.hpp>
#include <weir/moe/selector/around/selector_wrapper.hpp>
#include <weir/moe/selector/k_best.hpp>

namespace weir {

/// Settings of Replay.
struct ReplayConfig {
  bool kept = true;  ///< Whether what the trace dropped is dropped again, before the capacity
                     ///< policy sees it.
};

/// Any selector of the k best, on which the choice of another pass can be imposed: the experts are
/// those of the trace, everything else is made of this pass's logits,
///
///     S_t = the trace's,    g_te, p_te = the inner selector's formulas for S_t and z_t
///
/// in the gradient too. What the inner selector makes of all logits (the softmax, the
/// probabilities of balancers) it still makes of all, as Megatron-Core does, so that a weight may
/// be smaller than that of an expert that is not in S_t. Over TopKSoftmax, and SoftmaxTopK if
/// renormalised, the weights are a softmax over the recorded experts alone: rollout routing replay,
/// by which training uses the experts that generation, whose arithmetic differs, has used. The
/// inner selector's group limit and bias have no say in S_t. Without a trace, Replay is its inner
/// selector.
///
/// A token's experts are listed by what the inner selector would choose by, best first, whatever
/// their order in the trace: a pass's own trace gives the same bits. What was dropped in the trace
/// is dropped (ReplayConfig::kept); the layer's capacity policy comes after that, and may drop
/// more. The choice is constant to the derivative. Causal if the trace is.
///
/// (Ma et al. 2025, arXiv:2510.11370; Megatron-Core, router_replay.py.)
template <ImposableSelector Inner>
class Replay : public SelectorWrapper<Inner> {
 public:
  using T = typename Inner::Scalar;
  using typename SelectorWrapper<Inner>::Cache;

  /// The trace comes later, see `impose`.
  explicit Replay(Inner inner, ReplayConfig config = {})
      : SelectorWrapper<Inner>(std::move(inner)), config_(config) {}

  /// Imposes a copy of the trace on all passes from now on. Allocates only if it is larger than
  /// those before.
  void impose(const RoutingTrace& trace) {
    trace_ = trace;
    imposing_ = true;
  }

  /// Lets the inner selector choose again.
  void release() { imposing_ = false; }

  bool imposing() const { return imposing_; }

  /// \param logits   [tokens, experts]
  /// \throws ConfigError     as the inner selector; if a token does not have k experts in the
  ///                         trace, padding none, or if pass.allowed forbids one of them.
  /// \throws ShapeError      if the trace has another number of tokens or experts.
  /// \throws NonFiniteError  as the inner selector; if a weight that it makes is not finite.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const {
    if (!imposing_) return inner_.forward(logits, pass, routing, cache.inner);
    inner_.forward_imposed(logits, pass, trace_, routing, cache.inner);
    expect_finite_weights("Replay", routing);
    if (!config_.kept) return;
    for (Index t = 0; t < routing.tokens(); ++t) {
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        if (!kept(t, routing.expert[a])) routing.kept[a] = 0;
      }
    }
  }

  /// It is not saved with the buffers.
  const RoutingTrace& trace() const { return trace_; }
  const ReplayConfig& config() const { return config_; }

 private:
  bool kept(Index t, Index expert) const {
    Index a = trace_.first(t);
    while (trace_.expert(a) != expert) ++a;
    return trace_.kept(a);
  }

  using SelectorWrapper<Inner>::inner_;
  ReplayConfig config_;
  RoutingTrace trace_;
  bool imposing_ = false;
};

}  // namespace weir
