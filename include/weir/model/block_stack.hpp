// SPDX-License-Identifier: MIT
/// \file
/// The layers of a decoder, one after the other, and how much of them is kept for training.
#pragma once

#include <concepts>
#include <cstddef>
#include <functional>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/function_ref.hpp>
#include <weir/core/kept_pass.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/random.hpp>
#include <weir/core/types.hpp>
#include <weir/core/workspace.hpp>
#include <weir/model/block.hpp>

namespace weir {

/// Blocks, each of which takes what the one before it yields: h <- block_l(h).
///
/// Memory: an inference pass runs all blocks in the cache of one. A training pass keeps what
/// `backward` needs, either all of it, or, with `recompute`, what each block was given alone:
/// `backward` then computes a block's forward pass anew before its backward pass. That takes the
/// time of another forward pass, and [tokens, d_model] numbers a block instead of some tens of them
/// (Chen et al. 2016, arXiv:1604.06174). Gradients are the same to the bit: random numbers are
/// drawn again from where the pass had them, and what blocks learn from being used (loads,
/// capacities) they learn in `backward`, once. In both cases, blocks share the memory that their
/// passes need while they run, see Workspace.
template <std::floating_point T>
class BlockStack {
 public:
  using Scalar = T;
  using StateOf = FunctionRef<typename Block<T>::State&(std::size_t s, std::size_t l)>;

  struct Cache {
    std::vector<typename Block<T>::Cache> layers;  ///< One for each layer whose pass is kept.
    typename Block<T>::Cache one;                  ///< The cache of all layers that keep nothing.
    std::vector<Matrix<T>> outputs;                ///< Of each layer that is computed anew.
    Matrix<T> output;                              ///< Of the last layer, in inference.
    KeptPass pass;   ///< The pass of the layers that are computed anew.
    List<Rng> rngs;  ///< Where each of them began to draw.
    std::vector<typename Block<T>::State*> states;  ///< The states of one layer.
    Workspace workspace;                            ///< What layers need while they run.
    bool training = false, recompute = false;       ///< How the last pass ran.
    /// If there is one, `backward` calls it with each layer l once that layer has added to its
    /// gradients, the last layer first: what travels to other machines may set out then.
    std::function<void(std::size_t l)> layer_done;
  };

  explicit BlockStack(std::vector<Block<T>> layers, bool recompute = false)
      : layers_(std::move(layers)), recompute_(recompute) {}

  /// \param x        [tokens, d_model], which has to live until `backward`.
  /// \return         [tokens, d_model]
  const Matrix<T>& forward(const Matrix<T>& x, const Pass& pass, Cache& cache) const;

  /// Adds to the gradients of all layers.
  /// \param dy       [tokens, d_model], of the last forward pass, which trained.
  /// \param x        As given to it.
  /// \return         dL/dx, [tokens, d_model].
  Eigen::Ref<const Matrix<T>> backward(MatrixIn<T> dy, const Matrix<T>& x, Cache& cache);

  /// Continues `sequences` sequences, see DecodingLayer.
  /// \param state_of  `state_of(s, l)` is the state of sequence s in layer l.
  const Matrix<T>& decode(const Matrix<T>& x, const Pass& pass, std::size_t sequences,
                          StateOf state_of, Cache& cache) const;

  /// The result of the last pass with `cache`, which was given `x`.
  const Matrix<T>& output(const Matrix<T>& x, const Cache& cache) const {
    if (layers_.empty()) return x;
    if (!cache.training) return cache.output;
    return cache.recompute ? cache.outputs[layers_.size() - 1]
                           : layers_.back().output(cache.layers[layers_.size() - 1]);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("layers", self.layers_);
  }

  std::vector<Block<T>>& layers() { return layers_; }
  const std::vector<Block<T>>& layers() const { return layers_; }

  bool recompute() const { return recompute_; }
  void set_recompute(bool recompute) { recompute_ = recompute; }

