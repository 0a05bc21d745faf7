// SPDX-License-Identifier: MIT
/// \file
/// Soft mixture of experts: experts take mixtures of tokens, and nothing is chosen or dropped.
#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/list.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/slot_weights.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// Settings of SoftMoE.
struct SoftMoEConfig {
  Index slots_per_expert = 1;  ///< p, in each sequence.
  bool normalise = true;       ///< Whether logits are made of unit vectors.
  double scale = 1.0;          ///< The initial scale of normalised logits.
  double epsilon = 0.0;        ///< Added to the lengths that vectors are divided by; 1e-6 in the
                               ///< source, whose logits then depend on the length of short vectors.
};

/// Every slot of every expert takes a convex combination of all tokens of a sequence, and every
/// token a convex combination of what all slots yield. For each sequence X [m, d_model]:
///
///     L = X Phi^T                     [m, experts * p]
///     D = softmax over tokens of L,   C = softmax over slots of L
///     X~ = D^T X,   Y~_i = E_e(X~_i) for the p slots i of each expert e,   Y = C Y~
///
/// With `normalise`, L = scale * X^ Phi^^T: rows are divided by their length plus epsilon, and
/// scale is a trained number. The layer is differentiable throughout and needs no capacity and no
/// balancing loss. Padding is in no slot and yields zero.
///
/// The layer is not causal: each slot sees all tokens of its sequence. So it must not predict
/// tokens, and decoding token by token gives other results. (Puigcerver et al. 2023,
/// arXiv:2308.00951, eq. 1-3 and algorithms 1 and 2.)
template <ExpertBank Bank>
class SoftMoE {
 public:
  using Scalar = typename Bank::Scalar;
  using T = Scalar;

  struct Cache {
    CacheState state;
    typename SlotWeights<T>::Cache weights;
    typename Bank::Cache bank;
    Assignments slots;  ///< Each slot of each sequence is a token of the bank.
    List<T> ones;       ///< The weights of these assignments.
    Dispatch<T> dispatch;
    Matrix<T> slot_x, slot_y;  ///< [sequences * slots, .]
    Matrix<T> dy, d_slot_y;
    List<T> d_ones;
    std::vector<Product<T>> products;
    Matrix<T> y, dx;
  };

  /// Draws Phi from N(0, 1 / d_model).
  /// \throws ConfigError  if slots_per_expert is below 1, the scale not finite or epsilon negative.
  SoftMoE(Bank bank, Rng& rng, SoftMoEConfig config = {})
      : SoftMoE(initial(bank, rng, config), bank, config) {}

