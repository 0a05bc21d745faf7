// SPDX-License-Identifier: MIT
/// \file
/// A layer of any type behind one value type, for the slots of a decoder block.
#pragma once

#include <any>
#include <concepts>
#include <memory>
#include <optional>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/report.hpp>

namespace weir {

/// A layer whose output for a token depends on the tokens before it. `decode` continues several
/// sequences at once: their new tokens are the rows of x, packed as `pass.sequences` says (null:
/// one sequence), and `states` has what the layer knows of each, `State{}` in the beginning.
/// `state.truncate(length)` makes a state forget all tokens but the first `length`.
template <class L>
concept DecodingLayer = Layer<L> && std::semiregular<typename L::State> &&
    requires(const L& layer, MatrixIn<typename L::Scalar> x, const Pass& pass,
             std::span<typename L::State* const> states, typename L::State& state, Index length,
             typename L::Cache& cache) {
  {
    layer.decode(x, pass, states, cache)
    } -> std::convertible_to<const Matrix<typename L::Scalar>&>;
  state.truncate(length);
};

/// Holds any Layer by value: a norm, an attention, a feed-forward network, a mixture of experts, or
/// a user's own. Copying it copies the layer; one that was moved from may only be assigned to or
/// destroyed. What the layer can do beyond the concept is passed on where it has it, and is
/// harmless where it has not:
///
///     forward(x, pass, cache)                 a pass
///     State, decode(x, pass, states, cache)   decoding with states, see DecodingLayer
///     cache.aux_loss                          an auxiliary loss
///     update()                                an act after the optimizer's step
///     report(cache) -> MoEReport              a report
///
/// The layer and its `Cache` and `State` have to be copyable.
template <std::floating_point T>
class AnyLayer {
 public:
  using Scalar = T;

  /// Holds the wrapped layer's own cache.
  struct Cache {
    std::any own;
    T aux_loss = T(0);  ///< The wrapped layer's, if it has one.
  };

  /// What decoding keeps of the tokens so far; empty for a layer that looks at one token at a time.
  struct State {
    std::any own;
    void (*truncate_own)(std::any& own, Index length) = nullptr;  ///< Of the type that `own` has.

    /// Forgets all tokens but the first `length`.
    /// \throws              What the layer's own state throws, if it does not have that many or no
    ///                      longer has what would then be needed.
    void truncate(Index length) {
      if (own.has_value()) truncate_own(own, length);
    }
  };

  template <Layer L>
  requires(!std::same_as<std::remove_cvref_t<L>, AnyLayer> && std::same_as<typename L::Scalar, T>)
      AnyLayer(L layer)  // NOLINT(google-explicit-constructor): any layer is one.
      : self_(std::make_unique<Model<L>>(std::move(layer))) {}

  AnyLayer(const AnyLayer& other) : self_(other.self_->clone()) {}
  AnyLayer(AnyLayer&&) noexcept = default;
  AnyLayer& operator=(const AnyLayer& other) {
    if (this != &other) self_ = other.self_->clone();
    return *this;
  }
  AnyLayer& operator=(AnyLayer&&) noexcept = default;
  ~AnyLayer() = default;

  /// The layer's own `forward` for inference.
  Matrix<T> forward(MatrixIn<T> x) const { return self_->forward(x); }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// The layer's own `forward`, with the pass if it takes one.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    return self_->forward(x, pass, cache);
  }

  /// \throws StateError   if `cache` was not filled by this layer's forward pass.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) { return self_->backward(dy, cache); }

  /// Continues one sequence by the tokens x [new tokens, d_model].
  const Matrix<T>& decode(MatrixIn<T> x, State& state, Cache& cache) const {
    State* const states[] = {&state};
    return decode(x, {}, states, cache);
  }

