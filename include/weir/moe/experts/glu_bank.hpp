// SPDX-License-Identifier: MIT
/// \file
/// Experts that are gated feed-forward networks: Mixtral, DBRX, Grok-1, DeepSeek and most others.
#pragma once

#include <concepts>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/expert_source.hpp>
#include <weir/moe/experts/expert_travel.hpp>
#include <weir/moe/experts/glu_weights.hpp>
#include <weir/nn/adapted.hpp>
#include <weir/nn/dropout.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/kept_glu.hpp>
#include <weir/nn/packed_glu.hpp>
#include <weir/ops/activation.hpp>

namespace weir {

/// Settings of GluBank.
struct GluBankConfig {
  double init_scale = 1.0;  ///< `scale` of `switch_init`. Switch trains its experts with 0.1.
  /// The probability with which a number between an expert's maps becomes zero in training. Switch
  /// fine-tunes with 0.4 in its experts and 0.1 elsewhere.
  double dropout = 0.0;
};

/// `experts` networks
///
///     E_e(x) = (act(x Wg_e^T) * (x Wu_e^T)) Wd_e^T
///
/// with Wg_e, Wu_e [d_hidden, d_model] and Wd_e [d_model, d_hidden], computed for all experts at
/// once on the packed slots. In training with dropout, what Wd_e takes is multiplied by 0 with that
/// probability, else by 1 / (1 - dropout), one draw per element from `pass.rng`. (Shazeer 2020,
/// arXiv:2002.05202; SwiGLU with act = SiLU. Expert dropout: Fedus et al. 2021, arXiv:2101.03961,
/// section 2.4.)
///
/// Trainable unless `set_storage` says otherwise; nothing is dropped where the weights are stored
/// for inference.
template <std::floating_point T, Activation Act = Silu>
class GluBank {
 public:
  using Scalar = T;

  struct Cache {
    KeptGlu<T> kept;            ///< [slots, .], from forward
    Scratch<T> out;             ///< [slots, d_out], from forward
    Scratch<T> home;            ///< The same of experts that are spread.
    Scratch<T> factor;          ///< [slots, d_hidden], of dropout, or empty
    Matrix<T> y, dx;            ///< [tokens, d_model]
    Workspace workspace;        ///< For what is needed only while a pass runs.
    FetchedGluCache<T> stored;  ///< Where weights are stored for inference.
    std::vector<Product<T>> products;
    Adapted<T> adapted_gate, adapted_up, adapted_down;
  };

  /// Weights from `switch_init`, with the fan-in of one expert, as those of Glu.
  /// \throws ConfigError  if a size is below 1, init_scale not positive, or unless 0 <= dropout
  ///                      < 1.
  GluBank(Index d_model, Index experts, Index d_hidden, Rng& rng, GluBankConfig config = {})
      : weights_(d_model, experts, d_hidden, rng, config.init_scale), dropout_(config.dropout) {
    expect_fraction("GluBank", "dropout", config.dropout);
  }

  /// From existing weights, one of each per expert.
  /// \throws ConfigError  without experts or with different numbers of gate, up and down.
  /// \throws ShapeError   if a weight's shape does not fit the others.
  GluBank(std::vector<Matrix<T>> gate, std::vector<Matrix<T>> up, std::vector<Matrix<T>> down)
      : weights_(std::move(gate), std::move(up), std::move(down)) {}

  /// \throws ConfigError  in training with dropout, without a pass.rng.
  /// \throws StateError   if the weights are fetched from a source and have adapters in this pass,
  ///                      or it is to be differentiated; if the experts are spread, and it trains.
  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const;

  /// The gradients of experts without tokens are left alone.
  /// \throws StateError   if the weights are stored for inference, see Pass::through_stored.
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache);

  /// \throws StateError   if the weights are fetched from a source, which stores them otherwise.
  void expect_storable(Storage storage) const { weights_.expect_storable(storage); }

  /// See `weir::set_storage`. If memory runs out, nothing has changed.
  /// \throws StateError   as `expect_storable`.
  void set_storage(Storage storage) { weights_.set_storage(storage); }

  /// Forgets the weights and fetches those of the experts that have tokens from `source`, pass by
  /// pass. Outputs are to the bit those of weights in memory in the same storage.
  /// \param storage  How the source stores them, any but kTrainable.
  /// \throws ConfigError  if there is no source, or the storage is another one.
  void set_source(std::shared_ptr<ExpertSource<T>> source, Storage storage) {
    weights_.set_source(std::move(source), storage);
  }

  /// Forgets the experts that are not `travel->own()`, and lets rows travel to them from now on,
  /// for inference: see `spread_experts`. `experts`, and the names of the others, stay as they are.
  /// \throws ConfigError  if there is no travel, or it is for another number of experts.
  /// \throws StateError   if the weights are fetched from a source or the experts are spread.
  void set_travel(std::shared_ptr<ExpertTravel<T>> travel) {
    weights_.set_travel(std::move(travel));
  }

