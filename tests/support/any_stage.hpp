// SPDX-License-Identifier: MIT
/// \file
/// Stages of a mixture of any type behind one type for each role, so that many combinations of them
/// cost one instantiation of MoELayer.
#pragma once

#include <any>
#include <memory>
#include <span>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/walk.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/selection_bias.hpp>

namespace weir::test {

/// A value behind an interface, copied with its owner.
template <class Interface>
class Erased {
 public:
  explicit Erased(std::unique_ptr<Interface> held) : held_(std::move(held)) {}
  Erased(const Erased& other) : held_(other.held_->clone()) {}
  Erased(Erased&&) noexcept = default;
  Erased& operator=(Erased other) {
    held_ = std::move(other.held_);
    return *this;
  }
  ~Erased() = default;

  Interface* operator->() const { return held_.get(); }

 private:
  std::unique_ptr<Interface> held_;
};

/// The cache of type `Own` in `cache`.
template <class Own>
Own& own_of(std::any& cache) {
  auto* own = std::any_cast<Own>(&cache);
  return own != nullptr ? *own : cache.emplace<Own>();
}

/// A Router of any type.
template <class T>
class AnyRouter {
 public:
  using Scalar = T;
  using Noise = std::span<const NoiseLevel<T>>;

  struct Cache {
    std::any own;
  };

  template <Router R>
  requires(!std::same_as<R, AnyRouter>) AnyRouter(R router)  // NOLINT(google-explicit-constructor)
      : held_(std::make_unique<Model<R>>(std::move(router))) {}

  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    return held_->forward(x, pass, cache);
  }
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) { return held_->backward(dy, cache); }
  Noise noise(const Cache& cache) const { return held_->noise(cache); }
  void add_noise_gradient(Noise d_noise, Cache& cache) const {
    held_->add_noise_gradient(d_noise, cache);
  }
  Index d_model() const { return held_->sizes().d_model; }
  Index experts() const { return held_->sizes().experts; }
  Index groups() const { return held_->sizes().groups; }
  Parameter<T>* expert_vectors() { return held_->expert_vectors(); }
  const Parameter<T>* expert_vectors() const { return held_->expert_vectors(); }
  void set_storage(Storage /*storage*/) {}
  static void visit(AnyRouter& self, Walk<T>& visit) { self.held_->visit(visit); }

 private:
  struct Sizes {
    Index d_model, experts, groups;
  };
  struct Interface {
    virtual ~Interface() = default;
    virtual std::unique_ptr<Interface> clone() const = 0;
    virtual const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const = 0;
    virtual const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) = 0;
    virtual Noise noise(const Cache& cache) const = 0;
    virtual void add_noise_gradient(Noise d_noise, Cache& cache) const = 0;
    virtual Sizes sizes() const = 0;
    virtual Parameter<T>* expert_vectors() = 0;
    virtual void visit(Walk<T>& visit) = 0;
  };
  template <class R>
  struct Model final : Interface {
    explicit Model(R r) : router(std::move(r)) {}
    std::unique_ptr<Interface> clone() const override { return std::make_unique<Model>(router); }
    const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const override {
      return router.forward(x, pass, own_of<typename R::Cache>(cache.own));
    }
    const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) override {
      return router.backward(dy, own_of<typename R::Cache>(cache.own));
    }
    Noise noise(const Cache& cache) const override {
      return router.noise(std::any_cast<const typename R::Cache&>(cache.own));
    }
    void add_noise_gradient(Noise d_noise, Cache& cache) const override {
      router.add_noise_gradient(d_noise, own_of<typename R::Cache>(cache.own));
    }
    Sizes sizes() const override { return {router.d_model(), router.experts(), router.groups()}; }
    Parameter<T>* expert_vectors() override { return router.expert_vectors(); }
    void visit(Walk<T>& visit) override { visit("", router); }
    R router;
  };

  Erased<Interface> held_;
};

/// A Selector of any type, with or without a selection bias.
template <class T>
class AnySelector {
 public:
  using Scalar = T;
  static constexpr bool kBiasesLogits = true;  // Whoever combines it knows better.

  struct Cache {
    std::any own;
  };

  template <class S>
  requires(Selector<S, T> && !std::same_as<S, AnySelector>)
      AnySelector(S selector)  // NOLINT(google-explicit-constructor)
      : held_(std::make_unique<Model<S>>(std::move(selector))) {}

