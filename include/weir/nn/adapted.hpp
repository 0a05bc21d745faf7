// SPDX-License-Identifier: MIT
/// \file
/// What adapters of weights add to products with them, forward and backward.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/nn/dropout.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// The part that the adapters of one weight, or of one weight of each expert, have in a pass, in
/// the cache of the layer that the weights are of. See LowRank for the formula; its derivative is
///
///     dB += scale dy^T (drop(x) A^T),   dA += scale (dy B)^T drop(x),   dx += scale drop'(dy B A)
///
/// A layer adds what its weights are multiplied with, and then computes it, for all at once:
///
///     adapted.begin(pass);
///     adapted.add(weight, x, y);              for each weight, whose y is x W^T already
///     adapted.forward(pass);
///
///     adapted.begin_backward();
///     adapted.add_backward(weight, dy, x, dx);   in the order of `add`; dx is dy W already
///     adapted.backward();
///
/// Without adapters all this does nothing.
template <class T>
class Adapted {
 public:
  /// Forgets the last pass.
  void begin(const Pass& pass) {
    count_ = next_ = 0;
    names_ = pass.adapters;
    through_stored_ = pass.training && pass.through_stored;
  }

  /// \param x        [rows, inputs of the weight]; stays where it is until `forward`.
  /// \param y        [rows, outputs], which the adapters add to. No two weights share rows of it.
  void add(const LinearParameter<T>& weight, MatrixIn<T> x, MatrixOut<T> y);

  /// \throws ConfigError  in training with dropout, without a pass.rng.
  void forward(const Pass& pass);

  void begin_backward() { next_ = 0; }

  /// \param dy       [rows, outputs], the gradient of y.
  /// \param x        As given to `add`.
  /// \param dx       [rows, inputs], to which the gradient of x is added.
  /// \throws StateError   if the weight has lost adapters since the forward pass, or has others.
  void add_backward(LinearParameter<T>& weight, MatrixIn<T> dy, MatrixIn<T> x, MatrixOut<T> dx);

  void backward();

  /// \throws StateError   unless `storage` is kTrainable or the pass went through stored weights.
  void expect_differentiable(std::string_view who, Storage storage) const {
    if (!through_stored_) expect_trainable(who, storage);
  }

 private:
  using In = Eigen::Map<const Matrix<T>, 0, Eigen::OuterStride<>>;
  using Out = Eigen::Map<Matrix<T>, 0, Eigen::OuterStride<>>;

  struct Rows {
    const T* data = nullptr;
    Index rows = 0, cols = 0, stride = 0;

    static Rows of(MatrixIn<T> m) { return {m.data(), m.rows(), m.cols(), m.outerStride()}; }
    In view() const { return {data, rows, cols, Eigen::OuterStride<>(stride)}; }
    /// Of a matrix that was given to be written to.
    Out writable() const {
      return {const_cast<T*>(data), rows, cols, Eigen::OuterStride<>(stride)};  // NOLINT
    }
  };

  /// One adapter of one weight.
  struct Use {
    const LinearParameter<T>* weight = nullptr;
    std::size_t place = 0;  ///< Which adapter of the weight.
    std::size_t round = 0;  ///< How many adapters of the weight come before it in this pass.
    const LowRank<T>* adapter = nullptr;
    LowRank<T>* trained = nullptr;
    Rows x, y;                   ///< In the backward pass, y is dy,
    Rows dx;                     ///< and this the gradient of x.
    Scratch<T> dropped, factor;  ///< drop(x) and its factors, or empty.
    Scratch<T> low, d_low;       ///< scale drop(x) A^T and scale dy B, [rows, rank].
    Scratch<T> d_dropped;        ///< The gradient of drop(x), or empty.

    bool drops() const { return factor.rows() > 0; }
    In seen() const {
      if (!drops()) return x.view();
      return {dropped.data(), dropped.rows(), dropped.cols(), Eigen::OuterStride<>(dropped.cols())};
    }
  };

  Use& next_use() {
    if (count_ == uses_.size()) uses_.emplace_back();
    return uses_[count_++];
  }

  /// Calls `product(use)` for every use, those of one weight in different calls of `multiply`.
  template <class Add>
  void multiply_in_rounds(Add&& product) {
    std::size_t rounds = 0;
    for (std::size_t i = 0; i < count_; ++i) rounds = std::max(rounds, uses_[i].round + 1);
    for (std::size_t round = 0; round < rounds; ++round) {
      products_.clear();
      for (std::size_t i = 0; i < count_; ++i) {
        if (uses_[i].round == round) products_.push_back(product(uses_[i]));
      }
      multiply<T>(products_);
    }
  }

  std::vector<Use> uses_;  // The first `count_` are of this pass; the others keep their memory.
  std::size_t count_ = 0;
  std::size_t next_ = 0;  // The first that the backward pass has not come to.
  std::vector<Product<T>> products_;
  std::string_view names_;
  bool through_stored_ = false;
};

template <class T>
void Adapted<T>::add(const LinearParameter<T>& weight, MatrixIn<T> x, MatrixOut<T> y) {
  std::size_t round = 0;
  for (std::size_t i = 0; i < weight.adapters.size(); ++i) {
    const LowRank<T>& adapter = weight.adapters[i];
    if (adapter.is_merged() || !matches_pattern(names_, adapter.name)) continue;
    Use& use = next_use();
    use.weight = &weight;
    use.place = i;
    use.round = round++;
    use.adapter = &adapter;
    use.x = Rows::of(x);
    use.y = Rows::of(y);
  }
}

