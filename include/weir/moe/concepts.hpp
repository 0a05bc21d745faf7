// SPDX-License-Identifier: MIT
/// \file
/// The roles in a mixture of experts, each as a concept and a base. A type of your own plays a role
/// if it satisfies the concept; the base provides the members that most types do not need. Nothing
/// has to be registered.
#pragma once

#include <concepts>
#include <span>
#include <string_view>

#include <weir/core/layer.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/routing.hpp>

namespace weir {

// --- Routers --------------------------------------------------------------------------------

/// The defaults of a router: no noise, one level, no vectors of its experts, and weights that keep
/// full precision in every storage.
template <class T>
class RouterBase {
 public:
  using Scalar = T;

  /// The noise that the last pass with `cache` drew; here, none.
  template <class Cache>
  std::span<const NoiseLevel<T>> noise(const Cache& /*cache*/) const {
    return {};
  }

  /// Takes the gradient of that noise, which the next `backward` includes.
  template <class Cache>
  void add_noise_gradient(std::span<const NoiseLevel<T>> /*d_noise*/, Cache& /*cache*/) const {}

  /// The number of groups that a router of two levels chooses from first; 0 for one level.
  Index groups() const { return 0; }

  /// The parameter [experts, n] whose row e stands for expert e, for OrthogonalityLoss. Null if
  /// there is none.
  Parameter<T>* expert_vectors() { return nullptr; }
  const Parameter<T>* expert_vectors() const { return nullptr; }

  void set_storage(Storage /*storage*/) {}
};

/// Scores every expert for every token: a layer [tokens, d_model] -> [tokens, experts]. A router
/// that draws noise tells balancers its levels, and takes their gradients.
template <class R>
concept Router = Layer<R> &&
    requires(const R& router, R& trained, const typename R::Cache& filled, typename R::Cache& cache,
             std::span<const NoiseLevel<typename R::Scalar>> d_noise) {
  { router.d_model() } -> std::convertible_to<Index>;
  { router.experts() } -> std::convertible_to<Index>;
  { router.groups() } -> std::convertible_to<Index>;
  { router.noise(filled) } -> std::same_as<std::span<const NoiseLevel<typename R::Scalar>>>;
  trained.add_noise_gradient(d_noise, cache);
  { trained.expert_vectors() } -> std::same_as<Parameter<typename R::Scalar>*>;
};

// --- Selectors ------------------------------------------------------------------------------

/// The defaults of a selector: nothing to keep between forward and backward, nothing to save, and
/// any router.
template <class T>
class SelectorBase {
 public:
  using Scalar = T;
  struct Cache {};

  /// Whether the selection bias, if there is one, is added to the logits; QuantileBalance
  /// needs that.
  static constexpr bool kBiasesLogits = false;

  /// \throws ConfigError  if the selector does not fit the router.
  template <class R>
  void check_router(const R& /*router*/) const {}

  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}
};

/// Turns logits into a routing, and gradients of its weights and probabilities back into gradients
/// of the logits.
///
///     void check(Index experts) const;       throws ConfigError if it cannot serve that many
///     void forward(MatrixIn<T> logits, const Pass&, Routing<T>&, Cache&) const;
///                                            begins the routing, and sets its probabilities,
///                                            assignments and weights
///     void backward(const Routing<T>&, RoutingGradient<T>&, Cache&) const;
///                                            adds to gradient.logits, may overwrite
///                                            gradient.weights and gradient.probabilities
template <class S, class T>
concept Selector = std::default_initializable<typename S::Cache> &&
    requires(const S& selector, S& trained, MatrixIn<T> logits, const Pass& pass,
             Routing<T>& routing, RoutingGradient<T>& gradient, typename S::Cache& cache,
             Index experts, Walk<T>& walk) {
  { S::kBiasesLogits } -> std::convertible_to<bool>;
  selector.check(experts);
  selector.forward(logits, pass, routing, cache);
  selector.backward(routing, gradient, cache);
  S::visit(trained, walk);
};

// --- Capacity policies ----------------------------------------------------------------------

/// The defaults of a capacity policy: nothing to keep, nothing to learn, nothing to save, and
/// weights as the selector made them.
class CapacityBase {
 public:
  template <class T>
  struct Cache {};

  void check() const {}

  template <class T, class Cache>
  void backward(const Routing<T>& /*routing*/, RoutingGradient<T>& /*gradient*/,
                Cache& /*cache*/) const {}

  template <class T>
  void observe(const Routing<T>& /*routing*/) {}

  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}
};

/// Bounds how many tokens an expert takes.
///
///     void check() const;                    throws ConfigError if a setting is out of range
///     void forward(const Pass&, Routing<T>&, Cache<T>&) const;
///                                            clears `kept` of the assignments beyond the bound,
///                                            never reorders, and may set `applied`
///     void backward(const Routing<T>&, RoutingGradient<T>&, Cache<T>&) const;
///                                            turns gradient.weights, the gradient of the applied
///                                            weights, into that of the selector's weights
///     void observe(const Routing<T>&);       called once for each backward pass; what it counts is
///                                            forgotten by `void discard_self()`, if there is one
template <class C, class T>
concept CapacityPolicy = std::default_initializable<typename C::template Cache<T>> &&
    requires(const C& capacity, C& trained, const Pass& pass, Routing<T>& routing,
             RoutingGradient<T>& gradient, typename C::template Cache<T>& cache, Walk<T>& walk) {
  capacity.check();
  capacity.forward(pass, routing, cache);
  capacity.backward(routing, gradient, cache);
  trained.observe(routing);
  C::visit(trained, walk);
};