 private:
  /// Runs all layers in one cache: `layer(l, x)` is layer l. Its result goes to `output_of(l)`.
  template <class Run, class OutputOf>
  const Matrix<T>& run(const Matrix<T>& x, const Pass& pass, Cache& cache, Run&& layer,
                       OutputOf&& output_of) const {
    const Workspace::Lend lend(&cache.workspace);
    const Matrix<T>* h = &x;
    for (std::size_t l = 0; l < layers_.size(); ++l) {
      const PassRecord::Scope scope(pass.record, "layers", static_cast<Index>(l));
      layer(l, *h);
      Matrix<T>& output = output_of(l);
      layers_[l].swap_output(cache.one, output);
      h = &output;
    }
    return *h;
  }

  std::vector<Block<T>> layers_;
  bool recompute_ = false;
};

template <std::floating_point T>
const Matrix<T>& BlockStack<T>::forward(const Matrix<T>& x, const Pass& pass, Cache& cache) const {
  cache.training = pass.training;
  cache.recompute = pass.training && recompute_;
  if (!pass.training) {
    return run(
        x, pass, cache,
        [&](std::size_t l, const Matrix<T>& h) { layers_[l].forward(h, pass, cache.one); },
        [&](std::size_t) -> Matrix<T>& { return cache.output; });
  }
  if (cache.recompute) {
    cache.outputs.resize(layers_.size());
    cache.pass.keep(pass);
    cache.rngs.clear();
    return run(
        x, pass, cache,
        [&](std::size_t l, const Matrix<T>& h) {
          if (pass.rng != nullptr) cache.rngs.push_back(*pass.rng);
          layers_[l].forward(h, pass, cache.one);
        },
        [&](std::size_t l) -> Matrix<T>& { return cache.outputs[l]; });
  }
  const Workspace::Lend lend(&cache.workspace);
  cache.layers.resize(layers_.size());
  const Matrix<T>* h = &x;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const PassRecord::Scope scope(pass.record, "layers", static_cast<Index>(l));
    h = &layers_[l].forward(*h, pass, cache.layers[l]);
  }
  return *h;
}

template <std::floating_point T>
Eigen::Ref<const Matrix<T>> BlockStack<T>::backward(MatrixIn<T> dy, const Matrix<T>& x,
                                                    Cache& cache) {
  const Workspace::Lend lend(&cache.workspace);
  const Matrix<T>* d = nullptr;
  const auto given = [&]() -> Eigen::Ref<const Matrix<T>> {
    if (d == nullptr) return dy;
    return *d;
  };
  for (std::size_t l = layers_.size(); l-- > 0;) {
    if (!cache.recompute) {
      d = &layers_[l].backward(given(), cache.layers[l]);
    } else {
      if (l + 1 < layers_.size()) {  // The cache is still that of the last layer's pass.
        const Matrix<T>& h = l == 0 ? x : cache.outputs[l - 1];
        Rng* const rng = cache.rngs.empty() ? nullptr : &cache.rngs[static_cast<Index>(l)];
        layers_[l].forward(h, cache.pass.again(rng), cache.one);
      }
      d = &layers_[l].backward(given(), cache.one);  // Also where that is the result of this cache.
    }
    if (cache.layer_done) cache.layer_done(l);
  }
  return given();
}

template <std::floating_point T>
const Matrix<T>& BlockStack<T>::decode(const Matrix<T>& x, const Pass& pass, std::size_t sequences,
                                       StateOf state_of, Cache& cache) const {
  cache.training = cache.recompute = false;
  return run(
      x, pass, cache,
      [&](std::size_t l, const Matrix<T>& h) {
        cache.states.clear();
        for (std::size_t s = 0; s < sequences; ++s) cache.states.push_back(&state_of(s, l));
        layers_[l].decode(h, pass, cache.states, cache.one);
      },
      [&](std::size_t) -> Matrix<T>& { return cache.output; });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::BlockStack<float>;
extern template class weir::BlockStack<double>;
#endif
