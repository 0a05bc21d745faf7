// SPDX-License-Identifier: MIT
/// \file
/// Experts that are gated feed-forward networks: Mixtral, DBRX, Grok-1, DeepSeek and most others.
#pragma once

#include <concepts>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/init.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/expert_source.hpp>
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
    Scratch<T> factor;          ///< [slots, d_hidden], of dropout, or empty
    Matrix<T> y, dx;            ///< [tokens, d_model]
    Workspace workspace;        ///< For what is needed only while a pass runs.
    FetchedGluCache<T> stored;  ///< Where weights are stored for inference.
    std::vector<Product<T>> products;
  };

  /// Weights from `switch_init`, with the fan-in of one expert, as those of Glu.
  /// \throws ConfigError  if a size is below 1, init_scale not positive, or unless 0 <= dropout
  ///                      < 1.
  GluBank(Index d_model, Index experts, Index d_hidden, Rng& rng, GluBankConfig config = {});

  /// From existing weights, one of each per expert.
  /// \throws ConfigError  without experts or with different numbers of gate, up and down.
  /// \throws ShapeError   if a weight's shape does not fit the others.
  GluBank(std::vector<Matrix<T>> gate, std::vector<Matrix<T>> up, std::vector<Matrix<T>> down);

  /// \throws ConfigError  in training with dropout, without a pass.rng.
  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const;

  /// The gradients of experts without tokens are left alone.
  /// \throws StateError   if the weights are stored for inference.
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache);

  /// \throws StateError   if the weights are fetched from a source, which stores them otherwise.
  void expect_storable(Storage storage) const {
    if (storage == storage_ || source_ == nullptr) return;
    throw_error<StateError>(
        "GluBank::set_storage: the weights are fetched from a source, expected weights in memory");
  }

  /// See `weir::set_storage`. If memory runs out, nothing has changed.
  /// \throws StateError   as `expect_storable`.
  void set_storage(Storage storage);

  /// Forgets the weights and fetches those of the experts that have tokens from `source`, pass by
  /// pass. Outputs are to the bit those of weights in memory in the same storage.
  /// \param storage  How the source stores them, any but kTrainable.
  /// \throws ConfigError  if there is no source, or the storage is another one.
  void set_source(std::shared_ptr<ExpertSource<T>> source, Storage storage);

  Storage storage() const { return storage_; }

  /// No parameters where the weights are stored for inference.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (self.storage_ != Storage::kTrainable) return;
    for (std::size_t e = 0; e < self.gate_.size(); ++e) {
      const std::string expert = std::to_string(e);
      visit(expert + ".gate", self.gate_[e]);
      visit(expert + ".up", self.up_[e]);
      visit(expert + ".down", self.down_[e]);
    }
  }

  Index experts() const { return static_cast<Index>(gate_.size()); }
  Index d_in() const { return d_in_; }
  Index d_hidden() const { return d_hidden_; }
  Index d_out() const { return d_out_; }

  double dropout() const { return dropout_; }

 private:
  void forward_trainable(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                         Cache& cache) const;
  void forward_packed(MatrixIn<T> x, const Dispatch<T>& dispatch, Cache& cache) const;

  std::vector<Parameter<T>> gate_, up_, down_;
  std::vector<PackedGlu<T>> packed_;         // One per expert, or none.
  std::shared_ptr<ExpertSource<T>> source_;  // Null unless they are fetched.
  Storage storage_ = Storage::kTrainable;
  Index d_in_ = 0, d_hidden_ = 0, d_out_ = 0;
  double dropout_ = 0.0;
};

template <std::floating_point T, Activation Act>
GluBank<T, Act>::GluBank(Index d_model, Index experts, Index d_hidden, Rng& rng,
                         GluBankConfig config)
    : d_in_(d_model), d_hidden_(d_hidden), d_out_(d_model), dropout_(config.dropout) {
  expect_fraction("GluBank", "dropout", config.dropout);
  expect_at_least<Index>("GluBank", "d_model", d_model, 1);
  expect_at_least<Index>("GluBank", "experts", experts, 1);
  expect_at_least<Index>("GluBank", "d_hidden", d_hidden, 1);
  for (Index e = 0; e < experts; ++e) {
    gate_.push_back({switch_init<T>(d_hidden, d_model, rng, config.init_scale)});
    up_.push_back({switch_init<T>(d_hidden, d_model, rng, config.init_scale)});
    down_.push_back({switch_init<T>(d_model, d_hidden, rng, config.init_scale)});
  }
}

