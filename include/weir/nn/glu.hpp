// SPDX-License-Identifier: MIT
/// \file
/// The gated feed-forward network (Shazeer 2020, arXiv:2002.05202).
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/init.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/nn/adapted.hpp>
#include <weir/nn/kept_glu.hpp>
#include <weir/nn/packed_glu.hpp>
#include <weir/ops/activation.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/padding.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// h = act(gate) * up, elementwise on [rows, d_hidden]. `h` may be `gate`.
template <Activation Act, class T>
void glu_forward(MatrixIn<T> gate, MatrixIn<T> up, MatrixOut<T> h) {
  constexpr Index kCost = 8;
  parallel_pieces(gate.rows(), gate.cols(), kCost, [&](Index t, Index col, Index count) {
    T* const out = &h(t, col);
    Act::value(count, &gate.coeffRef(t, col), out);
    loops::multiply<T>(count, out, &up.coeffRef(t, col), out);
  });
}

/// The derivative of `glu_forward`:
///
///     d_gate = dh * up * act'(gate),   d_up = dh * act(gate)
///
/// All are [rows, d_hidden]; each result has a matrix of its own.
template <Activation Act, class T>
void glu_backward(MatrixIn<T> gate, MatrixIn<T> up, MatrixIn<T> dh, MatrixOut<T> d_gate,
                  MatrixOut<T> d_up) {
  constexpr Index kCost = 16;
  parallel_pieces(gate.rows(), gate.cols(), kCost, [&](Index t, Index col, Index count) {
    const auto triple = [](const Lanes<T>& a, const Lanes<T>& b, const Lanes<T>& c) -> Lanes<T> {
      return a * b * c;
    };
    Act::value(count, &gate.coeffRef(t, col), &d_up(t, col));
    loops::multiply<T>(count, &d_up(t, col), &dh.coeffRef(t, col), &d_up(t, col));
    Act::derivative(count, &gate.coeffRef(t, col), &d_gate(t, col));
    map_lanes<T>(count, triple, &d_gate(t, col), &d_gate(t, col), &dh.coeffRef(t, col),
                 &up.coeffRef(t, col));
  });
}

/// Settings of `Glu`.
struct GluConfig {
  double init_scale = 1.0;  ///< `scale` of `switch_init`.
};

/// The feed-forward network with a gate, SwiGLU by default:
///
///     y = (act(x gate^T) * (x up^T)) down^T
///
/// Padding is not read and yields zero, see PaddingRows. (Shazeer 2020, arXiv:2002.05202, eq. 6.)
template <std::floating_point T, Activation Act = Silu>
class Glu {
 public:
  using Scalar = T;

  struct Cache {
    CacheState state;
    Matrix<T> y;
    KeptGlu<T> kept;
    Matrix<T> dy, dx;
    Workspace workspace;  ///< For what is needed only while a pass runs.
    PaddingRows padding;
    PackedGluCache<T> packed;
    std::vector<Product<T>> products;
    Adapted<T> adapted_gate, adapted_up, adapted_down;
  };

  /// Weights from `switch_init`.
  /// \throws ConfigError  unless sizes and scale are positive.
  Glu(Index d_model, Index d_hidden, Rng& rng, GluConfig config = {}) {
    expect_positive("Glu", "d_model", d_model);
    expect_positive("Glu", "d_hidden", d_hidden);
    gate_.value = switch_init<T>(d_hidden, d_model, rng, config.init_scale);
    up_.value = switch_init<T>(d_hidden, d_model, rng, config.init_scale);
    down_.value = switch_init<T>(d_model, d_hidden, rng, config.init_scale);
  }

  /// Takes over gate and up [d_hidden, d_model] and down [d_model, d_hidden].
  /// \throws ShapeError   if they do not fit each other.
  Glu(Matrix<T> gate, Matrix<T> up, Matrix<T> down)
      : gate_(std::move(gate)), up_(std::move(up)), down_(std::move(down)) {
    expect_shape("Glu", "up", up_.value, d_hidden(), d_model());
    expect_shape("Glu", "down", down_.value, d_model(), d_hidden());
  }

