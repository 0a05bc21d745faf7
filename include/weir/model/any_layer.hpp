// SPDX-License-Identifier: MIT
/// \file
/// A layer of any type behind one value type, for the slots of a decoder block.
#pragma once

#include <any>
#include <concepts>
#include <memory>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/cache_storage.hpp>
#include <weir/core/decoding.hpp>
#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/core/walk.hpp>

namespace weir {

/// Holds any Layer by value: a norm, an attention, a feed-forward network, a mixture of experts, or
/// a user's own. A copy has its own copy of the layer; a moved-from object may only be assigned to
/// or destroyed. If the layer is a DecodingLayer, `decode` continues its states; otherwise `decode`
/// runs the forward pass.
///
/// The layer and its `Cache` and `State` have to be copyable.
template <std::floating_point T>
class AnyLayer {
 public:
  using Scalar = T;

  /// Holds the wrapped layer's own cache. One cache can serve layers of several types in turn: each
  /// finds the cache of its type again. So a model needs one cache for all layers if no backward
  /// pass follows.
  struct Cache {
    std::vector<std::any> own;
  };

  /// What decoding keeps of the tokens so far; empty for a layer that looks at one token at a time.
  struct State {
    std::any own = {};
    /// What can be done to a state of the type in `own`.
    void (*truncate_own)(std::any& own, Index length) = nullptr;
    Index (*bytes_of_own)(const std::any& own) = nullptr;
    CacheStorage storage = CacheStorage::kFull;  ///< Of a state that can be made with it.

    State() = default;
    explicit State(CacheStorage how) : storage(how) {}

    /// Forgets all tokens but the first `length`.
    /// \throws              As the layer's own state does, if it has fewer tokens or has forgotten
    ///                      what would then be needed.
    void truncate(Index length) {
      if (own.has_value()) truncate_own(own, length);
    }

    /// What a token takes; 0 for a state that does not tell.
    Index bytes_per_token() const { return own.has_value() ? bytes_of_own(own) : 0; }
  };

  template <class L>
  requires(!std::same_as<std::remove_cvref_t<L>, AnyLayer>)
      AnyLayer(L layer)  // NOLINT(google-explicit-constructor): any layer is one.
      : self_(std::make_unique<Model<L>>(std::move(layer))) {
    static_assert(
        requires { typename L::Scalar; }, "a layer has a type Scalar, see core/layer.hpp");
    static_assert(std::same_as<typename L::Scalar, T>,
                  "the layer's Scalar is not that of AnyLayer");
    static_assert(
        requires { typename L::Cache; }, "a layer has a type Cache, see core/layer.hpp");
    static_assert(
        requires(const L& l, MatrixIn<T> x, const Pass& pass, typename L::Cache& cache) {
          { l.forward(x, pass, cache) } -> std::same_as<const Matrix<T>&>;
        },
        "a layer has const Matrix<T>& forward(MatrixIn<T> x, const Pass&, Cache&) const");
    static_assert(
        requires(L & l, MatrixIn<T> dy, typename L::Cache & cache) {
          { l.backward(dy, cache) } -> std::same_as<const Matrix<T>&>;
        },
        "a layer has const Matrix<T>& backward(MatrixIn<T> dy, Cache&)");
    static_assert(
        requires(L & l, Walk<T> & walk) { L::visit(l, walk); },
        "a layer has template <class Self, class Visit> static void visit(Self&, Visit&)");
  }

  AnyLayer(const AnyLayer& other) : self_(other.self_->clone()) {}
  AnyLayer(AnyLayer&&) noexcept = default;
  AnyLayer& operator=(const AnyLayer& other) {
    if (this != &other) self_ = other.self_->clone();
    return *this;
  }
  AnyLayer& operator=(AnyLayer&&) noexcept = default;
  ~AnyLayer() = default;

  /// The layer's own `forward`.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    return self_->forward(x, pass, cache);
  }

  /// \throws StateError   if `cache` was not filled by this layer's forward pass.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) { return self_->backward(dy, cache); }

