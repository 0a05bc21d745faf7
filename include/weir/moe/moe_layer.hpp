// SPDX-License-Identifier: MIT
/// \file
/// The mixture-of-experts layer: a router, a selector, a capacity policy, experts and balancers.
#pragma once

#include <concepts>
#include <utility>

#include <weir/core/cache_state.hpp>
#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/report.hpp>
#include <weir/moe/balancers.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// A sparsely gated mixture of experts (Shazeer et al. 2017, arXiv:1701.06538, eq. 1):
///
///     y_t = sum_{e in S_t, kept} g_te E_e(x_t)
///
///     x -> router -> logits -> selector -> routing -> capacity -> dispatch -> experts -> y
///                       '------------> balancers <------'
///
/// The router scores the experts, the selector chooses S_t and the weights g_t, the capacity policy
/// drops what an expert cannot take, and the bank computes and combines the rest. A token whose
/// experts are all dropped yields zero, as does padding: the residual around the layer carries it.
///
/// Kinds are types, deduced from the constructor's arguments; numbers are run-time settings:
///
///     MoELayer moe(LinearRouter<float>(64, 8, rng), TopKSoftmax<float>({.k = 2}), Dropless(),
///                  GluBank<float>(64, 8, 128, rng), SwitchLoss<float>(), ZLoss<float>());
///
/// `backward` differentiates the caller's loss plus the auxiliary losses of the balancers, of the
/// router, and of mixtures among the experts, all times `pass.aux_scale`. Their values go to
/// `pass.record`. A RouterLoss, which looks at parameters alone, counts once for all micro-batches
/// of a batch if their scales sum to one.
template <class R, class S, class C, class B, class... L>
class MoELayer {
 public:
  using Scalar = typename R::Scalar;
  using T = Scalar;

  static_assert(Router<R>, "the first argument of MoELayer has to be a Router, see RouterBase");
  static_assert(Selector<S, T>,
                "the second argument of MoELayer has to be a Selector of the "
                "router's scalar, see SelectorBase");
  static_assert(CapacityPolicy<C, T>,
                "the third argument of MoELayer has to be a CapacityPolicy, see CapacityBase");
  static_assert(ExpertBank<B>, "the fourth argument of MoELayer has to be an ExpertBank");
  static_assert(std::same_as<T, typename B::Scalar>, "router and bank differ in their scalar");

  struct Cache {
    CacheState state;
    typename R::Cache router;
    typename S::Cache selector;
    typename C::template Cache<T> capacity;
    typename B::Cache bank;
    typename Balancers<R, S, L...>::Cache balancers;
    Routing<T> routing;
    Dispatch<T> dispatch;
    RoutingGradient<T> gradient;
    PassRecord record;  ///< What the last forward pass recorded.
    Matrix<T> x;        ///< The input without padding; only used if there is padding.
    Index changes = 0;  ///< How often the layer's experts had been changed.
    Matrix<T> dx;
  };

  /// \throws ConfigError  if router and bank differ in the number of experts or in width, or if a
  ///                      part's settings are out of range.
  MoELayer(R router, S selector, C capacity, B bank, L... balancers)
      : router_(std::move(router)),
        selector_(std::move(selector)),
        capacity_(std::move(capacity)),
        bank_(std::move(bank)),
        balancers_(std::move(balancers)...) {
    if (router_.experts() != bank_.experts()) {
      throw_error<ConfigError>("MoELayer: the bank has ", bank_.experts(), " experts, expected ",
                               router_.experts(), " as the router");
    }
    if (router_.d_model() != bank_.d_in()) {
      throw_error<ConfigError>("MoELayer: the bank takes ", bank_.d_in(), " features, expected ",
                               router_.d_model(), " as the router");
    }
    check();
  }