  /// \param x        [tokens, d_model].
  /// \return         [tokens, d_model].
  /// \throws ShapeError   if x does not have d_model columns, or pass.mask does not fit.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// Adds to the gradients of gate, up and down.
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState, or if the weights are stored
  ///                      for inference, see Pass::through_stored.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache);

  /// See `weir::set_storage`. If memory runs out, nothing has changed.
  void set_storage(Storage storage);
  Storage storage() const { return storage_; }

  Index d_model() const { return gate_.d_in(); }
  Index d_hidden() const { return gate_.d_out(); }

  /// The three weights have no value if they are stored for inference.
  const LinearParameter<T>& gate() const { return gate_; }
  LinearParameter<T>& gate() { return gate_; }
  const LinearParameter<T>& up() const { return up_; }
  LinearParameter<T>& up() { return up_; }
  const LinearParameter<T>& down() const { return down_; }
  LinearParameter<T>& down() { return down_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("gate", self.gate_);
    visit("up", self.up_);
    visit("down", self.down_);
  }

 private:
  /// The three weights; where they are stored for inference, they are unpacked to memory of
  /// `frame`.
  struct Weights {
    WeightValue<T> gate, up, down;
  };
  Weights weights(Workspace::Frame& frame) const {
    if (!packed_) {
      return {WeightValue<T>::of(gate_), WeightValue<T>::of(up_), WeightValue<T>::of(down_)};
    }
    const Index count = d_model() * d_hidden();
    T* const gate = frame.take<T>(count);
    T* const up = frame.take<T>(count);
    T* const down = frame.take<T>(count);
    packed_->gate_up.unpack(gate, up);
    packed_->down.unpack(down, nullptr);
    return {{{gate, d_hidden(), d_model()}},
            {{up, d_hidden(), d_model()}},
            {{down, d_model(), d_hidden()}}};
  }

  /// Whether activations are computed from sums that are still in the cache of their core, and only
  /// y is written.
  bool is_fused(const Pass& pass) const {
    if (!packed_ || (pass.training && pass.through_stored)) return false;
    return !is_adapted(gate_, pass) && !is_adapted(up_, pass) && !is_adapted(down_, pass);
  }

  void run(MatrixIn<T> x, const Pass& pass, GluRows<T>& at, Cache& cache) const {
    Workspace::Frame frame(cache.workspace);
    const Weights weights = this->weights(frame);
    const Product<T> products[] = {forward_product<T>(x, weights.gate, at.gate),
                                   forward_product<T>(x, weights.up, at.up)};
    multiply<T>(products);
    adapt<T>(gate_, x, pass, at.gate, cache.adapted_gate);
    adapt<T>(up_, x, pass, at.up, cache.adapted_up);
    glu_forward<Act, T>(at.gate, at.up, at.hidden);
    multiply<T>(forward_product<T>(at.hidden, weights.down, cache.y));
    adapt<T>(down_, at.hidden, pass, cache.y, cache.adapted_down);
  }

  void run_packed(MatrixIn<T> x, PackedGluCache<T>& cache, MatrixOut<T> y) const {
    const PackedGluGroup<T> all = {&*packed_, 0, x.rows()};
    packed_glu_forward<Act, T>(
        x.rows(), [&](Index t) { return &x.coeffRef(t, 0); }, std::span(&all, 1), cache, y);
  }

  LinearParameter<T> gate_, up_;  // [d_hidden, d_model]
  LinearParameter<T> down_;       // [d_model, d_hidden]
  std::optional<PackedGlu<T>> packed_;
  Storage storage_ = Storage::kTrainable;
};