  /// Continues the sequences of `pass` by the tokens x [new tokens, d_model], see DecodingLayer. A
  /// layer without a state of its own runs its forward pass, for all of them at once.
  /// \throws StateError   if one of `states` is of a layer of another type.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const {
    return self_->decode(x, pass, states, cache);
  }

  /// Visits the layer's own members. The layer is known at run time, so there is no template.
  static void visit(AnyLayer& self, Walk<T>& visit) { self.self_->visit(visit); }
  static void visit(AnyLayer& self, StorageWalk<T>& visit) { self.self_->visit(visit); }

  /// The layer itself, if it is an `L`; else null.
  template <class L>
  L* get() {
    auto* model = dynamic_cast<Model<L>*>(self_.get());
    return model == nullptr ? nullptr : &model->layer;
  }
  template <class L>
  const L* get() const {
    const auto* model = dynamic_cast<const Model<L>*>(self_.get());
    return model == nullptr ? nullptr : &model->layer;
  }

 private:
  struct Interface {
    Interface() = default;
    Interface(const Interface&) = default;
    Interface& operator=(const Interface&) = delete;
    virtual ~Interface() = default;
    virtual std::unique_ptr<Interface> clone() const = 0;
    virtual const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const = 0;
    virtual const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) = 0;
    virtual const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                                    Cache& cache) const = 0;
    virtual void visit(Walk<T>& visit) = 0;
    virtual void visit(StorageWalk<T>& visit) = 0;
  };

  struct NoStates {};

  template <class L>
  struct Model final : Interface {
    static constexpr bool kHasState = requires { typename L::State; };
    static_assert(DecodingLayer<L> || !kHasState, "a layer with a State has to be a DecodingLayer");

    static auto no_states() {
      if constexpr (kHasState) {
        return std::vector<typename L::State*>();
      } else {
        return NoStates{};
      }
    }

    /// The layer's cache, and pointers to its states.
    struct Own {
      typename L::Cache cache;
      decltype(no_states()) states = no_states();
    };

    explicit Model(L l) : layer(std::move(l)) {}

    std::unique_ptr<Interface> clone() const override { return std::make_unique<Model>(layer); }

    const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const override {
      return layer.forward(x, pass, own_of(cache).cache);
    }

    const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) override {
      return layer.backward(dy, own_of(cache).cache);
    }

    const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                            Cache& cache) const override {
      if constexpr (kHasState) {
        Own& own = own_of(cache);
        own.states.clear();
        for (State* state : states) own.states.push_back(&own_of(*state));
        return layer.decode(x, pass, own.states, own.cache);
      } else {
        return forward(x, pass, cache);
      }
    }

    void visit(Walk<T>& visit) override { visit("", layer); }
    void visit(StorageWalk<T>& visit) override { visit("", layer); }

    static Own& own_of(Cache& cache) {
      for (std::any& any : cache.own) {
        if (auto* own = std::any_cast<Own>(&any)) return *own;
      }
      return cache.own.emplace_back().template emplace<Own>();
    }

    static auto& own_of(State& state) requires kHasState {
      using Kept = typename L::State;
      if (!state.own.has_value()) {
        state.own.template emplace<Kept>(state_with<Kept>(state.storage));
        state.truncate_own = [](std::any& own, Index length) {
          std::any_cast<Kept&>(own).truncate(length);
        };
        state.bytes_of_own = [](const std::any& own) -> Index {
          if constexpr (requires(const Kept& kept) { kept.bytes_per_token(); }) {
            return std::any_cast<const Kept&>(own).bytes_per_token();
          } else {
            return 0;
          }
        };
      }
      auto* kept = std::any_cast<Kept>(&state.own);
      if (kept == nullptr) {
        throw_error<StateError>(
            "AnyLayer::decode: the state is of another layer, expected an empty one or one that "
            "this layer has filled");
      }
      return *kept;
    }

    L layer;
  };

  std::unique_ptr<Interface> self_;
};

}  // namespace weir
