// SPDX-License-Identifier: MIT
/// \file
/// The roles in a mixture of experts. Any type that satisfies a concept plugs into MoELayer;
/// nothing has to be derived from or registered.
#pragma once

#include <concepts>
#include <span>

#include <weir/core/layer.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Scores every expert for every token: a layer [tokens, d_model] -> [tokens, experts].
template <class R>
concept Router = Layer<R> && requires(const R& router) {
  { router.d_model() } -> std::convertible_to<Index>;
  { router.experts() } -> std::convertible_to<Index>;
};

/// The loss that a router has of its own: `aux_loss` in its cache, scaled by its coefficient and by
/// pass.aux_scale, which its `backward` differentiates; or that of the router in it, whose cache is
/// `inner`; 0 if there is none.
template <class T, class Cache>
T aux_loss_of_router(const Cache& cache) {
  if constexpr (requires { cache.aux_loss; }) {
    return cache.aux_loss;
  } else if constexpr (requires { cache.inner; }) {
    return aux_loss_of_router<T>(cache.inner);
  } else {
    return T(0);
  }
}

/// A router that adds noise to its logits, and lets balancers know of it.
///
///     void annotate(const Cache&, Routing<T>&) const;      sets clean_logits, noise_std and noisy
///                                            if the last pass drew noise; if it has two levels,
///                                            group_noise, group_noise_std and groups as well
///     void receive(const RoutingGradient<T>&, Cache&) const;      takes the gradients of these
///                                            matrices, before `backward` is given that of the
///                                            logits
template <class R>
concept AnnotatingRouter = requires(const R& router, typename R::Cache& cache,
                                    Routing<typename R::Scalar>& routing,
                                    const RoutingGradient<typename R::Scalar>& gradient) {
  router.annotate(cache, routing);
  router.receive(gradient, cache);
};

/// Turns logits into a routing, and gradients of its weights and probabilities back into gradients
/// of the logits.
///
///     void check(Index experts) const;       throws ConfigError if it cannot serve that many
///     void select(MatrixIn<T> logits, const Pass&, Routing<T>&) const;
///     void backward(const Routing<T>&, RoutingGradient<T>&) const;      adds to gradient.logits,
///                                            may overwrite gradient.weights and .probabilities
template <class S, class T>
concept Selector = requires(const S& selector, MatrixIn<T> logits, const Pass& pass,
                            Routing<T>& routing, RoutingGradient<T>& gradient, Index experts) {
  selector.check(experts);
  selector.select(logits, pass, routing);
  selector.backward(routing, gradient);
};

/// Bounds how many tokens an expert takes: clears `kept` of the assignments beyond, and never
/// reorders. One that learns from the load has `observe(routing)`, called once for each backward
/// pass, and `update()`, called by MoELayer::update; its buffers are visited.
template <class C, class T>
concept CapacityPolicy = requires(const C& capacity, Routing<T>& routing) {
  capacity.check();
  capacity.apply(routing);
};

/// All experts of a layer as one object. `forward` gives [tokens, d_out], the weighted sum of what
/// the experts make of the rows of x [tokens, d_in] that `dispatch` sends them; `backward` returns
/// dL/dx and sets `d_weight[a]` to dL/d(weight) of each assignment a that has a slot. Both return
/// references to matrices that live in the cache. `visit` names the members of expert e "e.*".
template <class B>
concept ExpertBank = requires(const B& bank, B& trained, MatrixIn<typename B::Scalar> x,
                              const Dispatch<typename B::Scalar>& dispatch,
                              std::span<typename B::Scalar> d_weight, typename B::Cache& cache,
                              Collector<typename B::Scalar>& collector) {
  { bank.experts() } -> std::convertible_to<Index>;
  { bank.d_in() } -> std::convertible_to<Index>;
  { bank.d_out() } -> std::convertible_to<Index>;
  { bank.forward(x, dispatch, cache) } -> std::same_as<const Matrix<typename B::Scalar>&>;
  {
    trained.backward(x, dispatch, d_weight, cache)
    } -> std::same_as<const Matrix<typename B::Scalar>&>;
  B::visit(trained, collector);
};

/// A balancer that is a term of the training objective.
///
///     T loss(const Routing<T>&) const;                                  scaled by its coefficient
///     void add_gradient(const Routing<T>&, RoutingGradient<T>&) const;
template <class B, class T>
concept BalancingLoss = requires(const B& balancer, const Routing<T>& routing,
                                 RoutingGradient<T>& gradient) {
  { balancer.loss(routing) } -> std::convertible_to<T>;
  balancer.add_gradient(routing, gradient);
};

/// A balancer that acts on the selector between optimizer steps. `observe` is called once for each
/// backward pass, `update(selector)` when the user calls MoELayer::update.
template <class B, class T>
concept BalancingRule = requires(B& balancer, const Routing<T>& routing) {
  balancer.observe(routing);
};

/// A term of the training objective that looks at the parameters of the router, not at a routing:
/// it is the same for any tokens, also for none.
///
///     T router_loss(const R&) const;                       scaled by its coefficient
///     void add_router_gradient(R&, T scale) const;         adds `scale` times its gradient to that
///                                            of the parameters, of frozen ones as of others
///
/// It may have `check_router(router)`, as any balancer or selector may, which throws ConfigError if
/// it does not fit the router.
template <class B, class R>
concept RouterLoss = requires(const B& balancer, const R& router, R& trained,
                              typename R::Scalar scale) {
  { balancer.router_loss(router) } -> std::convertible_to<typename R::Scalar>;
  balancer.add_router_gradient(trained, scale);
};

/// Keeps the load level. Its name in reports is `B::kName`, if it has one.
template <class B, class T>
concept Balancer = BalancingLoss<B, T> || BalancingRule<B, T>;

/// What a layer with the router R takes as a balancer.
template <class B, class R>
concept BalancerFor = Balancer<B, typename R::Scalar> || RouterLoss<B, R>;

}  // namespace weir