  /// Continues the sequences of `pass` by the tokens x [new tokens, d_model], see DecodingLayer. A
  /// layer without a state of its own runs its forward pass, for all of them at once.
  /// \throws StateError   if one of `states` is of a layer of another type.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const {
    return self_->decode(x, pass, states, cache);
  }

  /// See MoELayer::update.
  void update() { self_->update(); }

  /// See `weir::set_storage`.
  void set_storage(Storage storage) { self_->set_storage(storage); }

  /// See MoELayer::report; nothing if the layer makes none, or has not run with this cache.
  std::optional<MoEReport> report(const Cache& cache) const { return self_->report(cache); }

  /// The layer's own members. Not a template on the visitor, since the layer is known at run time.
  static void visit(AnyLayer& self, Collector<T>& visit) { self.self_->visit(visit); }

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
    virtual Matrix<T> forward(MatrixIn<T> x) const = 0;
    virtual const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const = 0;
    virtual const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) = 0;
    virtual const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                                    Cache& cache) const = 0;
    virtual void update() = 0;
    virtual void set_storage(Storage storage) = 0;
    virtual std::optional<MoEReport> report(const Cache& cache) const = 0;
    virtual void visit(Collector<T>& visit) = 0;
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

    /// The layer's cache, a place for results that it returns by value, and pointers to its states.
    struct Own {
      typename L::Cache cache;
      Matrix<T> y, dx;
      decltype(no_states()) states = no_states();
    };

    explicit Model(L l) : layer(std::move(l)) {}

    std::unique_ptr<Interface> clone() const override { return std::make_unique<Model>(layer); }

    Matrix<T> forward(MatrixIn<T> x) const override { return layer.forward(x); }

    const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const override {
      Own& own = own_of(cache);
      const Matrix<T>& y = keep(own.y, apply(layer, x, pass, own.cache));
      pass_on_aux_loss(own, cache);
      return y;
    }

    const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) override {
      auto* own = std::any_cast<Own>(&cache.own);
      if (own == nullptr) {
        fail<StateError>(
            "AnyLayer::backward: the cache is empty, expected a forward pass of this layer before");
      }
      return keep(own->dx, layer.backward(dy, own->cache));
    }

    const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                            Cache& cache) const override {
      if constexpr (DecodingLayer<L>) {
        Own& own = own_of(cache);
        own.states.clear();
        for (State* state : states) own.states.push_back(&own_of(*state));
        const Matrix<T>& y = keep(own.y, layer.decode(x, pass, own.states, own.cache));
        pass_on_aux_loss(own, cache);
        return y;
      } else {
        return forward(x, pass, cache);
      }
    }

    void update() override {
      if constexpr (requires { layer.update(); }) layer.update();
    }

    void set_storage(Storage storage) override { weir::set_storage(layer, storage); }

    std::optional<MoEReport> report(const Cache& cache) const override {
      if constexpr (requires(const typename L::Cache& c) {
                      { layer.report(c) } -> std::convertible_to<MoEReport>;
                    }) {
        const auto* own = std::any_cast<Own>(&cache.own);
        if (own != nullptr) return layer.report(own->cache);
      }
      return std::nullopt;
    }

    void visit(Collector<T>& visit) override { L::visit(layer, visit); }

    static Own& own_of(Cache& cache) {
      auto* own = std::any_cast<Own>(&cache.own);
      return own != nullptr ? *own : cache.own.template emplace<Own>();
    }

    static auto& own_of(State& state) requires DecodingLayer<L> {
      using Kept = typename L::State;
      if (!state.own.has_value()) {
        state.own.template emplace<Kept>();
        state.truncate_own = [](std::any& own, Index length) {
          std::any_cast<Kept&>(own).truncate(length);
        };
      }
      auto* kept = std::any_cast<Kept>(&state.own);
      if (kept == nullptr) {
        fail<StateError>(
            "AnyLayer::decode: the state is of another layer, expected an empty one or one that "
            "this layer has filled");
      }
      return *kept;
    }

    static void pass_on_aux_loss([[maybe_unused]] const Own& own, Cache& cache) {
      if constexpr (requires { own.cache.aux_loss; }) {
        cache.aux_loss = own.cache.aux_loss;
      } else {
        cache.aux_loss = T(0);
      }
    }

    L layer;
  };

  std::unique_ptr<Interface> self_;
};

}  // namespace weir
