// SPDX-License-Identifier: MIT
/// \file
/// Which tokens MixtureOfDepths sends through its layer.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <string_view>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/moe/depths/choice_loss.hpp>
#include <weir/moe/depths/token_part.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of MixtureOfDepths.
struct MixtureOfDepthsConfig {
  double capacity = 0.125;         ///< The share of a sequence's tokens that are processed.
  double predictor_loss = 0.0;     ///< Coefficient of the loss by which the choice is predicted.
  bool causal_evaluation = false;  ///< A pass that does not train chooses by a prediction above 0.

  /// \throws ConfigError  unless 0 < capacity <= 1 and predictor_loss is finite and >= 0.
  void check() const {
    if (!(capacity > 0.0 && capacity <= 1.0)) {
      throw_error<ConfigError>("MixtureOfDepths: capacity = ", capacity,
                               ", expected 0 < capacity <= 1");
    }
    expect_at_least("MixtureOfDepths", "predictor_loss", predictor_loss, 0.0);
  }

  /// C = ceil(capacity * tokens).
  Index chosen(Index tokens) const {
    return std::min(tokens, static_cast<Index>(std::ceil(capacity * static_cast<double>(tokens))));
  }
};

/// The absence of a predictor: scores predict the choice themselves.
struct NoPredictor {
  struct Cache {};
};

/// Scores tokens, r_t = w x_t, and chooses the C best of each sequence; or, in a pass that does not
/// train and with `causal_evaluation`, those whose prediction p_t is above 0. See MixtureOfDepths
/// for the formulas.
template <std::floating_point T, class Predictor = NoPredictor>
class DepthChoice {
 public:
  using Scalar = T;
  static constexpr bool kHasPredictor = !std::same_as<Predictor, NoPredictor>;

  struct Cache {
    TokenPart<T> part;    ///< What is chosen.
    Matrix<T> score;      ///< r, [tokens, 1]; zero for padding.
    Matrix<T> d_score;    ///< [tokens, 1]
    bool ranked = false;  ///< The best scores were chosen, not positive predictions.
    Matrix<T> x;          ///< [tokens, d_model], in training.

    typename Predictor::Cache predictor;
    Matrix<T> real_x;                    ///< x with zeros for padding, where there is any.
    Matrix<T> prediction, d_prediction;  ///< [tokens, 1], where there is a predictor.
    T loss_scale = T(0);  ///< What the gradient of the loss of predictions is multiplied by.
  };

  /// \param weight   w, [1, d_model]
  /// \throws ConfigError  if a setting is out of range.
  /// \throws ShapeError   if w has another number of rows.
  DepthChoice(Matrix<T> weight, MixtureOfDepthsConfig config, Predictor predictor = {})
      : config_(config), weight_{std::move(weight)}, predictor_(std::move(predictor)) {
    config_.check();
    expect_shape("MixtureOfDepths", "weight", weight_.value, 1, weight_.value.cols());
  }

  /// w from N(0, 1 / d_model).
  static Matrix<T> initial_weight(Index d_model, Rng& rng) {
    expect_at_least<Index>("MixtureOfDepths", "d_model", d_model, 1);
    return normal_init<T>(1, d_model, 1.0 / std::sqrt(static_cast<double>(d_model)), rng);
  }

  /// Sets `cache.part` and `cache.score`.
  void forward(std::string_view where, MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.part.begin(where, pass, x.rows());
    if (pass.training) copy_rows<T>(x, cache.x);
    score(where, x, cache);
    cache.ranked = pass.training || !config_.causal_evaluation;
    const bool has_loss = cache.ranked && config_.predictor_loss > 0.0 && pass.has_aux_losses();
    cache.loss_scale = has_loss ? static_cast<T>(pass.aux_scale * config_.predictor_loss) : T(0);
    if (has_loss || !cache.ranked) predict(where, x, pass, cache);
    if (cache.ranked) {
      cache.part.choose_best(cache.score, [&](Index tokens) { return config_.chosen(tokens); });
    } else {
      cache.part.choose_positive(prediction(cache));
    }
    if (has_loss && pass.record != nullptr) {
      pass.record->add_loss(
          "predictor", static_cast<double>(cache.loss_scale) *
                           choice_loss<T>(prediction(cache), cache.part.chosen, cache.part.rows));
    }
  }