  /// Changes the experts; those that are stored for inference share memory with their clones. The
  /// gate and up of a cold expert are drawn from `switch_init`.
  /// \throws ConfigError  if the map does not fit.
  /// \throws StateError   if weights are stored for inference and there is a cold expert, or they
  ///                      are fetched from a source or spread.
  void remap_experts(const ExpertMap& map) { weights_.remap_experts(map); }

  Storage storage() const { return weights_.storage(); }

  /// No parameters but those of adapters where the weights are stored for inference.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    GluWeights<T>::visit(self.weights_, visit);
  }

  Index experts() const { return weights_.experts(); }
  Index d_in() const { return weights_.d_in(); }
  Index d_hidden() const { return weights_.d_hidden(); }
  Index d_out() const { return weights_.d_out(); }

  double dropout() const { return dropout_; }

 private:
  /// Calls each `add(e, begin, rows)` for each expert with slots, and computes the products that it
  /// adds to those of the cache, those of one `add` after those of the one before: for all experts
  /// at once, or expert by expert where values are unpacked.
  template <class... Add>
  void multiply_experts(const Dispatch<T>& dispatch, Cache& cache, Add&&... add) const {
    const auto multiply_added = [&] {
      multiply<T>(cache.products);
      cache.products.clear();
    };
    cache.products.clear();
    if (storage() == Storage::kTrainable) {
      return ((dispatch.for_each_expert(add), multiply_added()), ...);
    }
    dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      ((add(e, begin, rows), multiply_added()), ...);
    });
  }

  /// Experts that are here.
  const Matrix<T>& forward_here(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                                Cache& cache) const;
  void forward_plain(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                     Cache& cache) const;
  void forward_packed(MatrixIn<T> x, const Dispatch<T>& dispatch, Cache& cache) const;

  GluWeights<T> weights_;
  double dropout_ = 0.0;
};

template <std::floating_point T, Activation Act>
const Matrix<T>& GluBank<T, Act>::forward(MatrixIn<T> x, const Dispatch<T>& dispatch,
                                          const Pass& pass, Cache& cache) const {
  if (weights_.travel() == nullptr) return forward_here(x, dispatch, pass, cache);
  if (pass.training) {
    throw_error<StateError>("GluBank::forward: the experts are spread for inference, expected ",
                            "ExpertParallel in a pass that trains");
  }
  const auto compute = [&](MatrixIn<T> rows, const Dispatch<T>& here) -> const Matrix<T>& {
    return forward_here(rows, here, pass, cache);
  };
  auto home = cache.home.reshape(dispatch.slots(), d_out());
  weights_.travel()->run(x, dispatch, compute, home);
  set_shape(cache.y, x.rows(), d_out());
  combine<T>(cache.home.view(), dispatch, cache.y);
  return cache.y;
}

template <std::floating_point T, Activation Act>
const Matrix<T>& GluBank<T, Act>::forward_here(MatrixIn<T> x, const Dispatch<T>& dispatch,
                                               const Pass& pass, Cache& cache) const {
  cache.adapted_gate.begin(pass);
  if (!weights_.is_fused(pass)) {
    forward_plain(x, dispatch, pass, cache);
  } else if (weights_.source() == nullptr) {
    forward_packed(x, dispatch, cache);
  } else {
    fetched_glu_forward<Act, T>(*weights_.source(), x, dispatch, cache.stored,
                                cache.out.reshape(dispatch.slots(), d_out()));
  }
  set_shape(cache.y, x.rows(), d_out());
  combine<T>(cache.out.view(), dispatch, cache.y);
  return cache.y;
}