template <std::floating_point T, Activation Act>
GluBank<T, Act>::GluBank(std::vector<Matrix<T>> gate, std::vector<Matrix<T>> up,
                         std::vector<Matrix<T>> down) {
  if (gate.empty() || gate.size() != up.size() || gate.size() != down.size()) {
    throw_error<ConfigError>("GluBank: ", gate.size(), " gate, ", up.size(), " up and ",
                             down.size(), " down weights, expected one of each per expert");
  }
  for (std::size_t e = 0; e < gate.size(); ++e) {
    const std::string which = "[" + std::to_string(e) + "]";
    expect_shape("GluBank", "gate" + which, gate[e], gate[0].rows(), gate[0].cols());
    expect_shape("GluBank", "up" + which, up[e], gate[0].rows(), gate[0].cols());
    expect_shape("GluBank", "down" + which, down[e], down[0].rows(), gate[0].rows());
  }
  d_in_ = gate[0].cols();
  d_hidden_ = gate[0].rows();
  d_out_ = down[0].rows();
  for (std::size_t e = 0; e < gate.size(); ++e) {
    gate_.push_back({std::move(gate[e])});
    up_.push_back({std::move(up[e])});
    down_.push_back({std::move(down[e])});
  }
}

template <std::floating_point T, Activation Act>
const Matrix<T>& GluBank<T, Act>::forward(MatrixIn<T> x, const Dispatch<T>& dispatch,
                                          const Pass& pass, Cache& cache) const {
  if (storage_ == Storage::kTrainable) {
    forward_trainable(x, dispatch, pass, cache);
  } else if (source_ == nullptr) {
    forward_packed(x, dispatch, cache);
  } else {
    fetched_glu_forward<Act, T>(*source_, x, dispatch, cache.stored,
                                cache.out.reshape(dispatch.slots(), d_out()));
  }
  set_shape(cache.y, x.rows(), d_out());
  combine<T>(cache.out.view(), dispatch, cache.y);
  return cache.y;
}

template <std::floating_point T, Activation Act>
const Matrix<T>& GluBank<T, Act>::backward(MatrixIn<T> dy, const Dispatch<T>& dispatch,
                                           std::span<T> d_weight, Cache& cache) {
  expect_trainable("GluBank::backward", storage_);
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

  cache.products.clear();
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    const auto d_out_e = d_out_packed.middleRows(begin, rows);
    cache.products.push_back(
        input_gradient_product<T>(d_out_e, down_[e], d_hidden_packed.middleRows(begin, rows)));
    cache.products.push_back(
        weight_gradient_product<T>(d_out_e, at.hidden.middleRows(begin, rows), down_[e]));
  });
  multiply<T>(cache.products);

  apply_dropout<T>(cache.factor, d_hidden_packed);
  glu_backward<Act, T>(at.gate, at.up, d_hidden_packed, d_gate, d_up);

  cache.products.clear();
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    const auto x_e = at.x.middleRows(begin, rows);
    const auto d_gate_e = d_gate.middleRows(begin, rows);
    const auto d_up_e = d_up.middleRows(begin, rows);
    cache.products.push_back(weight_gradient_product<T>(d_gate_e, x_e, gate_[e]));
    cache.products.push_back(weight_gradient_product<T>(d_up_e, x_e, up_[e]));
    cache.products.push_back(
        input_gradient_product<T>(d_gate_e, gate_[e], d_packed.middleRows(begin, rows)));
  });
  multiply<T>(cache.products);

  cache.products.clear();
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    cache.products.push_back(input_gradient_product<T>(d_up.middleRows(begin, rows), up_[e],
                                                       d_packed.middleRows(begin, rows), true));
  });
  multiply<T>(cache.products);

  set_shape(cache.dx, dy.rows(), d_in());
  gather_backward<T>(d_packed, dispatch, cache.dx);
  return cache.dx;
}