// --- Experts --------------------------------------------------------------------------------

/// All experts of a layer as one object. `forward` gives [tokens, d_out], the weighted sum of the
/// experts' outputs for the rows of x [tokens, d_in] that `dispatch` sends them; `backward` returns
/// dL/dx and sets `d_weight[a]` to dL/d(weight) of each assignment a that has a slot. Both return
/// references to matrices that live in the cache. `visit` names the members of expert e "e.*".
template <class B>
concept ExpertBank = std::default_initializable<typename B::Cache> &&
    requires(const B& bank, B& trained, MatrixIn<typename B::Scalar> x,
             const Dispatch<typename B::Scalar>& dispatch, const Pass& pass,
             std::span<typename B::Scalar> d_weight, typename B::Cache& cache,
             Walk<typename B::Scalar>& walk) {
  { bank.experts() } -> std::convertible_to<Index>;
  { bank.d_in() } -> std::convertible_to<Index>;
  { bank.d_out() } -> std::convertible_to<Index>;
  { bank.forward(x, dispatch, pass, cache) } -> std::same_as<const Matrix<typename B::Scalar>&>;
  {
    trained.backward(x, dispatch, d_weight, cache)
    } -> std::same_as<const Matrix<typename B::Scalar>&>;
  B::visit(trained, walk);
};

// --- Balancers ------------------------------------------------------------------------------

/// The defaults of a balancer: nothing to keep between forward and backward, nothing to save, no
/// settings to check, and any router.
class BalancerBase {
 public:
  static constexpr std::string_view kName = "loss";  ///< Its name in records and reports.
  struct Cache {};

  /// \throws ConfigError  if a setting is out of range.
  void check() const {}

  /// \throws ConfigError  if the balancer does not fit the router.
  template <class R>
  void check_router(const R& /*router*/) const {}

  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}
};

/// A balancer that is a term of the training objective and looks at the routing.
///
///     double forward(const Routing<T>&, Cache&) const;       the loss, scaled by its coefficient
///     void backward(const Routing<T>&, double scale, RoutingGradient<T>&, Cache&) const;
///                                            adds `scale` times the gradient of that loss
template <class B, class T>
concept RoutingLoss = requires(const B& balancer, const Routing<T>& routing, double scale,
                               RoutingGradient<T>& gradient, typename B::Cache& cache) {
  { balancer.forward(routing, cache) } -> std::convertible_to<double>;
  balancer.backward(routing, scale, gradient, cache);
};

/// A balancer that is a term of the training objective and looks at the parameters of the router.
/// It is the same for any tokens, even if there are none.
///
///     double forward(const R& router, Cache&) const;         the loss, scaled by its coefficient
///     void backward(R& router, double scale, Cache&) const;  adds `scale` times its gradient to
///                                            that of the parameters, frozen or not
template <class B, class R>
concept RouterLoss = requires(const B& balancer, const R& router, R& trained, double scale,
                              typename B::Cache& cache) {
  { balancer.forward(router, cache) } -> std::convertible_to<double>;
  balancer.backward(trained, scale, cache);
};

/// A balancer that watches routings; it may be a loss as well. What it counts between two steps, it
/// forgets in a `void discard_self()`, which `weir::discard` calls.
///
///     void observe(const Routing<T>&);       called once for each backward pass
template <class B, class T>
concept ObservingBalancer = requires(B& balancer, const Routing<T>& routing) {
  balancer.observe(routing);
};

/// A balancer that acts on the selector S between optimizer steps.
///
///     void observe(const Routing<T>&);       called once for each backward pass
///     void update(S& selector);              called by `weir::update`, once for each step
template <class B, class S>
concept BalancingRule = ObservingBalancer<B, typename S::Scalar> &&
    requires(B& balancer, S& selector) {
  balancer.update(selector);
};

/// Keeps the load level in a layer with the router R: a loss of the routing, a loss of the router's
/// parameters, a rule, or several of these at once.
template <class B, class R>
concept Balancer = std::default_initializable<typename B::Cache> &&
    (RoutingLoss<B, typename R::Scalar> || RouterLoss<B, R> ||
     ObservingBalancer<B, typename R::Scalar>)&&requires(const B& balancer, B& trained,
                                                         const R& router,
                                                         Walk<typename R::Scalar>& walk) {
  { B::kName } -> std::convertible_to<std::string_view>;
  balancer.check();
  balancer.check_router(router);
  B::visit(trained, walk);
};

// --- Layers that route ----------------------------------------------------------------------

/// A layer that tells how many experts it routes tokens among.
template <class L>
concept HasExperts = requires(const L& layer) {
  { layer.experts() } -> std::convertible_to<Index>;
};

}  // namespace weir
