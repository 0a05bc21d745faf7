// SPDX-License-Identifier: MIT
/// \file
/// The balancers of one mixture of experts.
#pragma once

#include <string>
#include <tuple>
#include <utility>

#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

/// Runs any number of balancers of a layer with the router R and the selector S. Losses are added
/// to the record of the pass by name. They are differentiated even if the pass has no record,
/// unless it has no auxiliary losses.
template <class R, class S, class... B>
class Balancers {
 public:
  using T = typename R::Scalar;

  static_assert((Balancer<B, R> && ...),
                "the arguments of MoELayer behind the bank have to be Balancers: losses of the "
                "routing or of the router's parameters, or rules with observe and update; see "
                "moe/concepts.hpp");
  static_assert(
      ((!ObservingBalancer<B, T> || BalancingRule<B, S>)&&...),
      "a balancing rule cannot act on the selector: BiasBalance needs one with a selection "
      "bias, such as SigmoidTopK or BiasedSoftmaxTopK, and QuantileBalance one that adds "
      "its bias to the logits, such as BiasedSoftmaxTopK");

  struct Cache {
    std::tuple<typename B::Cache...> each;
    double scale = 0.0;  ///< pass.aux_scale of the last forward pass; 0 if it had no losses.
  };

  explicit Balancers(B... balancers) : balancers_(std::move(balancers)...) {}

  /// \throws ConfigError  if a balancer's settings are out of range, or do not fit the router.
  void check(const R& router) const {
    for_each(*this, [&](const auto& balancer) {
      balancer.check();
      balancer.check_router(router);
    });
  }

  void forward(const Routing<T>& routing, const R& router, const Pass& pass, Cache& cache) const {
    cache.scale = pass.has_aux_losses() ? pass.aux_scale : 0.0;
    if (cache.scale == 0.0) return;
    for_each_with_cache(*this, cache, [&](const auto& balancer, auto& own) {
      using Own = std::remove_cvref_t<decltype(balancer)>;
      double loss = 0.0;
      if constexpr (RoutingLoss<Own, T>) {
        loss += static_cast<double>(balancer.forward(routing, own));
      }
      if constexpr (RouterLoss<Own, R>) loss += static_cast<double>(balancer.forward(router, own));
      if constexpr (RoutingLoss<Own, T> || RouterLoss<Own, R>) {
        if (pass.record != nullptr) pass.record->add_loss(Own::kName, cache.scale * loss);
      }
    });
  }

  /// Adds the gradients of the losses to those of the routing and of the router's parameters.
  void backward(const Routing<T>& routing, R& router, RoutingGradient<T>& gradient,
                Cache& cache) const {
    if (cache.scale == 0.0) return;
    for_each_with_cache(*this, cache, [&](const auto& balancer, auto& own) {
      using Own = std::remove_cvref_t<decltype(balancer)>;
      if constexpr (RoutingLoss<Own, T>) balancer.backward(routing, cache.scale, gradient, own);
      if constexpr (RouterLoss<Own, R>) balancer.backward(router, cache.scale, own);
    });
  }

  /// Shows a routing to the rules, which count it.
  void observe(const Routing<T>& routing) {
    for_each(*this, [&](auto& balancer) {
      using Own = std::remove_cvref_t<decltype(balancer)>;
      if constexpr (ObservingBalancer<Own, T>) balancer.observe(routing);
    });
  }

  /// Lets the rules act on the selector.
  void update(S& selector) {
    for_each(*this, [&](auto& balancer) {
      using Own = std::remove_cvref_t<decltype(balancer)>;
      if constexpr (BalancingRule<Own, S>) balancer.update(selector);
    });
  }

  /// Lets the rules forget what they counted since the last step.
  void forget() {
    for_each(*this, [](auto& balancer) {
      if constexpr (requires { balancer.discard_self(); }) balancer.discard_self();
    });
  }

  /// The members of balancer number i, in the constructor's order, as `i.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    Index i = 0;
    for_each(self, [&](auto& balancer) { visit(std::to_string(i++), balancer); });
  }

  template <std::size_t i>
  auto& get() {
    return std::get<i>(balancers_);
  }
  template <std::size_t i>
  const auto& get() const {
    return std::get<i>(balancers_);
  }

 private:
  template <class Self, class Body>
  static void for_each(Self& self, Body&& body) {
    std::apply([&](auto&... balancer) { (body(balancer), ...); }, self.balancers_);
  }

  template <class Self, class Body>
  static void for_each_with_cache(Self& self, Cache& cache, Body&& body) {
    std::apply(
        [&](auto&... balancer) {
          std::apply([&](auto&... own) { (body(balancer, own), ...); }, cache.each);
        },
        self.balancers_);
  }

  std::tuple<B...> balancers_;
};

}  // namespace weir
