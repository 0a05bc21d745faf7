// SPDX-License-Identifier: MIT
/// \file
/// Mixture of depths: a layer that only some tokens pass through.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstdint>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/decoding.hpp>
#include <weir/core/error.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/depths/depth_choice.hpp>
#include <weir/moe/depths/token_part.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

namespace detail {

/// What decoding keeps for a layer: its own State, or nothing.
template <class L>
struct StateOf {
  struct Type {
    void truncate(Index /*length*/) {}
  };
};
template <DecodingLayer L>
struct StateOf<L> {
  using Type = typename L::State;
};

}  // namespace detail

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
///     loss = predictor_loss * mean_t BCE(sigmoid(p_t), [t was chosen])
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
  using Choice = DepthChoice<T, Predictor>;

  /// What `decode` keeps of one sequence.
  struct State {
    using OfInner = typename detail::StateOf<Inner>::Type;

    List<std::uint8_t> chosen;  ///< One for each token so far, 1 if it was chosen.
    OfInner inner;              ///< What the inner layer keeps of the chosen.

    State() = default;
    /// \param storage  How the inner layer stores it.
    explicit State(CacheStorage storage) : inner(state_with<OfInner>(storage)) {}

    Index length() const { return chosen.count(); }

    /// Forgets all tokens but the first `to`.
    /// \throws ConfigError  unless 0 <= to <= length.
    /// \throws              What the inner layer's state throws.
    void truncate(Index to) {
      expect_in<Index>("MixtureOfDepths::State::truncate", "length", to, 0, length());
      inner.truncate(std::count(chosen.begin(), chosen.begin() + to, std::uint8_t{1}));
      chosen.resize(to);
    }
  };

  struct Cache {
    CacheState state;
    typename Choice::Cache choice;
    typename Inner::Cache inner;
    std::vector<typename State::OfInner*> inner_states;
    Matrix<T> part_x, part_y, d_part_y;  ///< [chosen, d_model]
    Matrix<T> y, dx;
  };

  /// w from N(0, 1 / d_model).
  /// \param inner    A layer [tokens, d_model] -> [tokens, d_model].
  /// \param predictor A layer [tokens, d_model] -> [tokens, 1], trained if predictor_loss > 0.
  /// \throws ConfigError  if d_model is below 1 or a setting out of range.
  MixtureOfDepths(Inner inner, Index d_model, Rng& rng, MixtureOfDepthsConfig config = {},
                  Predictor predictor = {})
      : MixtureOfDepths(std::move(inner), Choice::initial_weight(d_model, rng), config,
                        std::move(predictor)) {}

  /// \param weight   w, [1, d_model]
  /// \throws ConfigError  if a setting is out of range.
  /// \throws ShapeError   if w has another number of rows.
  MixtureOfDepths(Inner inner, Matrix<T> weight, MixtureOfDepthsConfig config = {},
                  Predictor predictor = {})
      : choice_(std::move(weight), config, std::move(predictor)), inner_(std::move(inner)) {}

  /// \param x        [tokens, d_model]
  /// \return         [tokens, d_model]
  /// \throws ShapeError      if x, pass.mask or pass.sequences do not fit, or if the inner layer
  ///                         yields another shape than it takes, the predictor not one column.
  /// \throws NonFiniteError  if the score of a real token, or its prediction, is not finite.
  /// \throws ConfigError     if pass.allowed is set and the inner layer has no `experts()`.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    const Matrix<T>& y = run("MixtureOfDepths::forward", x, pass, cache,
                             [&](const Pass& inner_pass) -> const Matrix<T>& {
                               return inner_.forward(cache.part_x, inner_pass, cache.inner);
                             });
    return cache.state.finish(*this, pass, y);
  }

  /// With the chosen t: dr_t = dy_t . f(X~)_t, df_t = r_t dy_t, dx_t = dy_t + dX~_t + dr_t w; and
  /// dw = sum_t dr_t x_t. The loss of predictions adds to dr of all real tokens, if those are the
  /// scores, or to the predictor's gradients alone.
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    cache.state.begin_backward("MixtureOfDepths::backward", *this, dy);
    typename Choice::Cache& choice = cache.choice;
    copy_rows<T>(dy, cache.dx);
    choice_.begin_backward(choice);
    set_shape(cache.d_part_y, choice.part.count(), d_model());
    parallel_rows(choice.part.count(), 3 * d_model(), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const Index t = choice.part.token[i];
        const T* const d = &dy.coeffRef(t, 0);
        choice.d_score(t, 0) += loops::dot<T>(d_model(), d, &cache.part_y(i, 0));
        loops::scale<T>(d_model(), choice.score(t, 0), d, &cache.d_part_y(i, 0));
      }
    });
    if (choice.part.count() > 0) {
      choice.part.add_to(inner_.backward(cache.d_part_y, cache.inner), cache.dx);
    }
    choice_.backward(choice, cache.dx);
    return cache.dx;
  }

  /// Continues several sequences at once, each by any number of tokens. Only the chosen tokens
  /// reach the inner layer, and its state.
  ///
  /// \param x        [new tokens, d_model], packed as pass.sequences says; null: one sequence.
  /// \param pass     Counts as one that does not train.
  /// \param states   One for each sequence, all different; they begin as `State{}`.
  /// \param cache    Workspace. It cannot be followed by `backward`.
  /// \return         [new tokens, d_model], what `forward` of the whole sequence gives, as far as
  ///                 the inner layer's `decode` does.
  /// \throws ConfigError     without causal_evaluation, or if a token is padding.
  /// \throws StateError      unless there is one state for each sequence.
  /// \throws ShapeError, NonFiniteError     as `forward`.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const {
    cache.state.begin();
    if (!config().causal_evaluation) {
      throw_error<ConfigError>(
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
    const Matrix<T>& y = run("MixtureOfDepths::decode", x, own, cache,
                             [&](const Pass& inner_pass) -> const Matrix<T>& {
                               return decode_inner(inner_pass, cache);
                             });
    const TokenPart<T>& part = cache.choice.part;
    auto state = states.begin();
    part.rows.for_each_group(Scope::kSequence, [&](Index begin, Index end) {
      List<std::uint8_t>& chosen = (*state++)->chosen;
      chosen.insert(chosen.end(), part.chosen.begin() + begin, part.chosen.begin() + end);
    });
    return y;
  }

  /// Parameters `router`, `inner.*` and, if there is a predictor, `predictor.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("router", self.choice_.weight());
    visit("inner", self.inner_);
    if constexpr (Choice::kHasPredictor) visit("predictor", self.choice_.predictor());
  }
  /// The choice keeps full precision in every storage.
  template <class Self, class Visit>
  static void visit_stored(Self& self, Visit& visit) {
    visit("inner", self.inner_);
  }

  Index d_model() const { return choice_.d_model(); }
  const MixtureOfDepthsConfig& config() const { return choice_.config(); }
  Inner& inner() { return inner_; }
  const Inner& inner() const { return inner_; }
  Predictor& predictor() { return choice_.predictor(); }
  const Predictor& predictor() const { return choice_.predictor(); }

 private:
  /// What `forward` and `decode` have in common; `run_inner(inner pass)` is f(cache.part_x).
  template <class RunInner>
  const Matrix<T>& run(std::string_view where, MatrixIn<T> x, const Pass& pass, Cache& cache,
                       RunInner&& run_inner) const {
    expect_columns(where, "x", x, d_model());
    choice_.forward(where, x, pass, cache.choice);
    TokenPart<T>& part = cache.choice.part;
    copy_rows<T>(x, cache.y);
    if (part.count() == 0) return cache.y;
    part.gather(x, cache.part_x);
    const PassRecord::Scope scope(pass.record, "inner");
    const Matrix<T>& f = run_inner(part.pass_of_part(where, pass, experts_of_inner()));
    expect_shape(where, "the inner layer's output", f, part.count(), d_model());
    if (pass.training) copy_rows<T>(f, cache.part_y);
    parallel_rows(part.count(), 2 * d_model(), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const Index t = part.token[i];
        loops::add_scaled<T>(d_model(), cache.choice.score(t, 0), &f(i, 0), &cache.y(t, 0));
      }
    });
    return cache.y;
  }

  const Matrix<T>& decode_inner(const Pass& pass, Cache& cache) const {
    if constexpr (DecodingLayer<Inner>) {
      return inner_.decode(cache.part_x, pass, cache.inner_states, cache.inner);
    } else {
      return inner_.forward(cache.part_x, pass, cache.inner);
    }
  }

  /// How many experts pass.allowed is about; 0 if the inner layer does not say.
  Index experts_of_inner() const {
    if constexpr (HasExperts<Inner>) {
      return inner_.experts();
    } else {
      return 0;
    }
  }

  Choice choice_;
  Inner inner_;
};

}  // namespace weir
