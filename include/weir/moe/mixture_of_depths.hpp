// SPDX-License-Identifier: MIT
/// \file
/// Mixture of depths: a layer that only some tokens pass through.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/scratch.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// Settings of MixtureOfDepths.
struct MixtureOfDepthsConfig {
  double capacity = 0.125;      ///< The share of a sequence's tokens that are processed.
  double predictor_loss = 0.0;  ///< Coefficient of the loss that makes scores predict the choice.
  bool causal_evaluation = false;  ///< Whether, unless training, a score above 0 is the choice.

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
/// Not causal: whether a token is chosen depends on all of its sequence. For sampling, with
/// `predictor_loss` > 0 the scores also learn to predict the choice,
///
///     aux_loss = predictor_loss * mean_t BCE(sigmoid(r_t), [t was chosen])
///
/// over real tokens, and with `causal_evaluation` a pass that is not training chooses the tokens
/// with r_t > 0, which depends on the token alone.
/// (Raposo et al. 2024, arXiv:2404.02258, eq. 1 and section 3.5, the first of its two methods; the
/// second, a network of its own that predicts the choice, is not here.)
template <Layer Inner>
class MixtureOfDepths {
 public:
  using Scalar = typename Inner::Scalar;
  using T = Scalar;

  struct Cache {
    typename Inner::Cache inner;
    Matrix<T> x;                               ///< [tokens, d_model]
    Matrix<T> score;                           ///< [tokens, 1]; zero for padding.
    std::vector<Index> token;                  ///< Of each chosen one, in order.
    std::vector<Index> token_ids;              ///< Their ids, where the pass knows ids.
    std::vector<std::uint8_t> chosen;          ///< [tokens], 1 for the chosen.
    std::vector<std::uint8_t> allowed;         ///< pass.allowed of the chosen.
    std::vector<std::uint8_t> real;            ///< [tokens], 0 for padding.
    Sequences sequences;                       ///< Of the chosen.
    Matrix<T> chosen_x, chosen_y, d_chosen_y;  ///< [chosen, d_model]
    Matrix<T> d_score;                         ///< [tokens, 1]
    Matrix<T> y, dx;
    Matrix<T> inner_place;     ///< For results that the inner layer returns by value.
    std::vector<T> candidate;  ///< Workspace of the choice.
    std::vector<Index> place, best;
    T aux_loss = T(0);   ///< That of the predictor, times pass.aux_scale, and of the inner layer.
    T aux_scale = T(1);  ///< pass.aux_scale of the last forward pass.
    bool filled = false;
  };

  /// w from N(0, 1 / d_model).
  /// \param inner    A layer [tokens, d_model] -> [tokens, d_model].
  /// \throws ConfigError  if d_model is below 1 or a setting out of range.
  MixtureOfDepths(Inner inner, Index d_model, Rng& rng, MixtureOfDepthsConfig config = {})
      : MixtureOfDepths(std::move(inner), initial(d_model, rng), config) {}