template <std::floating_point T, Activation Act>
void GluBank<T, Act>::set_storage(Storage storage) {
  if (storage == storage_) return;
  expect_storable(storage);
  const auto trainable = [&](std::size_t e) {
    if (storage_ != Storage::kTrainable) {
      packed_[e].unpack(gate_[e].value, up_[e].value, down_[e].value);
    }
  };
  if (storage == Storage::kTrainable) {
    for (std::size_t e = 0; e < gate_.size(); ++e) trainable(e);
    packed_.clear();
  } else {
    // One memory for all: the weights of a small expert fill no huge page.
    SharedMemory memory(gate_.size() * PackedGlu<T>::bytes(d_in_, d_hidden_, d_out_, storage));
    std::vector<PackedGlu<T>> packed;
    packed.reserve(gate_.size());
    for (std::size_t e = 0; e < gate_.size(); ++e) {
      trainable(e);
      packed.emplace_back(gate_[e], up_[e], down_[e], storage, memory);
      gate_[e] = up_[e] = down_[e] = {};
    }
    packed_ = std::move(packed);
  }
  storage_ = storage;
}

template <std::floating_point T, Activation Act>
void GluBank<T, Act>::set_source(std::shared_ptr<ExpertSource<T>> source, Storage storage) {
  if (source == nullptr || storage == Storage::kTrainable) {
    throw_error<ConfigError>("GluBank::set_source: source is null or storage kTrainable, expected ",
                             "a source of weights stored for inference");
  }
  source_ = std::move(source);
  storage_ = storage;
  packed_.clear();
  for (auto* weights : {&gate_, &up_, &down_}) {
    for (Parameter<T>& weight : *weights) weight = {};
  }
}

template <std::floating_point T, Activation Act>
void GluBank<T, Act>::forward_packed(MatrixIn<T> x, const Dispatch<T>& dispatch,
                                     Cache& cache) const {
  cache.stored.groups.clear();
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    cache.stored.groups.push_back({&packed_[e], begin, rows});
  });
  packed_glu_forward<Act, T>(
      dispatch.slots(), [&](Index s) { return &x.coeffRef(dispatch.token(s), 0); },
      cache.stored.groups, cache.stored.packed, cache.out.reshape(dispatch.slots(), d_out()));
}

template <std::floating_point T, Activation Act>
void GluBank<T, Act>::forward_trainable(MatrixIn<T> x, const Dispatch<T>& dispatch,
                                        const Pass& pass, Cache& cache) const {
  const Index slots = dispatch.slots();
  Workspace::Frame frame(cache.workspace);
  GluRows<T> at =
      cache.kept.begin(slots, d_in(), d_hidden(), pass.training, gate_[0].precision(), frame);
  gather<T>(x, dispatch, at.x);
  auto out = cache.out.reshape(slots, d_out());

  cache.products.clear();
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    const auto x_e = at.x.middleRows(begin, rows);
    cache.products.push_back(forward_product<T>(x_e, gate_[e], at.gate.middleRows(begin, rows)));
    cache.products.push_back(forward_product<T>(x_e, up_[e], at.up.middleRows(begin, rows)));
  });
  multiply<T>(cache.products);

  glu_forward<Act, T>(at.gate, at.up, at.hidden);
  drop_hidden<T>("GluBank::forward", dropout_, pass, at.hidden, cache.factor);

  cache.products.clear();
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    cache.products.push_back(forward_product<T>(at.hidden.middleRows(begin, rows), down_[e],
                                                out.middleRows(begin, rows)));
    pass.show<T>(gate_[e], at.x.middleRows(begin, rows));
    pass.show<T>(up_[e], at.x.middleRows(begin, rows));
    pass.show<T>(down_[e], at.hidden.middleRows(begin, rows));
  });
  multiply<T>(cache.products);
  cache.kept.end(at);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::GluBank<float>;
extern template class weir::GluBank<double>;
#endif
