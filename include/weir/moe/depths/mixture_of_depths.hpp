// SPDX-License-Identifier: MIT
/// \file
/// Mixture of depths: a layer that only some tokens pass through.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/decode_states.hpp>
#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/scratch.hpp>
#include <weir/moe/depths/choice_loss.hpp>
#include <weir/moe/depths/chosen_tokens.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of MixtureOfDepths.
struct MixtureOfDepthsConfig {
  double capacity = 0.125;      ///< The share of a sequence's tokens that are processed.
  double predictor_loss = 0.0;  ///< Coefficient of the loss by which the choice is predicted.
  bool causal_evaluation =
      false;  ///< Whether, unless training, a prediction above 0 is the choice.

  /// \throws ConfigError  unless 0 < capacity <= 1 and predictor_loss is finite and >= 0.
  void check() const {
    if (!(capacity > 0.0 && capacity <= 1.0)) {
      fail<ConfigError>("MixtureOfDepths: capacity = ", capacity, ", expected 0 < capacity <= 1");
    }
    if (!(predictor_loss >= 0.0 && std::isfinite(predictor_loss))) {
      fail<ConfigError>("MixtureOfDepths: predictor_loss = ", predictor_loss,
                        ", expected a finite number >= 0");
    }
  }

  /// C = ceil(capacity * tokens).
  Index chosen(Index tokens) const {
    return std::min(tokens, static_cast<Index>(std::ceil(capacity * static_cast<double>(tokens))));
  }
};

namespace detail {

/// What decoding keeps for a layer: its own State, or nothing.
template <class L>
struct StateOf {
  struct type {};
};
template <class L>
requires requires {
  typename L::State;
}
struct StateOf<L> {
  using type = typename L::State;
};

}  // namespace detail

/// The absence of a predictor: scores predict the choice themselves.
struct NoPredictor {
  struct Cache {};
};

/// Sends the C highest-scoring tokens of each sequence through `Inner`, and leaves the others as
/// they are:
///
///     r_t = w x_t
///     y_t = x_t + r_t f(X~)_t     for the chosen,      y_t = x_t     for the others
///
/// w [1, d_model] is trained; X~ are the chosen tokens in their order, as sequences of their own:
/// tokens that are not chosen are not attended to either. f is what is added to x, without a
/// residual of its own. Equal scores: the earlier token. The choice is constant to the derivative;
/// w learns through r_t. Padding is never chosen, and y is x there.
///
/// Not causal: whether a token is chosen depends on all of its sequence, and a token that is
/// decoded cannot be ranked among later ones. So a logit p_t learns to predict the choice,
///
///     aux_loss = predictor_loss * mean_t BCE(sigmoid(p_t), [t was chosen])
///
/// over real tokens, and with `causal_evaluation` a pass that is not training, and `decode`, choose
/// the tokens with sigmoid(p_t) > 0.5, which depends on the token alone. They have no such loss:
/// there is nothing to predict. The logit is
///
///     p_t = r_t                         without a `Predictor`: the loss trains w, too
///     p_t = Predictor(stop(x))_t        a layer [tokens, d_model] -> [tokens, 1], such as
///                                       TokenPredictor: the loss trains nothing else
///
/// (Raposo et al. 2024, arXiv:2404.02258, eq. 1 and section 3.5, both of its methods.)
template <Layer Inner, class Predictor = NoPredictor>
class MixtureOfDepths {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;
  static constexpr bool kHasPredictor = !std::same_as<Predictor, NoPredictor>;

  /// What `decode` keeps of one sequence.
  struct State {
    using OfInner = typename detail::StateOf<Inner>::type;

    std::vector<std::uint8_t> chosen;  ///< One for each token so far, 1 if it was chosen.
    OfInner inner;                     ///< Of the chosen.

    Index length() const { return static_cast<Index>(chosen.size()); }