  void check(Index experts) const { held_->check(experts); }
  template <class R>
  void check_router(const R& router) const {
    held_->check_router(router);
  }
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& cache) const {
    held_->forward(logits, pass, routing, cache);
  }
  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& cache) const {
    held_->backward(routing, gradient, cache);
  }
  /// \throws StateError   if the selector has none.
  Buffer<T>& selection_bias() {
    Buffer<T>* bias = held_->selection_bias();
    if (bias == nullptr) throw_error<StateError>("AnySelector: there is no selection bias");
    return *bias;
  }
  static void visit(AnySelector& self, Walk<T>& visit) { self.held_->visit(visit); }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual std::unique_ptr<Interface> clone() const = 0;
    virtual void check(Index experts) const = 0;
    virtual void check_router(const AnyRouter<T>& router) const = 0;
    virtual void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing,
                         Cache& cache) const = 0;
    virtual void backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                          Cache& cache) const = 0;
    virtual Buffer<T>* selection_bias() = 0;
    virtual void visit(Walk<T>& visit) = 0;
  };
  template <class S>
  struct Model final : Interface {
    explicit Model(S s) : selector(std::move(s)) {}
    std::unique_ptr<Interface> clone() const override { return std::make_unique<Model>(selector); }
    void check(Index experts) const override { selector.check(experts); }
    void check_router(const AnyRouter<T>& router) const override { selector.check_router(router); }
    void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing,
                 Cache& cache) const override {
      selector.forward(logits, pass, routing, own_of<typename S::Cache>(cache.own));
    }
    void backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                  Cache& cache) const override {
      selector.backward(routing, gradient, own_of<typename S::Cache>(cache.own));
    }
    Buffer<T>* selection_bias() override {
      if constexpr (BiasedSelector<S>) {
        return &selector.selection_bias();
      } else {
        return nullptr;
      }
    }
    void visit(Walk<T>& visit) override { visit("", selector); }
    S selector;
  };

  Erased<Interface> held_;
};

/// A CapacityPolicy of any type.
template <class T>
class AnyCapacity {
 public:
  template <class>
  struct Cache {
    std::any own;
  };

  template <class C>
  requires(CapacityPolicy<C, T> && !std::same_as<C, AnyCapacity>)
      AnyCapacity(C capacity)  // NOLINT(google-explicit-constructor)
      : held_(std::make_unique<Model<C>>(std::move(capacity))) {}

  void check() const { held_->check(); }
  void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const {
    held_->forward(pass, routing, cache);
  }
  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache<T>& cache) const {
    held_->backward(routing, gradient, cache);
  }
  void observe(const Routing<T>& routing) { held_->observe(routing); }
  static void visit(AnyCapacity& self, Walk<T>& visit) { self.held_->visit(visit); }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual std::unique_ptr<Interface> clone() const = 0;
    virtual void check() const = 0;
    virtual void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const = 0;
    virtual void backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                          Cache<T>& cache) const = 0;
    virtual void observe(const Routing<T>& routing) = 0;
    virtual void visit(Walk<T>& visit) = 0;
  };
  template <class C>
  struct Model final : Interface {
    using Own = typename C::template Cache<T>;
    explicit Model(C c) : capacity(std::move(c)) {}
    std::unique_ptr<Interface> clone() const override { return std::make_unique<Model>(capacity); }
    void check() const override { capacity.check(); }
    void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const override {
      capacity.forward(pass, routing, own_of<Own>(cache.own));
    }
    void backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                  Cache<T>& cache) const override {
      capacity.backward(routing, gradient, own_of<Own>(cache.own));
    }
    void observe(const Routing<T>& routing) override { capacity.observe(routing); }
    void visit(Walk<T>& visit) override { visit("", capacity); }
    C capacity;
  };

  Erased<Interface> held_;
};

/// An ExpertBank of any type.
template <class T>
class AnyExperts {
 public:
  using Scalar = T;

  struct Cache {
    std::any own;
  };

  template <ExpertBank B>
  requires(!std::same_as<B, AnyExperts>) AnyExperts(B bank)  // NOLINT(google-explicit-constructor)
      : held_(std::make_unique<Model<B>>(std::move(bank))) {}

  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const {
    return held_->forward(x, dispatch, pass, cache);
  }
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache) {
    return held_->backward(dy, dispatch, d_weight, cache);
  }
  Index experts() const { return held_->sizes().experts; }
  Index d_in() const { return held_->sizes().d_in; }
  Index d_out() const { return held_->sizes().d_out; }
  static void visit(AnyExperts& self, Walk<T>& visit) { self.held_->visit(visit); }

 private:
  struct Sizes {
    Index experts, d_in, d_out;
  };
  struct Interface {
    virtual ~Interface() = default;
    virtual std::unique_ptr<Interface> clone() const = 0;
    virtual const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                                     Cache& cache) const = 0;
    virtual const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch,
                                      std::span<T> d_weight, Cache& cache) = 0;
    virtual Sizes sizes() const = 0;
    virtual void visit(Walk<T>& visit) = 0;
  };
  template <class B>
  struct Model final : Interface {
    explicit Model(B b) : bank(std::move(b)) {}
    std::unique_ptr<Interface> clone() const override { return std::make_unique<Model>(bank); }
    const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                             Cache& cache) const override {
      return bank.forward(x, dispatch, pass, own_of<typename B::Cache>(cache.own));
    }
    const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                              Cache& cache) override {
      return bank.backward(dy, dispatch, d_weight, own_of<typename B::Cache>(cache.own));
    }
    Sizes sizes() const override { return {bank.experts(), bank.d_in(), bank.d_out()}; }
    void visit(Walk<T>& visit) override { visit("", bank); }
    B bank;
  };

  Erased<Interface> held_;
};