template <class T>
void Adapted<T>::forward(const Pass& pass) {
  if (count_ == 0) return;
  products_.clear();
  for (std::size_t i = 0; i < count_; ++i) {
    Use& use = uses_[i];
    const bool drops = pass.training && use.adapter->dropout > 0.0 && use.x.rows > 0;
    auto dropped = use.dropped.reshape(drops ? use.x.rows : 0, use.x.cols);
    if (drops) dropped = use.x.view();
    drop_hidden<T>("LowRank::dropout", drops ? use.adapter->dropout : 0.0, pass, dropped,
                   use.factor);
    products_.push_back(product_nt<T>(use.seen(), use.adapter->a.value,
                                      use.low.reshape(use.x.rows, use.adapter->rank())));
  }
  multiply<T>(products_);
  for (std::size_t i = 0; i < count_; ++i) {
    uses_[i].low.view() *= static_cast<T>(uses_[i].adapter->scale());
  }
  multiply_in_rounds([](Use& use) {
    return product_nt<T>(use.low.view(), use.adapter->b.value, use.y.writable(), true);
  });
}

template <class T>
void Adapted<T>::add_backward(LinearParameter<T>& weight, MatrixIn<T> dy, MatrixIn<T> x,
                              MatrixOut<T> dx) {
  for (; next_ < count_ && uses_[next_].weight == &weight; ++next_) {
    Use& use = uses_[next_];
    if (use.place >= weight.adapters.size()) {
      throw_error<StateError>("LowRank: a weight has ", weight.adapters.size(),
                              " adapters, expected those of the forward pass");
    }
    use.trained = &weight.adapters[use.place];
    if (use.trained->rank() != use.low.cols()) {
      throw_error<StateError>("LowRank: adapter '", use.trained->name, "' has the rank ",
                              use.trained->rank(), ", expected ", use.low.cols(),
                              " as in the forward pass");
    }
    use.x = Rows::of(x);
    use.y = Rows::of(dy);
    use.dx = Rows::of(dx);
  }
}

template <class T>
void Adapted<T>::backward() {
  if (count_ == 0) return;
  if (next_ != count_) {
    throw_error<StateError>("LowRank: ", count_ - next_,
                            " adapters of the forward pass have no gradient, expected all");
  }
  products_.clear();
  for (std::size_t i = 0; i < count_; ++i) {
    Use& use = uses_[i];
    products_.push_back(product_nn<T>(use.y.view(), use.trained->b.value,
                                      use.d_low.reshape(use.y.rows, use.trained->rank())));
    products_.push_back(
        product_tn<T>(use.y.view(), use.low.view(), use.trained->b.gradient(), true));
  }
  multiply<T>(products_);
  products_.clear();
  for (std::size_t i = 0; i < count_; ++i) {
    Use& use = uses_[i];
    use.d_low.view() *= static_cast<T>(use.trained->scale());
    products_.push_back(
        product_tn<T>(use.d_low.view(), use.seen(), use.trained->a.gradient(), true));
    auto d_dropped = use.d_dropped.reshape(use.drops() ? use.x.rows : 0, use.x.cols);
    if (use.drops()) {
      products_.push_back(product_nn<T>(use.d_low.view(), use.trained->a.value, d_dropped));
    }
  }
  multiply<T>(products_);
  std::size_t dropping = 0;
  for (std::size_t i = 0; i < count_; ++i) {
    Use& use = uses_[i];
    if (!use.drops()) continue;
    ++dropping;
    apply_dropout<T>(use.factor, use.d_dropped.view());
    add_rows<T>(use.dx.view(), use.d_dropped.view(), use.dx.writable());
  }
  if (dropping == count_) return;
  multiply_in_rounds([](Use& use) {
    // Nothing is left to add where drop(x) was.
    const Index rows = use.drops() ? 0 : use.x.rows;
    return product_nn<T>(use.d_low.view().topRows(rows), use.trained->a.value,
                         use.dx.writable().topRows(rows), true);
  });
}

/// Whether an adapter of the weight takes part in the pass.
template <class T>
bool is_adapted(const LinearParameter<T>& weight, const Pass& pass) {
  return std::any_of(weight.adapters.begin(), weight.adapters.end(),
                     [&](const LowRank<T>& a) { return !a.is_merged() && pass.adapts_by(a.name); });
}

/// Adds what the adapters of one weight add: y += adapters(x).
template <class T>
void adapt(const LinearParameter<T>& weight, MatrixIn<T> x, const Pass& pass, MatrixOut<T> y,
           Adapted<T>& adapted) {
  adapted.begin(pass);
  adapted.add(weight, x, y);
  adapted.forward(pass);
}

/// The derivative of `adapt`: adds to the gradients of the adapters and to dx.
template <class T>
void adapt_backward(LinearParameter<T>& weight, MatrixIn<T> dy, MatrixIn<T> x, MatrixOut<T> dx,
                    Adapted<T>& adapted) {
  adapted.begin_backward();
  adapted.add_backward(weight, dy, x, dx);
  adapted.backward();
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Adapted<float>;
extern template class weir::Adapted<double>;
#endif