    /// Forgets all tokens but the first `to`.
    /// \throws ConfigError  unless 0 <= to <= length.
    /// \throws              What the inner layer's state throws.
    void truncate(Index to) {
      if (to < 0 || to > length()) {
        fail<ConfigError>("MixtureOfDepths::State::truncate: length = ", to, ", expected 0 to ",
                          length());
      }
      if constexpr (requires { inner.truncate(to); }) {
        inner.truncate(static_cast<Index>(std::count(chosen.begin(), chosen.begin() + to, 1)));
      }
      chosen.resize(static_cast<std::size_t>(to));
    }
  };

  /// What is chosen of the tokens, and what is computed.
  struct Cache : ChosenTokens<T> {
    typename Inner::Cache inner;
    std::vector<typename State::OfInner*> inner_states;
    typename Predictor::Cache predictor;
    Matrix<T> x;                               ///< [tokens, d_model]
    Matrix<T> score;                           ///< [tokens, 1]; zero for padding.
    Matrix<T> prediction;                      ///< [tokens, 1], the predictor's logits, if any.
    Matrix<T> d_prediction;                    ///< [tokens, 1]
    Matrix<T> real_x;                          ///< x with zeros for padding, where there is any.
    Matrix<T> chosen_x, chosen_y, d_chosen_y;  ///< [chosen, d_model]
    Matrix<T> d_score;                         ///< [tokens, 1]
    Matrix<T> y, dx;
    Matrix<T> inner_place, predictor_place;  ///< For results that come by value.
    T aux_loss = T(0);    ///< That of the predictor, times pass.aux_scale, and of the inner layer.
    T aux_scale = T(1);   ///< pass.aux_scale of the last forward pass.
    bool ranked = false;  ///< The choice was the best scores, not a prediction.
    bool filled = false;
  };

  /// w from N(0, 1 / d_model).
  /// \param inner    A layer [tokens, d_model] -> [tokens, d_model].
  /// \throws ConfigError  if d_model is below 1 or a setting out of range.
  MixtureOfDepths(Inner inner, Index d_model, Rng& rng,
                  MixtureOfDepthsConfig config = {}) requires(!kHasPredictor)
      : MixtureOfDepths(std::move(inner), initial(d_model, rng), config) {}

  /// \param weight   w, [1, d_model]
  /// \throws ConfigError  if a setting is out of range.
  /// \throws ShapeError   if w has another number of rows.
  MixtureOfDepths(Inner inner, Matrix<T> weight,
                  MixtureOfDepthsConfig config = {}) requires(!kHasPredictor)
      : MixtureOfDepths(std::move(inner), std::move(weight), config, NoPredictor{}) {}

  /// \param predictor A layer [tokens, d_model] -> [tokens, 1], trained if predictor_loss > 0.
  MixtureOfDepths(Inner inner, Index d_model, Rng& rng, MixtureOfDepthsConfig config,
                  Predictor predictor) requires kHasPredictor
      : MixtureOfDepths(std::move(inner), initial(d_model, rng), config, std::move(predictor)) {}