  /// \param weight   w, [1, d_model]
  /// \throws ConfigError  if a setting is out of range.
  /// \throws ShapeError   if w has another number of rows.
  MixtureOfDepths(Inner inner, Matrix<T> weight, MixtureOfDepthsConfig config = {})
      : config_(config), inner_(std::move(inner)), weight_{std::move(weight)} {
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
  ///                         yields another shape than it takes.
  /// \throws NonFiniteError  if the score of a real token is not finite.
  /// \throws ConfigError     if pass.allowed is set and the inner layer has no `experts()`.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    expect_columns("MixtureOfDepths::forward", "x", x, d_model());
    pass.check("MixtureOfDepths::forward", x.rows());
    cache.filled = false;
    copy_rows<T>(x, cache.x);
    copy_rows<T>(x, cache.y);
    score(pass, cache);
    choose(pass, cache);

    const auto count = static_cast<Index>(cache.token.size());
    cache.chosen_x.resize(count, d_model());
    for (Index i = 0; i < count; ++i) cache.chosen_x.row(i) = x.row(token(cache, i));
    cache.aux_loss = predictor_loss(cache) * static_cast<T>(pass.aux_scale);
    cache.aux_scale = static_cast<T>(pass.aux_scale);
    cache.chosen_y.resize(count, d_model());
    if (count > 0) {
      Pass inner_pass = pass;
      inner_pass.sequences = &cache.sequences;
      inner_pass.mask = {};
      if (!pass.token_ids.empty()) {
        cache.token_ids.clear();
        for (const Index t : cache.token) {
          cache.token_ids.push_back(pass.token_ids[static_cast<std::size_t>(t)]);
        }
        inner_pass.token_ids = cache.token_ids;
      }
      inner_pass.allowed = allowed_of_chosen(pass, cache);
      const Matrix<T>& out =
          keep<T>(cache.inner_place, apply(inner_, cache.chosen_x, inner_pass, cache.inner));
      expect_shape("MixtureOfDepths::forward", "the inner layer's output", out, count, d_model());
      copy_rows<T>(out, cache.chosen_y);
      if constexpr (requires { cache.inner.aux_loss; }) cache.aux_loss += cache.inner.aux_loss;
    }
    parallel_rows(count, 2 * d_model(), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const Index t = token(cache, i);
        add(cache.score(t, 0), &cache.chosen_y(i, 0), &cache.y(t, 0));
      }
    });
    cache.filled = true;
    return cache.y;
  }

  /// With the chosen t: dr_t = dy_t . f(X~)_t, df_t = r_t dy_t, dx_t = dy_t + dX~_t + dr_t w; and
  /// dw = sum_t dr_t x_t. The predictor's loss adds to dr of all real tokens.
  /// \throws StateError   if the last forward pass with `cache` did not succeed, or there was none.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    if (!cache.filled) {
      fail<StateError>(
          "MixtureOfDepths::backward: the cache is empty, expected a forward pass before");
    }
    expect_shape("MixtureOfDepths::backward", "dy", dy, cache.x.rows(), d_model());
    const auto count = static_cast<Index>(cache.token.size());
    copy_rows<T>(dy, cache.dx);
    add_predictor_gradient(cache);
    cache.d_chosen_y.resize(count, d_model());
    parallel_rows(count, 3 * d_model(), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        const Index t = token(cache, i);
        const T* const d = &dy.coeffRef(t, 0);
        cache.d_score(t, 0) += dot(d, &cache.chosen_y(i, 0));
        const auto scale = [r = cache.score(t, 0)](const Lanes<T>& v) -> Lanes<T> { return r * v; };
        map_lanes<T>(d_model(), scale, &cache.d_chosen_y(i, 0), d);
      }
    });
    if (count > 0) {
      const Matrix<T>& d_inner =
          keep<T>(cache.inner_place, inner_.backward(cache.d_chosen_y, cache.inner));
      for (Index i = 0; i < count; ++i) add(T(1), &d_inner(i, 0), &cache.dx(token(cache, i), 0));
    }
    parallel_rows(dy.rows(), 2 * d_model(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        if (is_real(cache, t)) add(cache.d_score(t, 0), weight_.value.data(), &cache.dx(t, 0));
      }
    });
    add_over_rows<T>(dy.rows(), d_model(), weight_.gradient().data(),
                     [&](Index t, Index col, Index lanes) -> Lanes<T> {
                       if (!is_real(cache, t)) return Lanes<T>{};
                       return cache.d_score(t, 0) * load_lanes<T>(&cache.x(t, col), lanes);
                     });
    return cache.dx;
  }

  /// See MoELayer::update.
  void update() {
    if constexpr (requires { inner_.update(); }) inner_.update();
  }

  /// Parameters `router` and `inner.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("router", self.weight_);
    visit("inner", self.inner_);
  }

  Index d_model() const { return weight_.value.cols(); }
  const MixtureOfDepthsConfig& config() const { return config_; }
  Inner& inner() { return inner_; }
  const Inner& inner() const { return inner_; }

 private:
  static Matrix<T> initial(Index d_model, Rng& rng) {
    expect_at_least<Index>("MixtureOfDepths", "d_model", d_model, 1);
    return normal_init<T>(1, d_model, 1.0 / std::sqrt(static_cast<double>(d_model)), rng);
  }

  static Index token(const Cache& cache, Index i) {
    return cache.token[static_cast<std::size_t>(i)];
  }
  static bool is_real(const Cache& cache, Index t) {
    return cache.real[static_cast<std::size_t>(t)] != 0;
  }

  T dot(const T* a, const T* b) const {
    const auto product = [](const Lanes<T>& u, const Lanes<T>& v) -> Lanes<T> { return u * v; };
    return sum_lanes<T>(d_model(), product, a, b);
  }

  /// sum += factor * row.
  void add(T factor, const T* row, T* sum) const {
    const auto f = [factor](const Lanes<T>& a, const Lanes<T>& b) -> Lanes<T> {
      return a + factor * b;
    };
    map_lanes<T>(d_model(), f, sum, sum, row);
  }

  /// pass.allowed for the inner layer, which has to tell its number of experts: else there is no
  /// knowing whether it is for each token.
  std::span<const std::uint8_t> allowed_of_chosen(const Pass& pass, Cache& cache) const {
    if (pass.allowed.empty()) return {};
    if constexpr (requires { inner_.experts(); }) {
      const auto experts = static_cast<std::size_t>(inner_.experts());
      if (pass.allowed.size() != experts * cache.chosen.size()) return pass.allowed;
      cache.allowed.clear();
      for (const Index t : cache.token) {
        const auto row = pass.allowed.begin() + t * inner_.experts();
        cache.allowed.insert(cache.allowed.end(), row, row + inner_.experts());
      }
      return cache.allowed;
    } else {
      fail<ConfigError>(
          "MixtureOfDepths::forward: pass.allowed is set, expected none around a layer without "
          "experts()");
    }
  }

  void score(const Pass& pass, Cache& cache) const {
    const Index tokens = cache.x.rows();
    cache.real.resize(static_cast<std::size_t>(tokens));
    cache.score.resize(tokens, 1);
    for (Index t = 0; t < tokens; ++t) {
      const bool real = !pass.is_padding(t);
      cache.real[static_cast<std::size_t>(t)] = real ? 1 : 0;
      cache.score(t, 0) = real ? dot(&cache.x(t, 0), weight_.value.data()) : T(0);
      if (!std::isfinite(cache.score(t, 0))) {
        fail<NonFiniteError>("MixtureOfDepths: the score of token ", t, " is ", cache.score(t, 0),
                             ", expected a finite number");
      }
    }
  }

  void choose(const Pass& pass, Cache& cache) const {
    const Index tokens = cache.x.rows();
    cache.chosen.assign(static_cast<std::size_t>(tokens), 0);
    cache.token.clear();
    cache.sequences.clear();
    const Index count = pass.sequences != nullptr ? pass.sequences->count() : 1;
    for (Index s = 0; s < count; ++s) {
      const Index begin = pass.sequences != nullptr ? pass.sequences->begin(s) : 0;
      const Index end = pass.sequences != nullptr ? pass.sequences->end(s) : tokens;
      cache.candidate.clear();
      cache.place.clear();
      for (Index t = begin; t < end; ++t) {
        if (!is_real(cache, t)) continue;
        cache.candidate.push_back(cache.score(t, 0));
        cache.place.push_back(t);
      }
      const auto candidates = static_cast<Index>(cache.place.size());
      if (config_.causal_evaluation && !pass.training) {
        for (const Index t : cache.place) {
          if (cache.score(t, 0) > T(0)) cache.chosen[static_cast<std::size_t>(t)] = 1;
        }
      } else {
        cache.best.resize(static_cast<std::size_t>(config_.chosen(candidates)));
        top_k(cache.candidate.data(), candidates, static_cast<Index>(cache.best.size()),
              cache.best.data());
        for (const Index i : cache.best) {
          cache.chosen[static_cast<std::size_t>(cache.place[static_cast<std::size_t>(i)])] = 1;
        }
      }
      const auto before = static_cast<Index>(cache.token.size());
      for (Index t = begin; t < end; ++t) {
        if (cache.chosen[static_cast<std::size_t>(t)] != 0) cache.token.push_back(t);
      }
      cache.sequences.append(static_cast<Index>(cache.token.size()) - before);
    }
  }

  static Index real_tokens(const Cache& cache) {
    return std::count(cache.real.begin(), cache.real.end(), std::uint8_t{1});
  }

  /// BCE(sigmoid(r), c) = max(r, 0) - r c + ln(1 + exp(-|r|)).
  T predictor_loss(const Cache& cache) const {
    const Index real = real_tokens(cache);
    if (config_.predictor_loss == 0.0 || real == 0) return T(0);
    double sum = 0.0;
    for (Index t = 0; t < cache.score.rows(); ++t) {
      if (!is_real(cache, t)) continue;
      const auto r = static_cast<double>(cache.score(t, 0));
      const double target = cache.chosen[static_cast<std::size_t>(t)];
      sum += std::max(r, 0.0) - r * target + std::log1p(std::exp(-std::abs(r)));
    }
    return static_cast<T>(config_.predictor_loss * sum / static_cast<double>(real));
  }

  /// Starts d_score: (sigmoid(r) - c) times the coefficient over the number of real tokens.
  void add_predictor_gradient(Cache& cache) const {
    cache.d_score.setZero(cache.score.rows(), 1);
    const Index real = real_tokens(cache);
    if (config_.predictor_loss == 0.0 || real == 0) return;
    const T factor =
        cache.aux_scale * static_cast<T>(config_.predictor_loss) / static_cast<T>(real);
    for (Index t = 0; t < cache.score.rows(); ++t) {
      if (!is_real(cache, t)) continue;
      const T probability = T(1) / (T(1) + std::exp(-cache.score(t, 0)));
      const auto target = static_cast<T>(cache.chosen[static_cast<std::size_t>(t)]);
      cache.d_score(t, 0) = factor * (probability - target);
    }
  }

  MixtureOfDepthsConfig config_;
  Inner inner_;
  Parameter<T> weight_;  // [1, d_model]
};

}  // namespace weir
