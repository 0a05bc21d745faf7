// SPDX-License-Identifier: MIT
/// \file
/// One layer of a decoder: residual branches, each a norm and a layer.
#pragma once

#include <concepts>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/types.hpp>
#include <weir/model/any_layer.hpp>

namespace weir {

/// x + layer(norm(x)), under the names `name` and `name_norm`.
template <std::floating_point T>
struct Branch {
  std::string name;
  AnyLayer<T> norm;
  AnyLayer<T> layer;
};

/// Pre-norm residual branches one after the other:
///
///     x <- x + layer_i(norm_i(x))     for each branch i
///
/// The usual decoder block has two, attention and a feed-forward network or mixture of experts
/// (`pre_norm_block`); a block may have more, such as a dense network behind the mixture.
template <std::floating_point T>
class Block {
 public:
  using Scalar = T;

  struct Cache {
    struct OfBranch {
      typename AnyLayer<T>::Cache norm, layer;
      Matrix<T> out;
    };
    std::vector<OfBranch> branches;
    Matrix<T> dx;
    std::vector<typename AnyLayer<T>::State*> states;  ///< Those of one branch.
    T aux_loss = T(0);                                 ///< Sum over the branches.
    bool filled = false;
  };

  /// What decoding keeps of one sequence.
  struct State {
    std::vector<typename AnyLayer<T>::State> branches;

    /// Forgets all tokens but the first `length`, see AnyLayer::State.
    void truncate(Index length) {
      for (auto& branch : branches) branch.truncate(length);
    }
  };

  /// \throws ConfigError  without branches, or if two have the same name.
  explicit Block(std::vector<Branch<T>> branches) : branches_(std::move(branches)) {
    expect_at_least<std::size_t>("Block", "branches", branches_.size(), 1);
    for (std::size_t i = 0; i < branches_.size(); ++i) {
      for (std::size_t j = 0; j < i; ++j) {
        if (branches_[i].name == branches_[j].name) {
          fail<ConfigError>("Block: branches ", j, " and ", i, " are both named '",
                            branches_[i].name, "', expected different names");
        }
      }
    }
  }

  Matrix<T> forward(MatrixIn<T> x) const {
    Cache cache;
    return forward(x, cache);
  }

  const Matrix<T>& forward(MatrixIn<T> x, Cache& cache) const { return forward(x, {}, cache); }

  /// \param x        [tokens, d_model]
  /// \return         [tokens, d_model]
  /// \throws ShapeError   if a layer does not yield the shape of x.
  const Matrix<T>& forward(MatrixIn<T> x, const Pass& pass, Cache& cache) const {
    cache.filled = false;
    const Matrix<T>& y =
        run("Block::forward", x, cache, [&](std::size_t i, MatrixIn<T> from) -> const Matrix<T>& {
          auto& own = cache.branches[i];
          const Matrix<T>& normed = branches_[i].norm.forward(from, pass, own.norm);
          return branches_[i].layer.forward(normed, pass, own.layer);
        });
    cache.filled = true;
    return y;
  }

  /// Adds to the gradients of all branches, their auxiliary losses included.
  /// \param dy       [tokens, d_model], of the last forward pass.
  /// \return         dL/dx, [tokens, d_model].
  /// \throws StateError   if the last pass with `cache` was no forward pass that succeeded.
  /// \throws ShapeError   if dy does not have the shape of the result.
  const Matrix<T>& backward(MatrixIn<T> dy, Cache& cache) {
    if (!cache.filled) {
      fail<StateError>("Block::backward: the cache is empty, expected a forward pass before");
    }
    const Matrix<T>& y = cache.branches.back().out;
    expect_shape("Block::backward", "dy", dy, y.rows(), y.cols());
    cache.dx = dy;
    for (std::size_t i = branches_.size(); i-- > 0;) {
      auto& own = cache.branches[i];
      cache.dx +=
          branches_[i].norm.backward(branches_[i].layer.backward(cache.dx, own.layer), own.norm);
    }
    return cache.dx;
  }

  /// Continues one sequence by the tokens x [new tokens, d_model].
  const Matrix<T>& decode(MatrixIn<T> x, State& state, Cache& cache) const {
    State* const states[] = {&state};
    return decode(x, {}, states, cache);
  }

  /// Continues the sequences of `pass` by the tokens x [new tokens, d_model], see DecodingLayer.
  const Matrix<T>& decode(MatrixIn<T> x, const Pass& pass, std::span<State* const> states,
                          Cache& cache) const {
    cache.filled = false;
    for (State* state : states) state->branches.resize(branches_.size());
    return run("Block::decode", x, cache, [&](std::size_t i, MatrixIn<T> from) -> const Matrix<T>& {
      auto& own = cache.branches[i];
      const Matrix<T>& normed = branches_[i].norm.forward(from, pass, own.norm);
      cache.states.clear();
      for (State* state : states) cache.states.push_back(&state->branches[i]);
      return branches_[i].layer.decode(normed, pass, cache.states, own.layer);
    });
  }

  /// See MoELayer::update.
  void update() {
    for (Branch<T>& branch : branches_) branch.layer.update();
  }

  /// Parameters `name_norm.*` and `name.*` of each branch.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (auto& branch : self.branches_) {
      visit(branch.name + "_norm", branch.norm);
      visit(branch.name, branch.layer);
    }
  }

  std::vector<Branch<T>>& branches() { return branches_; }
  const std::vector<Branch<T>>& branches() const { return branches_; }

 private:
  /// Adds to x, branch by branch, what `layer_of_norm(i, x)` yields.
  template <class Run>
  const Matrix<T>& run(std::string_view where, MatrixIn<T> x, Cache& cache,
                       Run&& layer_of_norm) const {
    cache.branches.resize(branches_.size());
    cache.aux_loss = T(0);
    const auto add_branch = [&](std::size_t i, MatrixIn<T> from) {
      auto& own = cache.branches[i];
      const Matrix<T>& y = layer_of_norm(i, from);
      expect_shape(where, branches_[i].name, y, from.rows(), from.cols());
      own.out = from + y;
      cache.aux_loss += own.layer.aux_loss;
    };
    add_branch(0, x);
    for (std::size_t i = 1; i < branches_.size(); ++i) add_branch(i, cache.branches[i - 1].out);
    return cache.branches.back().out;
  }

  std::vector<Branch<T>> branches_;
};

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
