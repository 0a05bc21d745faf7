// SPDX-License-Identifier: MIT
/// \file
/// One layer of a decoder: residual branches, each a norm and a layer.
#pragma once

#include <algorithm>
#include <concepts>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/cache_state.hpp>
#include <weir/core/cache_storage.hpp>
#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/model/any_layer.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// multiplier * layer(norm(x)) or multiplier * post_norm(layer(norm(x))), under the names `name`,
/// `name_norm` and `name_post_norm`.
template <std::floating_point T>
struct Branch {
  std::string name;
  AnyLayer<T> norm;
  AnyLayer<T> layer;
  std::optional<AnyLayer<T>> post_norm{};  // With "= {}", g++ 12 stops with an internal error.
  bool parallel = false;    ///< Whether it reads the x that the branch before it reads.
  double multiplier = 1.0;  ///< Of what is added to x; Granite's `residual_multiplier`.
};

/// Residual branches f_i(x) = m_i layer_i(norm_i(x)), each added to the sum of all before it:
///
///     x <- x + f_i(x)                  one after the other,
///     x <- x + f_i(x) + f_j(x)         branch j being parallel to branch i before it
///
/// Any number of branches may be parallel. The usual decoder block has two, one after the other:
/// attention and a feed-forward network or mixture of experts (`pre_norm_block`). Grok-1 has a norm
/// behind each layer as well (xai-org/grok-1, model.py); OpenMoE a dense network beside or behind
/// each mixture (Xue et al. 2024, arXiv:2402.01739).
template <std::floating_point T>
class Block {
 public:
  using Scalar = T;

  struct Cache {
    struct OfBranch {
      typename AnyLayer<T>::Cache norm, layer, post_norm;
      Matrix<T> out;  ///< The sum with this branch.
    };
    CacheState state;
    std::vector<OfBranch> branches;  ///< One for each branch, or more after a larger block.
    Matrix<T> dx;
    Matrix<T> d_sum;     ///< The gradient of the sum of parallel branches.
    Matrix<T> d_scaled;  ///< The gradient of a branch that has a multiplier.
    std::vector<typename AnyLayer<T>::State*> states;  ///< The states of one branch.
  };

  /// What decoding remembers about one sequence.
  struct State {
    std::vector<typename AnyLayer<T>::State> branches;
    CacheStorage storage = CacheStorage::kFull;  ///< Has to be set before the first token.

    /// Forgets all tokens but the first `length`, see AnyLayer::State.
    void truncate(Index length) {
      for (auto& branch : branches) branch.truncate(length);
    }
  };

  /// \throws ConfigError  without branches, if two have the same name, if the first is parallel, or
  ///                      unless multipliers are finite.
  explicit Block(std::vector<Branch<T>> branches);

  /// \param x        [tokens, d_model]
  /// \return         [tokens, d_model]
  /// \throws ShapeError   if a layer does not yield the shape of x.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const;

  /// Adds to the gradients of all branches, their auxiliary losses included.
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the cache does not fit, see CacheState.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache);

  /// Continues the sequences of `pass` by the tokens x [new tokens, d_model], see DecodingLayer.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const;

  /// The result of the last pass with `cache`.
  const Matrix<T>& output(const Cache& cache) const {
    return cache.branches[branches_.size() - 1].out;
  }

  /// Exchanges the result of the last pass with `cache` for memory that the next pass may have.
  void swap_output(Cache& cache, Matrix<T>& with) const {
    Matrix<T>& out = cache.branches[branches_.size() - 1].out;
    set_shape(with, out.rows(), out.cols());
    out.swap(with);
  }

  /// Parameters `name_norm.*`, `name.*` and `name_post_norm.*` of each branch.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (auto& branch : self.branches_) {
      visit(branch.name + "_norm", branch.norm);
      visit(branch.name, branch.layer);
      if (branch.post_norm) visit(branch.name + "_post_norm", *branch.post_norm);
    }
  }

  std::vector<Branch<T>>& branches() { return branches_; }
  const std::vector<Branch<T>>& branches() const { return branches_; }

 private:
  /// Adds the results of `layer(i, normed)` to x, branch by branch.
  template <class Run>
  const Matrix<T>& run(std::string_view where, MatrixIn<T> x, const Pass& pass, Cache& cache,
                       Run&& layer) const {
    using In = Eigen::Ref<const Matrix<T>>;
    if (cache.branches.size() < branches_.size()) cache.branches.resize(branches_.size());
    const auto sum_before = [&](std::size_t i) -> In {
      return i == 0 ? In(x) : In(cache.branches[i - 1].out);
    };
    std::size_t group = 0;  // The first branch of the group of parallel branches.
    for (std::size_t i = 0; i < branches_.size(); ++i) {
      const Branch<T>& branch = branches_[i];
      auto& own = cache.branches[i];
      if (!branch.parallel) group = i;
      const PassRecord::Scope scope(pass.record, branch.name);
      const Matrix<T>* y = &layer(i, branch.norm.forward(sum_before(group), pass, own.norm));
      if (branch.post_norm) y = &branch.post_norm->forward(*y, pass, own.post_norm);
      const In sum = sum_before(i);
      expect_shape(where, branch.name, *y, sum.rows(), sum.cols());
      set_shape(own.out, sum.rows(), sum.cols());
      if (branch.multiplier == 1.0) {
        add_rows<T>(sum, *y, own.out);
      } else {
        add_scaled_rows<T>(sum, static_cast<T>(branch.multiplier), *y, own.out);
      }
    }
    return output(cache);
  }

  const Matrix<T>& backward_branch(std::size_t i, const Matrix<T>& dy, Cache& cache) {
    Branch<T>& branch = branches_[i];
    auto& own = cache.branches[i];
    const Matrix<T>* d = &dy;
    if (branch.multiplier != 1.0) {
      scale_rows<T>(static_cast<T>(branch.multiplier), dy, cache.d_scaled);
      d = &cache.d_scaled;
    }
    if (branch.post_norm) d = &branch.post_norm->backward(*d, own.post_norm);
    return branch.norm.backward(branch.layer.backward(*d, own.layer), own.norm);
  }

  std::vector<Branch<T>> branches_;
};