  MixtureOfDepths(Inner inner, Matrix<T> weight, MixtureOfDepthsConfig config, Predictor predictor)
      : config_(config),
        inner_(std::move(inner)),
        weight_{std::move(weight)},
        predictor_(std::move(predictor)) {
    config_.check();
    expect_shape("MixtureOfDepths", "weight", weight_.value, 1, weight_.value.cols());
  }

  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, d_model]
  /// \throws ShapeError      if x, pass.mask or pass.sequences do not fit, or if the inner layer
  ///                         yields another shape than it takes, the predictor not one column.
  /// \throws NonFiniteError  if the score of a real token, or its prediction, is not finite.
  /// \throws ConfigError     if pass.allowed is set and the inner layer has no `experts()`.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    const auto inner = [&](const Pass& inner_pass) -> const Matrix<T>& {
      return keep<T>(cache.inner_place, apply(inner_, cache.chosen_x, inner_pass, cache.inner));
    };
    run("MixtureOfDepths::forward", x, pass, cache, inner);
    cache.filled = true;
    return cache.y;
  }

  /// Continues several sequences at once, each by any number of tokens. Only the chosen tokens
  /// reach the inner layer, and its state.
  ///
  /// \param x        [new tokens, d_model], packed as pass.sequences says; null: one sequence.
  /// \param pass     Is taken as not training.
  /// \param states   One for each sequence, all different; they begin as `State{}`.
  /// \param cache    Workspace. It cannot be followed by `backward`.
  /// \return         [new tokens, d_model], what `forward` of the whole sequence gives, as far as
  ///                 the inner layer's `decode` does.
  /// \throws ConfigError     without causal_evaluation, or if a token is padding.
  /// \throws StateError      unless there is one state for each sequence.
  /// \throws ShapeError, NonFiniteError     as `forward`.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const {
    if (!config_.causal_evaluation) {
      fail<ConfigError>(
          "MixtureOfDepths::decode: causal_evaluation = false, expected true: a token cannot be "
          "ranked among later ones");
    }
    expect_columns("MixtureOfDepths::decode", "x", x, d_model());
    pass.check("MixtureOfDepths::decode", x.rows());
    expect_states<State>("MixtureOfDepths::decode", pass, states);
    Pass own = pass;
    own.training = false;
    cache.inner_states.clear();
    for (State* state : states) cache.inner_states.push_back(&state->inner);
    const std::span<typename State::OfInner* const> inner_states = cache.inner_states;
    const auto inner = [&](const Pass& inner_pass) -> const Matrix<T>& {
      if constexpr (requires {
                      inner_.decode(cache.chosen_x, inner_pass, inner_states, cache.inner);
                    }) {
        return keep<T>(cache.inner_place,
                       inner_.decode(cache.chosen_x, inner_pass, inner_states, cache.inner));
      } else {
        return keep<T>(cache.inner_place, apply(inner_, cache.chosen_x, inner_pass, cache.inner));
      }
    };
    const Matrix<T>& y = run("MixtureOfDepths::decode", x, own, cache, inner);
    for_each_sequence(pass, x.rows(), [&](Index s, Index begin, Index end) {
      std::vector<std::uint8_t>& chosen = states[static_cast<std::size_t>(s)]->chosen;
      chosen.insert(chosen.end(), cache.chosen.begin() + begin, cache.chosen.begin() + end);
    });
    return y;
  }

  /// The same for one sequence.
  const Matrix<T>& decode(MatrixIn<T> x, State& state, Cache& cache) const {
    State* const states[] = {&state};
    return decode(x, {}, states, cache);
  }

  /// With the chosen t: dr_t = dy_t . f(X~)_t, df_t = r_t dy_t, dx_t = dy_t + dX~_t + dr_t w; and
  /// dw = sum_t dr_t x_t. The loss of predictions adds to dr of all real tokens, if those are the
  /// scores, or to the predictor's gradients alone.
  /// \throws StateError   if the last forward pass with `cache` did not succeed, or there was none.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    if (!cache.filled) {
      fail<StateError>(
          "MixtureOfDepths::backward: the cache is empty, expected a forward pass before");
    }
    expect_shape("MixtureOfDepths::backward", "dy", dy, cache.x.rows(), d_model());
    const Index count = cache.chosen_count();
    copy_rows<T>(dy, cache.dx);
    start_score_gradient(cache);
    cache.d_chosen_y.resize(count, d_model());
    parallel_rows(count, 3 * d_model(), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const Index t = cache.token_of(i);
        const T* const d = &dy.coeffRef(t, 0);
        cache.d_score(t, 0) += loops::dot<T>(d_model(), d, &cache.chosen_y(i, 0));
        loops::scale<T>(d_model(), cache.score(t, 0), d, &cache.d_chosen_y(i, 0));
      }
    });
    if (count > 0) {
      const Matrix<T>& d_inner =
          keep<T>(cache.inner_place, inner_.backward(cache.d_chosen_y, cache.inner));
      for (Index i = 0; i < count; ++i) {
        loops::add_scaled<T>(d_model(), T(1), &d_inner(i, 0), &cache.dx(cache.token_of(i), 0));
      }
    }
    parallel_rows(dy.rows(), 2 * d_model(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (cache.is_real(t)) {
          loops::add_scaled<T>(d_model(), cache.d_score(t, 0), weight_.value.data(),
                               &cache.dx(t, 0));
        }
      }
    });
    add_over_rows<T>(dy.rows(), d_model(), weight_.gradient().data(),
                     [&](Index t, Index col, Index lanes) -> Lanes<T> {
                       if (!cache.is_real(t)) return Lanes<T>{};
                       return cache.d_score(t, 0) * load_lanes<T>(&cache.x(t, col), lanes);
                     });
    return cache.dx;
  }

  /// See MoELayer::update.
  void update() {
    if constexpr (requires { inner_.update(); }) inner_.update();
  }

  /// Parameters `router`, `inner.*` and, if there is a predictor, `predictor.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("router", self.weight_);
    visit("inner", self.inner_);
    if constexpr (kHasPredictor) visit("predictor", self.predictor_);
  }

  Index d_model() const { return weight_.value.cols(); }
  const MixtureOfDepthsConfig& config() const { return config_; }
  Inner& inner() { return inner_; }
  const Inner& inner() const { return inner_; }
  Predictor& predictor() requires kHasPredictor { return predictor_; }
  const Predictor& predictor() const requires kHasPredictor { return predictor_; }

 private:
  static Matrix<T> initial(Index d_model, Rng& rng) {
    expect_at_least<Index>("MixtureOfDepths", "d_model", d_model, 1);
    return normal_init<T>(1, d_model, 1.0 / std::sqrt(static_cast<double>(d_model)), rng);
  }

  /// What `forward` and `decode` have in common; `run_inner(inner pass)` is f(cache.chosen_x).
  template <class RunInner>
  const Matrix<T>& run(std::string_view where, MatrixIn<T> x, const Pass& pass, Cache& cache,
                       RunInner&& run_inner) const {
    expect_columns(where, "x", x, d_model());
    pass.check(where, x.rows());
    cache.filled = false;
    copy_rows<T>(x, cache.x);
    copy_rows<T>(x, cache.y);
    cache.begin(pass, x.rows());
    score(cache);
    cache.ranked = pass.training || !config_.causal_evaluation;
    predict(where, pass, cache);
    if (cache.ranked) {
      cache.choose_best(cache.score, pass, [&](Index tokens) { return config_.chosen(tokens); });
    } else {
      cache.choose_positive(prediction(cache), pass);
    }

    const Index count = cache.chosen_count();
    cache.chosen_x.resize(count, d_model());
    for (Index i = 0; i < count; ++i) cache.chosen_x.row(i) = x.row(cache.token_of(i));
    cache.aux_scale = static_cast<T>(pass.aux_scale);
    cache.aux_loss = T(0);
    if (has_loss(cache)) {
      cache.aux_loss = cache.aux_scale *
                       static_cast<T>(config_.predictor_loss *
                                      choice_loss<T>(prediction(cache), cache.chosen, cache.real));
    }
    cache.chosen_y.resize(count, d_model());
    if (count > 0) {
      const Matrix<T>& out = run_inner(cache.pass_of_chosen(pass, experts_for(pass)));
      expect_shape(where, "the inner layer's output", out, count, d_model());
      copy_rows<T>(out, cache.chosen_y);
      if constexpr (requires { cache.inner.aux_loss; }) cache.aux_loss += cache.inner.aux_loss;
    }
    parallel_rows(count, 2 * d_model(), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const Index t = cache.token_of(i);
        loops::add_scaled<T>(d_model(), cache.score(t, 0), &cache.chosen_y(i, 0), &cache.y(t, 0));
      }
    });
    return cache.y;
  }

  /// How many experts pass.allowed is about: with it set, the inner layer has to tell, or else
  /// there is no knowing whether it is for each token.
  Index experts_for([[maybe_unused]] const Pass& pass) const {
    if constexpr (requires { inner_.experts(); }) {
      return inner_.experts();
    } else {
      if (pass.allowed.empty()) return 0;
      fail<ConfigError>(
          "MixtureOfDepths::forward: pass.allowed is set, expected none around a layer without "
          "experts()");
    }
  }

  /// Whether the pass has a loss of its predictions.
  bool has_loss(const Cache& cache) const { return cache.ranked && config_.predictor_loss > 0.0; }

  /// p [tokens, 1]
  static const Matrix<T>& prediction(const Cache& cache) {
    return kHasPredictor ? cache.prediction : cache.score;
  }

  /// Runs the predictor where it is wanted. Padding may hold anything, and 0 * NaN would spoil the
  /// gradient of the predictor's weights.
  void predict([[maybe_unused]] std::string_view where, [[maybe_unused]] const Pass& pass,
               Cache& cache) const {
    if constexpr (kHasPredictor) {
      if (cache.ranked && !has_loss(cache)) return;
      const Matrix<T>* from = &cache.x;
      if (!pass.mask.empty()) {
        copy_rows<T>(cache.x, cache.real_x);
        for (Index t = 0; t < cache.x.rows(); ++t) {
          if (!cache.is_real(t)) cache.real_x.row(t).setZero();
        }
        from = &cache.real_x;
      }
      const Matrix<T>& p =
          keep<T>(cache.predictor_place, apply(predictor_, *from, pass, cache.predictor));
      expect_shape(where, "the predictor's output", p, cache.x.rows(), 1);
      copy_rows<T>(p, cache.prediction);
      for (Index t = 0; t < p.rows(); ++t) {
        if (cache.is_real(t) && !std::isfinite(cache.prediction(t, 0))) {
          fail<NonFiniteError>(where, ": the prediction for token ", t, " is ",
                               cache.prediction(t, 0), ", expected a finite number");
        }
      }
    }
  }

  void score(Cache& cache) const {
    cache.score.resize(cache.x.rows(), 1);
    for (Index t = 0; t < cache.x.rows(); ++t) {
      cache.score(t, 0) =
          cache.is_real(t) ? loops::dot<T>(d_model(), &cache.x(t, 0), weight_.value.data()) : T(0);
      if (!std::isfinite(cache.score(t, 0))) {
        fail<NonFiniteError>("MixtureOfDepths: the score of token ", t, " is ", cache.score(t, 0),
                             ", expected a finite number");
      }
    }
  }

  /// Starts d_score with what the loss of predictions makes of it, or trains the predictor.
  void start_score_gradient(Cache& cache) {
    cache.d_score.setZero(cache.score.rows(), 1);
    if (!has_loss(cache)) return;
    const T factor = cache.aux_scale * static_cast<T>(config_.predictor_loss);
    if constexpr (kHasPredictor) {
      cache.d_prediction.resize(cache.score.rows(), 1);
      choice_loss_backward<T>(cache.prediction, cache.chosen, cache.real, factor,
                              cache.d_prediction);
      predictor_.backward(cache.d_prediction, cache.predictor);
    } else {
      choice_loss_backward<T>(cache.score, cache.chosen, cache.real, factor, cache.d_score);
    }
  }

  MixtureOfDepthsConfig config_;
  Inner inner_;
  Parameter<T> weight_;  // [1, d_model]
  [[no_unique_address]] Predictor predictor_;
};

}  // namespace weir
