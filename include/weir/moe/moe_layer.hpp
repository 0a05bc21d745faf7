// SPDX-License-Identifier: MIT
/// \file
/// The mixture-of-experts layer, composed of a router, a selector, a capacity policy, a bank of
/// experts and any number of balancers.
#pragma once

#include <concepts>
#include <span>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/layer.hpp>
#include <weir/moe/capacity/renormalise_kept.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/report.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// A sparsely gated mixture of experts:
///
///     y_t = sum_{e in S_t, kept} g_te E_e(x_t)
///
///     x -> router -> logits -> selector -> routing -> capacity -> dispatch -> experts -> y
///                       '------------> balancers <------'
///
/// The router scores the experts, the selector chooses S_t and the weights g_t, the capacity policy
/// drops what an expert cannot take, and the bank computes and combines the rest. A token all of
/// whose experts are dropped, and padding, yield zero: the residual around the layer carries them.
/// (Shazeer et al. 2017, arXiv:1701.06538, eq. 1.)
///
/// Kinds are types, deduced from the constructor's arguments; numbers are run-time settings:
///
///     MoELayer moe(LinearRouter<float>(64, 8, rng), TopKSoftmax<float>{.k = 2}, Dropless{},
///                  GluBank<float>(8, 64, 128, rng), SwitchLoss<float>{}, ZLoss<float>{});
///
/// The loss that `backward` differentiates is the caller's plus `cache.aux_loss`, the sum of the
/// balancers' losses times `pass.aux_scale`. A RouterLoss, which looks at parameters alone, is one
/// of them: with a batch split into micro-batches it counts once, if their scales sum to one. A
/// loss that the router has of its own is added (see aux_loss_of_router). With `pass.aux_scale` =
/// 0, as for inference, no loss is computed.
template <class R, class S, class C, class B, class... L>
class MoELayer {
 public:
  using Scalar = typename R::Scalar;
  using T = Scalar;

  static_assert(Router<R>, "the first argument of MoELayer has to be a Router");
  static_assert(Selector<S, T>, "the second argument of MoELayer has to be a Selector");
  static_assert(CapacityPolicy<C, T>, "the third argument of MoELayer has to be a CapacityPolicy");
  static_assert(ExpertBank<B>, "the fourth argument of MoELayer has to be an ExpertBank");
  static_assert(
      (BalancerFor<L, R> && ...),
      "the other arguments of MoELayer have to be Balancers, or RouterLosses of its router");
  static_assert(std::same_as<T, typename B::Scalar>, "router and bank differ in their scalar");