template <std::floating_point T, Activation Act>
const Matrix<T>& GluBank<T, Act>::backward(MatrixIn<T> dy, const Dispatch<T>& dispatch,
                                           std::span<T> d_weight, Cache& cache) {
  cache.adapted_gate.expect_differentiable("GluBank::backward", storage());
  const Index slots = dispatch.slots();
  Workspace::Frame frame(cache.workspace);
  auto d_out_packed = frame.matrix<T>(slots, d_out());
  auto d_hidden_packed = frame.matrix<T>(slots, d_hidden());
  auto d_gate = frame.matrix<T>(slots, d_hidden());
  auto d_up = frame.matrix<T>(slots, d_hidden());
  auto d_packed = frame.matrix<T>(slots, d_in());
  combine_backward<T>(dy, cache.out.view(), dispatch, d_out_packed, d_weight);

  GluRows<T> at = cache.kept.restored(frame);
  if (cache.kept.is_fp8()) {
    glu_forward<Act, T>(at.gate, at.up, at.hidden);
    apply_dropout<T>(cache.factor, at.hidden);
  }

  const auto add_gradient = [&](LinearParameter<T>& weight, MatrixIn<T> d, MatrixIn<T> of) {
    if (weight.takes_gradient()) {
      cache.products.push_back(weight_gradient_product<T>(d, of, weight));
    }
  };
  cache.adapted_down.begin_backward();
  multiply_experts(dispatch, cache, [&](std::size_t e, Index begin, Index rows) {
    const auto d_out_e = d_out_packed.middleRows(begin, rows);
    const auto hidden_e = at.hidden.middleRows(begin, rows);
    auto d_hidden_e = d_hidden_packed.middleRows(begin, rows);
    cache.products.push_back(input_gradient_product<T>(d_out_e, weights_.down_of(e), d_hidden_e));
    add_gradient(weights_.down(e), d_out_e, hidden_e);
    cache.adapted_down.add_backward(weights_.down(e), d_out_e, hidden_e, d_hidden_e);
  });
  cache.adapted_down.backward();

  apply_dropout<T>(cache.factor, d_hidden_packed);
  glu_backward<Act, T>(at.gate, at.up, d_hidden_packed, d_gate, d_up);

  cache.adapted_gate.begin_backward();
  cache.adapted_up.begin_backward();
  const auto through_gate = [&](std::size_t e, Index begin, Index rows) {
    const auto x_e = at.x.middleRows(begin, rows);
    const auto d_gate_e = d_gate.middleRows(begin, rows);
    const auto d_up_e = d_up.middleRows(begin, rows);
    auto d_x_e = d_packed.middleRows(begin, rows);
    add_gradient(weights_.gate(e), d_gate_e, x_e);
    add_gradient(weights_.up(e), d_up_e, x_e);
    cache.products.push_back(
        input_gradient_product<T>(d_gate_e, weights_.gate_up_of(e).first, d_x_e));
    cache.adapted_gate.add_backward(weights_.gate(e), d_gate_e, x_e, d_x_e);
    cache.adapted_up.add_backward(weights_.up(e), d_up_e, x_e, d_x_e);
  };
  const auto through_up = [&](std::size_t e, Index begin, Index rows) {
    cache.products.push_back(input_gradient_product<T>(d_up.middleRows(begin, rows),
                                                       weights_.gate_up_again(e).second,
                                                       d_packed.middleRows(begin, rows), true));
  };
  multiply_experts(dispatch, cache, through_gate, through_up);
  cache.adapted_gate.backward();
  cache.adapted_up.backward();

  set_shape(cache.dx, dy.rows(), d_in());
  gather_backward<T>(d_packed, dispatch, cache.dx);
  return cache.dx;
}

template <std::floating_point T, Activation Act>
void GluBank<T, Act>::forward_packed(MatrixIn<T> x, const Dispatch<T>& dispatch,
                                     Cache& cache) const {
  cache.stored.groups.clear();
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    cache.stored.groups.push_back({&weights_.packed(e), begin, rows});
  });
  packed_glu_forward<Act, T>(
      dispatch.slots(), [&](Index s) { return &x.coeffRef(dispatch.token(s), 0); },
      cache.stored.groups, cache.stored.packed, cache.out.reshape(dispatch.slots(), d_out()));
}

template <std::floating_point T, Activation Act>
void GluBank<T, Act>::forward_plain(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                                    Cache& cache) const {
  const Index slots = dispatch.slots();
  Workspace::Frame frame(cache.workspace);
  GluRows<T> at = cache.kept.begin(slots, d_in(), d_hidden(), pass.training,
                                   weights_.gate(0).precision(), frame);
  gather<T>(x, dispatch, at.x);
  auto out = cache.out.reshape(slots, d_out());

  cache.adapted_up.begin(pass);
  cache.adapted_down.begin(pass);
  multiply_experts(dispatch, cache, [&](std::size_t e, Index begin, Index rows) {
    const auto x_e = at.x.middleRows(begin, rows);
    auto gate_e = at.gate.middleRows(begin, rows);
    auto up_e = at.up.middleRows(begin, rows);
    const auto [gate, up] = weights_.gate_up_of(e);
    cache.products.push_back(forward_product<T>(x_e, gate, gate_e));
    cache.products.push_back(forward_product<T>(x_e, up, up_e));
    cache.adapted_gate.add(weights_.gate(e), x_e, gate_e);
    cache.adapted_up.add(weights_.up(e), x_e, up_e);
  });
  cache.adapted_gate.forward(pass);
  cache.adapted_up.forward(pass);

  glu_forward<Act, T>(at.gate, at.up, at.hidden);
  const double rate = storage() == Storage::kTrainable ? dropout_ : 0.0;
  drop_hidden<T>("GluBank::forward", rate, pass, at.hidden, cache.factor);

  multiply_experts(dispatch, cache, [&](std::size_t e, Index begin, Index rows) {
    const auto hidden_e = at.hidden.middleRows(begin, rows);
    auto out_e = out.middleRows(begin, rows);
    cache.products.push_back(forward_product<T>(hidden_e, weights_.down_of(e), out_e));
    cache.adapted_down.add(weights_.down(e), hidden_e, out_e);
    pass.show<T>(weights_.gate(e), at.x.middleRows(begin, rows));
    pass.show<T>(weights_.up(e), at.x.middleRows(begin, rows));
    pass.show<T>(weights_.down(e), hidden_e);
  });
  cache.adapted_down.forward(pass);
  cache.kept.end(at);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::GluBank<float>;
extern template class weir::GluBank<double>;
#endif