  /// \param phi      [experts * slots_per_expert, d_model], the slots of an expert together.
  /// \throws ConfigError  if slots_per_expert is below 1, the scale not finite or epsilon negative.
  /// \throws ShapeError   if phi has another shape.
  SoftMoE(Matrix<T> phi, Bank bank, SoftMoEConfig config = {})
      : config_(config),
        bank_(std::move(bank)),
        weights_(std::move(phi), config.normalise, config.scale, config.epsilon) {
    expect_at_least<Index>("SoftMoE", "slots_per_expert", config_.slots_per_expert, 1);
    expect_finite("SoftMoE", "scale", config_.scale);
    expect_at_least("SoftMoE", "epsilon", config_.epsilon, 0.0);
    if (weights_.slots() != slots() || weights_.d_model() != d_model()) {
      throw_error<ShapeError>("SoftMoE: phi is [", weights_.slots(), ", ", weights_.d_model(),
                              "], expected [", slots(), ", ", d_model(), "]");
    }
  }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, d_out of the bank]
  /// \throws ShapeError      if x, pass.mask or pass.sequences do not fit.
  /// \throws ConfigError     if pass.allowed or pass.without_best is set.
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.state.begin();
    expect_columns("SoftMoE::forward", "x", x, d_model());
    if (!pass.allowed.empty() || pass.without_best != 0.0) {
      throw_error<ConfigError>("SoftMoE::forward: pass.",
                               pass.allowed.empty() ? "without_best" : "allowed",
                               " is set, expected none: slots mix tokens");
    }
    auto& weights = cache.weights;
    weights_.forward(x, pass, weights);

    const Index count = weights.rows.sequences().count();
    set_zero(cache.slot_x, count * slots(), d_model());
    cache.products.clear();
    weights.for_each_sequence([&](Index s, Index begin, Index m) {
      cache.products.push_back(product_nn<T>(weights.part_of(weights.dispatch, begin, m),
                                             weights.x.middleRows(begin, m),
                                             cache.slot_x.middleRows(s * slots(), slots())));
    });
    multiply<T>(cache.products);
    copy_rows<T>(forward_experts(count, pass, cache), cache.slot_y);

    set_shape(cache.y, x.rows(), bank_.d_out());
    cache.products.clear();
    weights.for_each_sequence([&](Index s, Index begin, Index m) {
      cache.products.push_back(product_nn<T>(weights.combine.middleRows(begin, m),
                                             cache.slot_y.middleRows(s * slots(), slots()),
                                             cache.y.middleRows(begin, m)));
    });
    multiply<T>(cache.products);
    return cache.state.finish(*this, pass, cache.y);
  }

  /// \param dy       [tokens, d_out], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    cache.state.begin_backward("SoftMoE::backward", *this, dy);
    auto& weights = cache.weights;
    weights.copy_real(dy, cache.dy);
    set_zero(cache.d_slot_y, cache.slot_y.rows(), cache.slot_y.cols());
    set_shape(weights.d_combine, dy.rows(), slots());
    cache.products.clear();
    weights.for_each_sequence([&](Index s, Index begin, Index m) {
      const auto dy_s = cache.dy.middleRows(begin, m);
      cache.products.push_back(product_tn<T>(weights.combine.middleRows(begin, m), dy_s,
                                             cache.d_slot_y.middleRows(s * slots(), slots())));
      cache.products.push_back(product_nt<T>(dy_s, cache.slot_y.middleRows(s * slots(), slots()),
                                             weights.d_combine.middleRows(begin, m)));
    });
    multiply<T>(cache.products);
    cache.d_ones.resize(cache.slot_x.rows());
    const Matrix<T>& d_slot_x =
        bank_.backward(cache.d_slot_y, cache.dispatch, cache.d_ones, cache.bank);

    set_shape(cache.dx, dy.rows(), d_model());
    weights.d_dispatch.reserve(dy.rows() * slots());
    cache.products.clear();
    weights.for_each_sequence([&](Index s, Index begin, Index m) {
      const auto d_slots = d_slot_x.middleRows(s * slots(), slots());
      cache.products.push_back(product_nt<T>(d_slots, weights.x.middleRows(begin, m),
                                             weights.part_of(weights.d_dispatch, begin, m)));
      cache.products.push_back(product_tn<T>(weights.part_of(weights.dispatch, begin, m), d_slots,
                                             cache.dx.middleRows(begin, m)));
    });
    multiply<T>(cache.products);
    weights_.backward(weights, cache.dx);
    return cache.dx;
  }

  /// Parameters `phi`, `scale` where logits are normalised, and `experts.*`. Phi, which routes,
  /// keeps full precision in every storage.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.weights_);
    visit("experts", self.bank_);
  }

  Index d_model() const { return bank_.d_in(); }
  Index experts() const { return bank_.experts(); }
  /// The slots of one sequence.
  Index slots() const { return experts() * config_.slots_per_expert; }
  const SoftMoEConfig& config() const { return config_; }
  Bank& bank() { return bank_; }
  const Bank& bank() const { return bank_; }

 private:
  static Matrix<T> initial(const Bank& bank, Rng& rng, const SoftMoEConfig& config) {
    expect_at_least<Index>("SoftMoE", "slots_per_expert", config.slots_per_expert, 1);
    return normal_init<T>(bank.experts() * config.slots_per_expert, bank.d_in(),
                          1.0 / std::sqrt(static_cast<double>(bank.d_in())), rng);
  }

  /// Runs the experts on `cache.slot_x`: slot i of each sequence goes to expert i / p.
  const Matrix<T>& forward_experts(Index sequences, const Pass& pass, Cache& cache) const {
    const Index rows = sequences * slots();
    Assignments& to = cache.slots;
    to.expert_count = experts();
    to.offsets.resize(rows + 1);
    to.expert.resize(rows);
    for (Index r = 0; r < rows; ++r) {
      to.offsets[r] = r;
      to.expert[r] = r % slots() / config_.slots_per_expert;
    }
    to.offsets[rows] = rows;
    to.kept.assign(rows, 1);
    cache.ones.assign(rows, T(1));
    cache.dispatch.build(to, cache.ones);
    Pass own = pass;  // The bank's tokens are slots.
    own.sequences = nullptr;
    own.mask = {};
    own.token_ids = {};
    own.places = {};
    const PassRecord::Scope scope(pass.record, "experts");
    return bank_.forward(cache.slot_x, cache.dispatch, own, cache.bank);
  }

  SoftMoEConfig config_;
  Bank bank_;
  SlotWeights<T> weights_;
};

}  // namespace weir