  struct Cache {
    typename R::Cache router;
    Routing<T> routing;
    Dispatch<T> dispatch;
    typename B::Cache bank;
    RoutingGradient<T> gradient;
    std::vector<T> d_weight;
    Matrix<T> x;  ///< Only where there is padding, or where dropped tokens are passed through.
    Matrix<T> y, scaled_dy, dx;
    T aux_loss = T(0);   ///< Sum of the balancers' losses, times pass.aux_scale, and the router's.
    T aux_scale = T(1);  ///< pass.aux_scale of the last forward pass.
    bool filled = false;
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
      fail<ConfigError>("MoELayer: the bank has ", bank_.experts(), " experts, expected ",
                        router_.experts(), " as the router");
    }
    if (router_.d_model() != bank_.d_in()) {
      fail<ConfigError>("MoELayer: the bank takes ", bank_.d_in(), " features, expected ",
                        router_.d_model(), " as the router");
    }
    check();
  }

  /// Inference: no capacity for training, no noise. Keeps nothing.
  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \param x        [tokens, d_model]; any number of tokens, also none.
  /// \return         [tokens, d_out of the bank].
  /// \throws ShapeError      if x, pass.mask or pass.sequences do not fit.
  /// \throws ConfigError     if a part's settings are out of range, or if dropped tokens are to be
  ///                         passed through a bank that changes their width.
  /// \throws NonFiniteError  if the router gives a real token a logit that is not finite.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    expect_columns("MoELayer::forward", "x", x, router_.d_model());
    pass.check("MoELayer::forward", x.rows());
    cache.filled = false;
    check();
    if (pass.mask.empty()) {
      selector_.select(apply(router_, x, pass, cache.router), pass, cache.routing);
    } else {
      // Padding may hold anything, and 0 * NaN would spoil the gradient of the router's weight.
      copy_rows<T>(x, cache.x);
      for (Index t = 0; t < x.rows(); ++t) {
        if (pass.is_padding(t)) cache.x.row(t).setZero();
      }
      selector_.select(apply(router_, cache.x, pass, cache.router), pass, cache.routing);
    }
    if constexpr (AnnotatingRouter<R>) router_.annotate(cache.router, cache.routing);
    capacity_.apply(cache.routing);
    if (cache.routing.pass_dropped && bank_.d_out() != d_model()) {
      fail<ConfigError>("MoELayer::forward: the bank yields ", bank_.d_out(),
                        " features, expected ", d_model(),
                        " where dropped tokens are passed through");
    }
    cache.dispatch.build(cache.routing);
    const Matrix<T>& y = bank_.forward(x, cache.dispatch, cache.bank);

    cache.aux_scale = static_cast<T>(pass.aux_scale);
    cache.aux_loss = T(0);
    if (cache.aux_scale != T(0)) {
      for_each_loss(
          [&](const auto& balancer) { cache.aux_loss += loss_of(balancer, cache.routing); });
      cache.aux_loss *= cache.aux_scale;
      cache.aux_loss += aux_loss_of_router<T>(cache.router);
    }
    cache.filled = true;
    const T scale = cache.routing.output_scale;
    if (scale == T(1) && !cache.routing.pass_dropped) return y;

    copy_rows<T>(y, cache.y);
    if (scale != T(1)) cache.y *= scale;
    if (!cache.routing.pass_dropped) return cache.y;
    copy_rows<T>(x, cache.x);
    for_each_dropped(cache.routing, [&](Index t, std::size_t a) {
      cache.y.row(t) += cache.routing.weight[a] * x.row(t);
    });
    return cache.y;
  }

  /// \param dy       dL/dy, as `forward` returned y; for the pass that filled `cache` last.
  /// \return         dL/dx, the balancers' losses included.
  /// \throws StateError   if the last forward pass with `cache` did not succeed, or there was none.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    if (!cache.filled) {
      fail<StateError>("MoELayer::backward: the cache is empty, expected a forward pass before");
    }
    const Routing<T>& routing = cache.routing;
    expect_shape("MoELayer::backward", "dy", dy, routing.tokens(), bank_.d_out());

    cache.gradient.reset(routing);
    const bool has_losses = cache.aux_scale != T(0);
    for_each_loss([&](const auto& balancer) {
      if constexpr (BalancingLoss<std::remove_cvref_t<decltype(balancer)>, T>) {
        if (has_losses) balancer.add_gradient(routing, cache.gradient);
      }
    });
    if (has_losses && cache.aux_scale != T(1)) cache.gradient.scale(cache.aux_scale, routing);
    for_each_balancer([&](auto& balancer) {
      if constexpr (BalancingRule<std::remove_cvref_t<decltype(balancer)>, T>) {
        balancer.observe(routing);
      }
    });
    if constexpr (requires { capacity_.observe(routing); }) capacity_.observe(routing);

    cache.d_weight.assign(routing.expert.size(), T(0));
    const std::span<T> d_weight = cache.d_weight;
    const Matrix<T>& d_experts =
        bank_.backward(scaled(dy, cache), cache.dispatch, d_weight, cache.bank);
    if (routing.pass_dropped) {
      for_each_dropped(
          routing, [&](Index t, std::size_t a) { d_weight[a] = dy.row(t).dot(cache.x.row(t)); });
    }
    cache.gradient.weights +=
        Eigen::Map<const RowVector<T>>(d_weight.data(), routing.assignments());
    select_backward(selector_, cache.routing, cache.gradient);
    if constexpr (AnnotatingRouter<R>) router_.receive(cache.gradient, cache.router);
    cache.dx.resize(dy.rows(), d_model());
    add_rows<T>(d_experts, router_.backward(cache.gradient.logits, cache.router), cache.dx);
    for_each_loss([&](const auto& balancer) {
      if constexpr (RouterLoss<std::remove_cvref_t<decltype(balancer)>, R>) {
        if (has_losses) balancer.add_router_gradient(router_, cache.aux_scale);
      }
    });
    if (routing.pass_dropped) {
      for_each_dropped(routing, [&](Index t, std::size_t a) {
        cache.dx.row(t) += routing.weight[a] * dy.row(t);
      });
    }
    return cache.dx;
  }

  /// Lets the balancing rules, and a capacity policy that adapts, act: once after each optimizer
  /// step.
  void update() {
    if constexpr (requires { capacity_.update(); }) capacity_.update();
    for_each_balancer([&](auto& balancer) {
      using Rule = std::remove_cvref_t<decltype(balancer)>;
      if constexpr (BalancingRule<Rule, T>) {
        static_assert(
            requires { balancer.update(selector_); },
            "this balancing rule cannot act on this selector; BiasBalance needs one with "
            "a selection bias, such as SigmoidTopK");
        balancer.update(selector_);
      }
    });
  }

  /// What the routing of the last forward pass with `cache` did.
  MoEReport report(const Cache& cache) const {
    MoEReport report = report_of(cache.routing);
    for_each_loss([&](const auto& balancer) {
      using Loss = std::remove_cvref_t<decltype(balancer)>;
      std::string name = "loss";
      if constexpr (requires { Loss::kName; }) name = Loss::kName;
      report.losses.emplace_back(name, static_cast<double>(loss_of(balancer, cache.routing)));
    });
    const T own = aux_loss_of_router<T>(cache.router);
    if (own != T(0)) {
      report.losses.emplace_back("router", static_cast<double>(own / cache.aux_scale));
    }
    return report;
  }

  /// Parameters `router.*` and `experts.*`; buffers `selector.*` and `capacity.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("router", self.router_);
    if constexpr (requires { S::visit(self.selector_, visit); }) visit("selector", self.selector_);
    if constexpr (requires { C::visit(self.capacity_, visit); }) visit("capacity", self.capacity_);
    visit("experts", self.bank_);
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
    return std::get<i>(balancers_);
  }
  template <std::size_t i>
  const auto& balancer() const {
    return std::get<i>(balancers_);
  }

 private:
  void check() const {
    selector_.check(router_.experts());
    if constexpr (requires { selector_.check_router(router_); }) selector_.check_router(router_);
    capacity_.check();
    for_each_balancer([&](const auto& balancer) {
      if constexpr (requires { balancer.check(); }) balancer.check();
      if constexpr (requires { balancer.check_router(router_); }) balancer.check_router(router_);
    });
  }

  template <class Body>
  void for_each_balancer(Body&& body) {
    std::apply([&](auto&... balancer) { (body(balancer), ...); }, balancers_);
  }
  template <class Body>
  void for_each_balancer(Body&& body) const {
    std::apply([&](const auto&... balancer) { (body(balancer), ...); }, balancers_);
  }

  template <class Body>
  void for_each_loss(Body&& body) const {
    for_each_balancer([&](const auto& balancer) {
      using Loss = std::remove_cvref_t<decltype(balancer)>;
      if constexpr (BalancingLoss<Loss, T> || RouterLoss<Loss, R>) body(balancer);
    });
  }

  template <class Loss>
  T loss_of(const Loss& balancer, const Routing<T>& routing) const {
    T loss = T(0);
    if constexpr (BalancingLoss<Loss, T>) loss += balancer.loss(routing);
    if constexpr (RouterLoss<Loss, R>) loss += balancer.router_loss(router_);
    return loss;
  }

  /// dL/d(outputs of the experts).
  static Eigen::Ref<const Matrix<T>> scaled(MatrixIn<T> dy, Cache& cache) {
    if (cache.routing.output_scale == T(1)) return dy;
    copy_rows<T>(dy, cache.scaled_dy);
    cache.scaled_dy *= cache.routing.output_scale;
    return cache.scaled_dy;
  }

  template <class Body>
  static void for_each_dropped(const Routing<T>& routing, Body&& body) {
    for (Index t = 0; t < routing.tokens(); ++t) {
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        if (routing.kept[static_cast<std::size_t>(a)] == 0) body(t, static_cast<std::size_t>(a));
      }
    }
  }

  R router_;
  S selector_;
  C capacity_;
  B bank_;
  std::tuple<L...> balancers_;
};

}  // namespace weir