/// Any number of balancers of any types, as one.
template <class T>
class AnyBalancers : public BalancerBase {
 public:
  static constexpr std::string_view kName = "any";
  struct Cache {
    std::vector<std::any> own;
  };

  AnyBalancers() = default;

  template <class B>
  AnyBalancers& add(B balancer) {
    held_.emplace_back(std::make_unique<Model<B>>(std::move(balancer)));
    return *this;
  }

  void check() const {
    for (const auto& held : held_) held->check();
  }
  void check_router(const AnyRouter<T>& router) const {
    for (const auto& held : held_) held->check_router(router);
  }
  double forward(const Routing<T>& routing, Cache& cache) const {
    cache.own.resize(held_.size());
    double sum = 0.0;
    for (std::size_t i = 0; i < held_.size(); ++i) sum += held_[i]->forward(routing, cache.own[i]);
    return sum;
  }
  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    for (std::size_t i = 0; i < held_.size(); ++i) {
      held_[i]->backward(routing, scale, gradient, cache.own[i]);
    }
  }
  double forward(const AnyRouter<T>& router, Cache& cache) const {
    double sum = 0.0;
    for (std::size_t i = 0; i < held_.size(); ++i) sum += held_[i]->forward(router, cache.own[i]);
    return sum;
  }
  void backward(AnyRouter<T>& router, double scale, Cache& cache) const {
    for (std::size_t i = 0; i < held_.size(); ++i) held_[i]->backward(router, scale, cache.own[i]);
  }
  void observe(const Routing<T>& routing) {
    for (auto& held : held_) held->observe(routing);
  }
  void update(AnySelector<T>& selector) {
    for (auto& held : held_) held->update(selector);
  }
  static void visit(AnyBalancers& self, Walk<T>& visit) {
    for (std::size_t i = 0; i < self.held_.size(); ++i) {
      self.held_[i]->visit(std::to_string(i), visit);
    }
  }

 private:
  struct Interface {
    virtual ~Interface() = default;
    virtual std::unique_ptr<Interface> clone() const = 0;
    virtual void check() const = 0;
    virtual void check_router(const AnyRouter<T>& router) const = 0;
    virtual double forward(const Routing<T>& routing, std::any& cache) const = 0;
    virtual void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                          std::any& cache) const = 0;
    virtual double forward(const AnyRouter<T>& router, std::any& cache) const = 0;
    virtual void backward(AnyRouter<T>& router, double scale, std::any& cache) const = 0;
    virtual void observe(const Routing<T>& routing) = 0;
    virtual void update(AnySelector<T>& selector) = 0;
    virtual void visit(const std::string& name, Walk<T>& visit) = 0;
  };
  template <class B>
  struct Model final : Interface {
    using Own = typename B::Cache;
    explicit Model(B b) : balancer(std::move(b)) {}
    std::unique_ptr<Interface> clone() const override { return std::make_unique<Model>(balancer); }
    void check() const override { balancer.check(); }
    void check_router(const AnyRouter<T>& router) const override { balancer.check_router(router); }
    double forward(const Routing<T>& routing, std::any& cache) const override {
      if constexpr (RoutingLoss<B, T>) return balancer.forward(routing, own_of<Own>(cache));
      return 0.0;
    }
    void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                  std::any& cache) const override {
      if constexpr (RoutingLoss<B, T>) {
        balancer.backward(routing, scale, gradient, own_of<Own>(cache));
      }
    }
    double forward(const AnyRouter<T>& router, std::any& cache) const override {
      if constexpr (RouterLoss<B, AnyRouter<T>>)
        return balancer.forward(router, own_of<Own>(cache));
      return 0.0;
    }
    void backward(AnyRouter<T>& router, double scale, std::any& cache) const override {
      if constexpr (RouterLoss<B, AnyRouter<T>>) {
        balancer.backward(router, scale, own_of<Own>(cache));
      }
    }
    void observe(const Routing<T>& routing) override {
      if constexpr (ObservingBalancer<B, T>) balancer.observe(routing);
    }
    void update(AnySelector<T>& selector) override {
      if constexpr (BalancingRule<B, AnySelector<T>>) balancer.update(selector);
    }
    void visit(const std::string& name, Walk<T>& visit) override { visit(name, balancer); }
    B balancer;
  };

  std::vector<Erased<Interface>> held_;
};

static_assert(Router<AnyRouter<double>>);
static_assert(Selector<AnySelector<double>, double>);
static_assert(CapacityPolicy<AnyCapacity<double>, double>);
static_assert(ExpertBank<AnyExperts<double>>);
static_assert(Balancer<AnyBalancers<double>, AnyRouter<double>>);

}  // namespace weir::test