  /// \param x        [tokens, d_model]; any number of tokens, also none.
  /// \return         [tokens, d_out of the bank].
  /// \throws ShapeError      if x, pass.mask or pass.sequences do not fit.
  /// \throws ConfigError     if a part's settings are out of range.
  /// \throws NonFiniteError  if the router gives a real token a logit that is not finite.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    expect_columns("MoELayer::forward", "x", x, d_model());
    pass.check("MoELayer::forward", x.rows());
    check();
    cache.record.restart(pass.record);
    Pass own = pass;
    own.record = pass.has_aux_losses() || pass.record != nullptr ? &cache.record : nullptr;
    const Matrix<T>& logits = *PassRecord::within(own.record, "router", [&] {
      return &router_.forward(without_padding<T>(x, pass.mask, cache.x), own, cache.router);
    });
    selector_.forward(logits, own, cache.routing, cache.selector);
    cache.routing.noise = router_.noise(cache.router);
    capacity_.forward(own, cache.routing, cache.capacity);
    cache.dispatch.build(cache.routing);
    const Matrix<T>& y = *PassRecord::within(
        own.record, "experts", [&] { return &bank_.forward(x, cache.dispatch, own, cache.bank); });
    balancers_.forward(cache.routing, router_, own, cache.balancers);
    if (pass.record != nullptr) {
      pass.record->add(cache.record);
      if (pass.record->wants_reports()) pass.record->add_report(report(cache));
      pass.record->show(cache.routing, pass);
    }
    cache.changes = changes_;
    return cache.state.finish(*this, pass, y);
  }

  /// \param dy       dL/dy, as `forward` returned y; for the pass that filled `cache` last.
  /// \return         dL/dx, the auxiliary losses included.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    if (cache.state.is_filled() && cache.changes != changes_) {
      throw_error<StateError>(
          "MoELayer::backward: the experts were changed since the forward pass, expected a new "
          "one");
    }
    cache.state.begin_backward("MoELayer::backward", *this, dy);
    Routing<T>& routing = cache.routing;
    RoutingGradient<T>& d = cache.gradient;
    routing.noise = router_.noise(cache.router);  // The cache may have been moved.
    d.reset(routing);

    const Matrix<T>& through_experts = bank_.backward(
        dy, cache.dispatch, span_of(d.weights.data(), routing.assignments()), cache.bank);
    capacity_.backward(routing, d, cache.capacity);
    balancers_.backward(routing, router_, d, cache.balancers);
    selector_.backward(routing, d, cache.selector);
    router_.add_noise_gradient(d.noise, cache.router);
    set_shape(cache.dx, dy.rows(), d_model());
    add_rows<T>(through_experts, router_.backward(d.logits, cache.router), cache.dx);
    capacity_.observe(routing);
    balancers_.observe(routing);
    return cache.dx;
  }

  /// Changes the experts, and what router and selector have for each. What balancers counted since
  /// the last step is forgotten.
  /// \throws ConfigError  if the map does not fit a part, or a part does not serve that many
  ///                      experts. In this case, and after any other exception, nothing has
  ///                      changed.
  /// \throws StateError   as the bank.
  void change_experts(const ExpertMap& map) requires requires(R& r, B& b) {
    r.remap_experts(map);
    b.remap_experts(map);
  }
  {
    map.check("MoELayer::change_experts", experts());
    MoELayer next = *this;
    next.router_.remap_experts(map);
    if constexpr (requires { next.selector_.remap_experts(map); }) {
      next.selector_.remap_experts(map);
    }
    next.bank_.remap_experts(map);
    next.check();
    next.balancers_.forget();
    ++next.changes_;
    *this = std::move(next);
  }

  /// Lets each token have k experts from the next pass on.
  /// \throws ConfigError  if the selector, or another part, cannot serve that. Nothing has changed
  ///                      then.
  void set_active_experts(Index k) requires requires(S& s) { s.set_k(k); }
  {
    S next = selector_;
    next.set_k(k);
    next.check(experts());
    next.check_router(router_);
    selector_ = std::move(next);
    ++changes_;
  }

  /// Lets the balancing rules act on the selector; `weir::update` calls it.
  void update_self() { balancers_.update(selector_); }

  /// What the last forward pass with `cache` did. The losses are scaled by its aux_scale.
  LayerReport report(const Cache& cache) const { return report_of(cache.routing, cache.record); }

  /// Members `router.*`, `selector.*`, `capacity.*`, `experts.*` and `balancers.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("router", self.router_);
    visit("selector", self.selector_);
    visit("capacity", self.capacity_);
    visit("experts", self.bank_);
    visit("balancers", self.balancers_);
  }

  Index d_model() const { return router_.d_model(); }
  Index experts() const { return router_.experts(); }
  R& router() { return router_; }
  const R& router() const { return router_; }
  S& selector() { return selector_; }
  const S& selector() const { return selector_; }
  C& capacity() { return capacity_; }
  const C& capacity() const { return capacity_; }
  B& bank() { return bank_; }
  const B& bank() const { return bank_; }

  /// Balancer number `i`, in the constructor's order.
  template <std::size_t i>
  auto& balancer() {
    return balancers_.template get<i>();
  }
  template <std::size_t i>
  const auto& balancer() const {
    return balancers_.template get<i>();
  }

 private:
  void check() const {
    selector_.check(router_.experts());
    selector_.check_router(router_);
    capacity_.check();
    balancers_.check(router_);
  }

  R router_;
  S selector_;
  C capacity_;
  B bank_;
  Balancers<R, S, L...> balancers_;
  Index changes_ = 0;  // Of the experts or their number for a token.
};

}  // namespace weir