template <std::floating_point T, Activation Act>
const Matrix<T>& Glu<T, Act>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  expect_columns("Glu::forward", "x", x, d_model());
  cache.padding.set("Glu::forward", pass, x.rows());
  set_shape(cache.y, x.rows(), d_model());
  if (is_fused(pass)) {
    run_packed(x, cache.packed, cache.y);
    cache.padding.clear(cache.y);
    return cache.state.finish(*this, Pass{}, cache.y);  // Nothing is kept for `backward`.
  }
  Workspace::Frame frame(cache.workspace);
  GluRows<T> at = cache.kept.begin(x.rows(), pass.training ? d_model() : 0, d_hidden(),
                                   pass.training, gate_.precision(), frame);
  if (pass.training) {
    copy_rows_to<T>(x, at.x);
    clear_padding<T>(cache.padding.mask(), at.x);
    run(at.x, pass, at, cache);
  } else {
    run(x, pass, at, cache);
  }
  cache.kept.end(at);
  for (const Parameter<T>* weight : {&gate_, &up_}) pass.show<T>(*weight, x);
  pass.show<T>(down_, at.hidden);
  cache.padding.clear(cache.y);
  return cache.state.finish(*this, pass, cache.y);
}

template <std::floating_point T, Activation Act>
const Matrix<T>& Glu<T, Act>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.adapted_gate.expect_differentiable("Glu::backward", storage_);
  cache.state.begin_backward("Glu::backward", *this, dy);
  Workspace::Frame frame(cache.workspace);
  auto dh = frame.matrix<T>(dy.rows(), d_hidden());
  auto d_gate = frame.matrix<T>(dy.rows(), d_hidden());
  auto d_up = frame.matrix<T>(dy.rows(), d_hidden());
  set_shape(cache.dx, dy.rows(), d_model());
  GluRows<T> at = cache.kept.restored(frame);
  if (cache.kept.is_fp8()) glu_forward<Act, T>(at.gate, at.up, at.hidden);

  const Eigen::Ref<const Matrix<T>> d = cache.padding.template cleared<T>(dy, cache.dy);
  const Weights weights = this->weights(frame);
  std::vector<Product<T>>& products = cache.products;
  const auto add_gradient = [&](LinearParameter<T>& weight, MatrixIn<T> d_out, MatrixIn<T> x) {
    if (weight.takes_gradient()) products.push_back(weight_gradient_product<T>(d_out, x, weight));
  };
  products.clear();
  products.push_back(input_gradient_product<T>(d, weights.down, dh));
  add_gradient(down_, d, at.hidden);
  multiply<T>(products);
  adapt_backward<T>(down_, d, at.hidden, dh, cache.adapted_down);
  glu_backward<Act, T>(at.gate, at.up, dh, d_gate, d_up);
  products.clear();
  products.push_back(input_gradient_product<T>(d_gate, weights.gate, cache.dx));
  add_gradient(gate_, d_gate, at.x);
  add_gradient(up_, d_up, at.x);
  multiply<T>(products);
  multiply<T>(input_gradient_product<T>(d_up, weights.up, cache.dx, true));
  adapt_backward<T>(gate_, d_gate, at.x, cache.dx, cache.adapted_gate);
  adapt_backward<T>(up_, d_up, at.x, cache.dx, cache.adapted_up);
  return cache.dx;
}

template <std::floating_point T, Activation Act>
void Glu<T, Act>::set_storage(Storage storage) {
  if (storage == storage_) return;
  Parameter<T> gate, up, down;
  if (packed_) packed_->unpack(gate.value, up.value, down.value);
  std::optional<PackedGlu<T>> packed;
  if (storage != Storage::kTrainable) {
    SharedMemory memory(PackedGlu<T>::bytes(d_model(), d_hidden(), d_model(), storage));
    if (packed_) {
      packed.emplace(gate, up, down, storage, memory);
    } else {
      packed.emplace(gate_, up_, down_, storage, memory);
    }
    for (LinearParameter<T>* weight : {&gate_, &up_, &down_}) weight->forget_value();
  } else {
    gate_.value = std::move(gate.value);
    up_.value = std::move(up.value);
    down_.value = std::move(down.value);
  }
  packed_ = std::move(packed);
  storage_ = storage;
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Glu<float>;
extern template class weir::Glu<double>;
#endif
