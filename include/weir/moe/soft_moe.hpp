// SPDX-License-Identifier: MIT
/// \file
/// Soft mixture of experts: experts take mixtures of tokens, and nothing is chosen or dropped.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/scratch.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of SoftMoe.
struct SoftMoeConfig {
  Index slots_per_expert = 1;  ///< p, in each sequence.
  bool normalise = true;       ///< Whether logits are made of unit vectors.
};

/// Every slot of every expert takes a convex combination of all tokens of a sequence, and every
/// token a convex combination of what all slots yield. For each sequence X [m, d_model]:
///
///     L = X Phi^T                     [m, experts * p]
///     D = softmax over tokens of L,   C = softmax over slots of L
///     X~ = D^T X,   Y~_i = E_e(X~_i) for the p slots i of each expert e,   Y = C Y~
///
/// With `normalise`, L = scale * X^ Phi^^T, rows divided by their length plus 1e-6, and scale a
/// trained number that starts at 1. Differentiable throughout; no capacity, no balancing loss.
/// Padding is in no slot and yields zero; a sequence without tokens computes nothing of use.
///
/// Not causal: each slot sees all tokens of its sequence, so that no token may be predicted with
/// it, and decoding token by token gives other results.
/// (Puigcerver et al. 2023, arXiv:2308.00951, eq. 1-3 and algorithms 1 and 2.)
template <ExpertBank Bank>
class SoftMoe {
 public:
  using Scalar = typename Bank::Scalar;
  using T = Scalar;

  struct Cache {
    typename Bank::Cache bank;
    Routing<T> routing;  ///< Each slot of each sequence as a token of the bank.
    Dispatch<T> dispatch;
    Sequences sequences;
    std::vector<std::uint8_t> mask;
    Matrix<T> x, unit_x;             ///< [tokens, d_model], zero for padding.
    Matrix<T> unit_phi, scaled_phi;  ///< [slots, d_model]
    Matrix<T> logits, combine;       ///< [tokens, slots]
    Scratch<T> dispatch_weights;     ///< [slots, m] of each sequence, after the other.
    Matrix<T> slot_x, slot_y;        ///< [sequences * slots, .]
    Matrix<T> dy, d_slot_y, d_logits, d_combine;
    Scratch<T> d_dispatch, d_transposed;  ///< As dispatch_weights.
    Matrix<T> d_unit_x, d_phi;
    std::vector<T> d_weight;
    std::vector<Product<T>> products;
    Matrix<T> y, dx;
    bool filled = false;
  };

  /// Phi from N(0, 1 / d_model).
  /// \throws ConfigError  if slots_per_expert is below 1.
  SoftMoe(Bank bank, Rng& rng, SoftMoeConfig config = {})
      : SoftMoe(initial(bank, rng, config), bank, config) {}