template <std::floating_point T>
Block<T>::Block(std::vector<Branch<T>> branches) : branches_(std::move(branches)) {
  expect_at_least<std::size_t>("Block", "branches", branches_.size(), 1);
  for (std::size_t i = 0; i < branches_.size(); ++i) {
    expect_finite("Block", "multiplier", branches_[i].multiplier);
    for (std::size_t j = 0; j < i; ++j) {
      if (branches_[i].name == branches_[j].name) {
        throw_error<ConfigError>("Block: branches ", j, " and ", i, " are both named '",
                                 branches_[i].name, "', expected different names");
      }
    }
  }
  if (branches_[0].parallel) {
    throw_error<ConfigError>("Block: branch 0, '", branches_[0].name,
                             "', is parallel, expected a branch before it");
  }
}

template <std::floating_point T>
const Matrix<T>& Block<T>::forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
  cache.state.begin();
  const Matrix<T>& y = run(
      "Block::forward", x, pass, cache, [&](std::size_t i, MatrixIn<T> normed) -> const Matrix<T>& {
        return branches_[i].layer.forward(normed, pass, cache.branches[i].layer);
      });
  return cache.state.finish(*this, pass, y);
}

template <std::floating_point T>
const Matrix<T>& Block<T>::backward(MatrixIn<T> dy, Cache& cache) {
  cache.state.begin_backward("Block::backward", *this, dy);
  const bool in_place = dy.size() > 0 && dy.data() == cache.dx.data();
  if (!in_place) copy_rows<T>(dy, cache.dx);
  for (std::size_t i = branches_.size(); i-- > 0;) {
    // A group of parallel branches shares the gradient of its sum; each adds to that of its x.
    const bool last = i + 1 == branches_.size() || !branches_[i + 1].parallel;
    const bool alone = last && !branches_[i].parallel;
    if (last && !alone) copy_rows<T>(cache.dx, cache.d_sum);
    add_rows<T>(cache.dx, backward_branch(i, alone ? cache.dx : cache.d_sum, cache), cache.dx);
  }
  return cache.dx;
}

template <std::floating_point T>
const Matrix<T>& Block<T>::decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                                  Cache& cache) const {
  cache.state.begin();
  for (State* state : states) {
    state->branches.resize(branches_.size(), typename AnyLayer<T>::State(state->storage));
  }
  return run(
      "Block::decode", x, pass, cache, [&](std::size_t i, MatrixIn<T> normed) -> const Matrix<T>& {
        cache.states.clear();
        for (State* state : states) cache.states.push_back(&state->branches[i]);
        return branches_[i].layer.decode(normed, pass, cache.states, cache.branches[i].layer);
      });
}

/// The usual block: attention, then `feed_forward` under the name `name` ("mlp" or "moe").
template <std::floating_point T>
Block<T> pre_norm_block(AnyLayer<T> attention_norm, AnyLayer<T> attention,
                        AnyLayer<T> feed_forward_norm, AnyLayer<T> feed_forward,
                        const std::string& name) {
  std::vector<Branch<T>> branches;
  branches.push_back({"attention", std::move(attention_norm), std::move(attention)});
  branches.push_back({name, std::move(feed_forward_norm), std::move(feed_forward)});
  return Block<T>(std::move(branches));
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::Block<float>;
extern template class weir::Block<double>;
#endif