  /// Starts `cache.d_score` with what the loss of predictions makes of it, or trains the predictor.
  void begin_backward(Cache& cache) {
    set_zero(cache.d_score, cache.score.rows(), 1);
    if (cache.loss_scale == T(0)) return;
    if constexpr (kHasPredictor) {
      set_shape(cache.d_prediction, cache.score.rows(), 1);
      choice_loss_backward<T>(cache.prediction, cache.part.chosen, cache.part.rows,
                              cache.loss_scale, cache.d_prediction);
      predictor_.backward(cache.d_prediction, cache.predictor);
    } else {
      choice_loss_backward<T>(cache.score, cache.part.chosen, cache.part.rows, cache.loss_scale,
                              cache.d_score);
    }
  }

  /// Carries `cache.d_score` on: adds dr_t w to dx_t, and sum_t dr_t x_t to dw.
  void backward(Cache& cache, Matrix<T>& dx) {
    const Index d = weight_.value.cols();
    cache.part.rows.for_each_real(2 * d, [&](Index t) {
      loops::add_scaled<T>(d, cache.d_score(t, 0), weight_.value.data(), &dx(t, 0));
    });
    add_over_rows<T>(dx.rows(), d, weight_.gradient().data(),
                     [&](Index t, Index col, Index lanes) -> Lanes<T> {
                       if (!cache.part.is_real(t)) return Lanes<T>{};
                       return cache.d_score(t, 0) * load_lanes<T>(&cache.x(t, col), lanes);
                     });
  }

  Index d_model() const { return weight_.value.cols(); }
  const MixtureOfDepthsConfig& config() const { return config_; }
  /// w
  Parameter<T>& weight() { return weight_; }
  const Parameter<T>& weight() const { return weight_; }
  Predictor& predictor() { return predictor_; }
  const Predictor& predictor() const { return predictor_; }

 private:
  /// p [tokens, 1]
  static const Matrix<T>& prediction(const Cache& cache) {
    return kHasPredictor ? cache.prediction : cache.score;
  }

  static void expect_finite_score(std::string_view where, std::string_view what, Index t, T value) {
    if (std::isfinite(value)) return;
    throw_error<NonFiniteError>(where, ": the ", what, " token ", t, " is ", value,
                                ", expected a finite number");
  }

  void score(std::string_view where, MatrixIn<T> x, Cache& cache) const {
    set_zero(cache.score, x.rows(), 1);
    for (Index t = 0; t < x.rows(); ++t) {
      if (!cache.part.is_real(t)) continue;
      cache.score(t, 0) = loops::dot<T>(d_model(), &x.coeffRef(t, 0), weight_.value.data());
      expect_finite_score(where, "score of", t, cache.score(t, 0));
    }
  }

  void predict([[maybe_unused]] std::string_view where, [[maybe_unused]] MatrixIn<T> x,
               [[maybe_unused]] const Pass& pass, [[maybe_unused]] Cache& cache) const {
    if constexpr (kHasPredictor) {
      const PassRecord::Scope scope(pass.record, "predictor");
      const Matrix<T>& p =
          predictor_.forward(without_padding<T>(x, pass.mask, cache.real_x), pass, cache.predictor);
      expect_shape(where, "the predictor's output", p, x.rows(), 1);
      copy_rows<T>(p, cache.prediction);
      for (Index t = 0; t < p.rows(); ++t) {
        if (cache.part.is_real(t)) expect_finite_score(where, "prediction for", t, p(t, 0));
      }
    }
  }

  MixtureOfDepthsConfig config_;
  Parameter<T> weight_;  // [1, d_model]
  [[no_unique_address]] Predictor predictor_;
};

}  // namespace weir