  /// \param phi      [experts * slots_per_expert, d_model], the slots of an expert together.
  /// \param scale    Of normalised logits.
  /// \throws ConfigError  if slots_per_expert is below 1.
  /// \throws ShapeError   if phi has another shape.
  SoftMoe(Matrix<T> phi, Bank bank, SoftMoeConfig config = {}, T scale = T(1))
      : config_(config), bank_(std::move(bank)), phi_{std::move(phi)} {
    expect_at_least<Index>("SoftMoe", "slots_per_expert", config_.slots_per_expert, 1);
    expect_shape("SoftMoe", "phi", phi_.value, slots(), d_model());
    if (config_.normalise) scale_.value.setConstant(1, 1, scale);
  }

  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, d_out of the bank]
  /// \throws ShapeError      if x, pass.mask or pass.sequences do not fit.
  /// \throws ConfigError     if pass.allowed is set.
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    expect_columns("SoftMoe::forward", "x", x, d_model());
    pass.check("SoftMoe::forward", x.rows());
    if (!pass.allowed.empty()) {
      fail<ConfigError>("SoftMoe::forward: pass.allowed is set, expected none: slots mix tokens");
    }
    cache.filled = false;
    cache.mask.assign(pass.mask.begin(), pass.mask.end());
    if (pass.sequences != nullptr) {
      cache.sequences = *pass.sequences;
    } else {
      cache.sequences.clear();
      cache.sequences.append(x.rows());
    }
    copy_real(x, cache, cache.x);
    compute_logits(cache);
    weigh(cache);

    const Index count = cache.sequences.count();
    cache.slot_x.setZero(count * slots(), d_model());
    cache.products.clear();
    for_each_sequence(cache, [&](Index s, Index begin, Index m) {
      cache.products.push_back(product_nn<T>(weights_of(cache.dispatch_weights, begin, m),
                                             cache.x.middleRows(begin, m),
                                             cache.slot_x.middleRows(s * slots(), slots())));
    });
    multiply<T>(cache.products);
    send(count, cache);
    copy_rows<T>(bank_.forward(cache.slot_x, cache.dispatch, cache.bank), cache.slot_y);

    cache.y.resize(x.rows(), bank_.d_out());
    cache.products.clear();
    for_each_sequence(cache, [&](Index s, Index begin, Index m) {
      cache.products.push_back(product_nn<T>(cache.combine.middleRows(begin, m),
                                             cache.slot_y.middleRows(s * slots(), slots()),
                                             cache.y.middleRows(begin, m)));
    });
    multiply<T>(cache.products);
    cache.filled = true;
    return cache.y;
  }

  /// \param dy       [tokens, d_out], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the last forward pass with `cache` did not succeed, or there was none.
  /// \throws ShapeError   if dy does not have the shape of y.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    if (!cache.filled) {
      fail<StateError>("SoftMoe::backward: the cache is empty, expected a forward pass before");
    }
    expect_shape("SoftMoe::backward", "dy", dy, cache.x.rows(), bank_.d_out());
    copy_real(dy, cache, cache.dy);
    cache.d_slot_y.setZero(cache.slot_y.rows(), cache.slot_y.cols());
    cache.d_combine.resize(dy.rows(), slots());
    cache.products.clear();
    for_each_sequence(cache, [&](Index s, Index begin, Index m) {
      const auto dy_s = cache.dy.middleRows(begin, m);
      cache.products.push_back(product_tn<T>(cache.combine.middleRows(begin, m), dy_s,
                                             cache.d_slot_y.middleRows(s * slots(), slots())));
      cache.products.push_back(product_nt<T>(dy_s, cache.slot_y.middleRows(s * slots(), slots()),
                                             cache.d_combine.middleRows(begin, m)));
    });
    multiply<T>(cache.products);
    cache.d_weight.resize(static_cast<std::size_t>(cache.slot_x.rows()));
    const Matrix<T>& d_slot_x =
        bank_.backward(cache.d_slot_y, cache.dispatch, cache.d_weight, cache.bank);

    cache.dx.resize(dy.rows(), d_model());
    cache.d_dispatch.reserve(dy.rows() * slots());
    cache.products.clear();
    for_each_sequence(cache, [&](Index s, Index begin, Index m) {
      const auto d_slots = d_slot_x.middleRows(s * slots(), slots());
      cache.products.push_back(product_nt<T>(d_slots, cache.x.middleRows(begin, m),
                                             weights_of(cache.d_dispatch, begin, m)));
      cache.products.push_back(product_tn<T>(weights_of(cache.dispatch_weights, begin, m), d_slots,
                                             cache.dx.middleRows(begin, m)));
    });
    multiply<T>(cache.products);
    compute_d_logits(cache);

    const Matrix<T>& left = config_.normalise ? cache.unit_x : cache.x;
    const Matrix<T>& right = config_.normalise ? cache.scaled_phi : phi_.value;
    cache.d_unit_x.resize(dy.rows(), d_model());
    cache.d_phi.setZero(slots(), d_model());
    cache.products.clear();
    cache.products.push_back(product_nn<T>(cache.d_logits, right, cache.d_unit_x));
    if (dy.rows() > 0) cache.products.push_back(product_tn<T>(cache.d_logits, left, cache.d_phi));
    multiply<T>(cache.products);
    if (config_.normalise) {
      const T scale = scale_.value(0, 0);
      T& d_scale = scale_.gradient()(0, 0);
      for (Index i = 0; i < slots(); ++i) {
        d_scale += loops::dot<T>(d_model(), &cache.d_phi(i, 0), &cache.unit_phi(i, 0));
      }
      Matrix<T>& d_phi = phi_.gradient();
      for (Index i = 0; i < slots(); ++i) {
        add_unit_backward(scale, &phi_.value(i, 0), &cache.d_phi(i, 0), &d_phi(i, 0));
      }
      parallel_rows(dy.rows(), 4 * d_model(), [&](Index begin, Index end) {
        for (Index t = begin; t < end; ++t) {
          add_unit_backward(T(1), &cache.x(t, 0), &cache.d_unit_x(t, 0), &cache.dx(t, 0));
        }
      });
    } else {
      add_rows<T>(phi_.gradient(), cache.d_phi, phi_.gradient());
      add_rows<T>(cache.dx, cache.d_unit_x, cache.dx);
    }
    return cache.dx;
  }

  /// Parameters `phi`, `scale` where logits are normalised, and `experts.*`.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("phi", self.phi_);
    if (self.config_.normalise) visit("scale", self.scale_);
    visit("experts", self.bank_);
  }

  Index d_model() const { return bank_.d_in(); }
  Index experts() const { return bank_.experts(); }
  Index slots() const { return experts() * config_.slots_per_expert; }  ///< Of one sequence.
  const SoftMoeConfig& config() const { return config_; }
  Bank& bank() { return bank_; }
  const Bank& bank() const { return bank_; }

 private:
  static constexpr T kTiny = T(1e-6);

  static Matrix<T> initial(const Bank& bank, Rng& rng, const SoftMoeConfig& config) {
    expect_at_least<Index>("SoftMoe", "slots_per_expert", config.slots_per_expert, 1);
    return normal_init<T>(bank.experts() * config.slots_per_expert, bank.d_in(),
                          1.0 / std::sqrt(static_cast<double>(bank.d_in())), rng);
  }

  static bool is_padding(const Cache& cache, Index t) {
    return !cache.mask.empty() && cache.mask[static_cast<std::size_t>(t)] == 0;
  }

  /// Padding may hold anything; as zeros it does no harm.
  static void copy_real(MatrixIn<T> from, const Cache& cache, Matrix<T>& to) {
    copy_rows<T>(from, to);
    for (Index t = 0; t < to.rows(); ++t) {
      if (is_padding(cache, t)) to.row(t).setZero();
    }
  }

  /// Calls `body(s, first token, tokens)` for each sequence that has tokens.
  template <class Body>
  static void for_each_sequence(const Cache& cache, Body&& body) {
    for (Index s = 0; s < cache.sequences.count(); ++s) {
      if (cache.sequences.length(s) > 0)
        body(s, cache.sequences.begin(s), cache.sequences.length(s));
    }
  }

  /// The part [slots, m] of a sequence's m tokens from `begin` on.
  Eigen::Map<Matrix<T>> weights_of(Scratch<T>& all, Index begin, Index m) const {
    return {all.data() + begin * slots(), slots(), m};
  }

  /// unit = factor * v / (|v| + kTiny).
  void unit_row(T factor, const T* v, T* unit) const {
    const T by = T(1) / (std::sqrt(loops::sum_of_squares(d_model(), v)) + kTiny);
    const auto f = [=](const Lanes<T>& a) -> Lanes<T> { return factor * (by * a); };
    map_lanes<T>(d_model(), f, unit, v);
  }

  /// dv += factor * (du - v (du . v) / (|v| (|v| + kTiny))) / (|v| + kTiny).
  void add_unit_backward(T factor, const T* v, const T* du, T* dv) const {
    const T length = std::sqrt(loops::sum_of_squares(d_model(), v));
    const T by = factor / (length + kTiny);
    const T along =
        length > T(0) ? loops::dot<T>(d_model(), du, v) / (length * (length + kTiny)) : T(0);
    const auto f = [=](const Lanes<T>& sum, const Lanes<T>& d, const Lanes<T>& a) -> Lanes<T> {
      return sum + by * (d - along * a);
    };
    map_lanes<T>(d_model(), f, dv, dv, du, v);
  }

  void compute_logits(Cache& cache) const {
    cache.logits.resize(cache.x.rows(), slots());
    if (!config_.normalise) return multiply_nt<T>(cache.x, phi_.value, cache.logits);
    cache.unit_x.resize(cache.x.rows(), d_model());
    cache.unit_phi.resize(slots(), d_model());
    cache.scaled_phi.resize(slots(), d_model());
    parallel_rows(cache.x.rows(), 4 * d_model(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) unit_row(T(1), &cache.x(t, 0), &cache.unit_x(t, 0));
    });
    for (Index i = 0; i < slots(); ++i) {
      unit_row(T(1), &phi_.value(i, 0), &cache.unit_phi(i, 0));
      unit_row(scale_.value(0, 0), &phi_.value(i, 0), &cache.scaled_phi(i, 0));
    }
    multiply_nt<T>(cache.unit_x, cache.scaled_phi, cache.logits);
  }

  /// Both softmaxes.
  void weigh(Cache& cache) const {
    for (Index t = 0; t < cache.logits.rows(); ++t) {
      for (Index i = 0; i < slots(); ++i) {
        if (!std::isfinite(cache.logits(t, i))) {
          fail<NonFiniteError>("SoftMoe: logits[", t, ", ", i, "] = ", cache.logits(t, i),
                               ", expected a finite number");
        }
      }
    }
    cache.combine.resize(cache.logits.rows(), slots());
    softmax<T>(cache.logits, cache.combine);
    cache.dispatch_weights.reserve(cache.logits.rows() * slots());
    for (Index t = 0; t < cache.logits.rows(); ++t) {
      if (is_padding(cache, t)) cache.combine.row(t).setZero();
    }
    for_each_sequence(cache, [&](Index, Index begin, Index m) {
      auto weights = weights_of(cache.dispatch_weights, begin, m);
      constexpr T kNever = -std::numeric_limits<T>::infinity();
      bool any = false;
      for (Index j = 0; j < m; ++j) any = any || !is_padding(cache, begin + j);
      if (!any) {
        weights.setZero();
        return;
      }
      parallel_rows(slots(), 8 * m, [&](Index first, Index last) {
        for (Index i = first; i < last; ++i) {
          for (Index j = 0; j < m; ++j) {
            weights(i, j) = is_padding(cache, begin + j) ? kNever : cache.logits(begin + j, i);
          }
          softmax_row<T>(&weights(i, 0), m, &weights(i, 0));
        }
      });
    });
  }

  /// The derivative of both softmaxes.
  void compute_d_logits(Cache& cache) const {
    cache.d_logits.setZero(cache.logits.rows(), slots());
    add_softmax_backward<T>(cache.combine, cache.d_combine, cache.d_logits);
    cache.d_transposed.reserve(cache.logits.rows() * slots());
    for_each_sequence(cache, [&](Index, Index begin, Index m) {
      auto d = weights_of(cache.d_transposed, begin, m);
      d.setZero();
      add_softmax_backward<T>(weights_of(cache.dispatch_weights, begin, m),
                              weights_of(cache.d_dispatch, begin, m), d);
      parallel_rows(m, slots(), [&](Index first, Index last) {
        for (Index j = first; j < last; ++j) {
          for (Index i = 0; i < slots(); ++i) cache.d_logits(begin + j, i) += d(i, j);
        }
      });
    });
  }

  /// Slot i of each sequence goes to expert i / p.
  void send(Index sequences, Cache& cache) const {
    const Index rows = sequences * slots();
    Routing<T>& routing = cache.routing;
    routing.logits.resize(rows, experts());
    routing.offsets.resize(static_cast<std::size_t>(rows) + 1);
    routing.expert.resize(static_cast<std::size_t>(rows));
    for (Index r = 0; r < rows; ++r) {
      routing.offsets[static_cast<std::size_t>(r)] = r;
      routing.expert[static_cast<std::size_t>(r)] = r % slots() / config_.slots_per_expert;
    }
    routing.offsets.back() = rows;
    routing.weight.assign(static_cast<std::size_t>(rows), T(1));
    routing.kept.assign(static_cast<std::size_t>(rows), 1);
    cache.dispatch.build(routing);
  }

  SoftMoeConfig config_;
  Bank bank_;
  Parameter<T> phi_;    // [slots, d_model]
  Parameter<T> scale_;  // [1, 1], or empty.
};

}  // namespace weir
