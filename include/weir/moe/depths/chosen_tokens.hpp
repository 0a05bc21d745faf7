// SPDX-License-Identifier: MIT
/// \file
/// A part of the tokens of a pass, for a layer that runs another for some of them only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <weir/core/pass.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/top_k.hpp>

namespace weir {

/// Calls `body(s, begin, end)` with the tokens of each sequence of a pass of `tokens` tokens.
template <class Body>
void for_each_sequence(const Pass& pass, Index tokens, Body&& body) {
  if (pass.sequences == nullptr) return body(Index(0), Index(0), tokens);
  for (Index s = 0; s < pass.sequences->count(); ++s) {
    body(s, pass.sequences->begin(s), pass.sequences->end(s));
  }
}

/// Which tokens of a pass are chosen, and the pass that is left of it if they are all there is.
/// Padding is never chosen.
template <class T>
struct ChosenTokens {
  std::vector<Index> token;           ///< Of each chosen one, in order.
  std::vector<std::uint8_t> chosen;   ///< [tokens], 1 for the chosen.
  std::vector<std::uint8_t> real;     ///< [tokens], 0 for padding.
  Sequences sequences;                ///< Of the chosen.
  std::vector<Index> token_ids;       ///< Their ids, where the pass knows ids.
  std::vector<std::uint8_t> allowed;  ///< pass.allowed of the chosen, where it is for each token.
  std::vector<T> candidate;           ///< Workspace of the choice.
  std::vector<Index> place, best;     ///< Likewise.

  Index chosen_count() const { return static_cast<Index>(token.size()); }
  Index token_of(Index i) const { return token[static_cast<std::size_t>(i)]; }
  bool is_real(Index t) const { return real[static_cast<std::size_t>(t)] != 0; }

  /// Tells the real tokens of `pass` apart; none is chosen yet.
  void begin(const Pass& pass, Index tokens) {
    real.resize(static_cast<std::size_t>(tokens));
    for (Index t = 0; t < tokens; ++t) {
      real[static_cast<std::size_t>(t)] = pass.is_padding(t) ? 0 : 1;
    }
    chosen.assign(real.size(), 0);
  }

  /// Chooses the tokens of the highest scores in each sequence; of equal ones, the earlier.
  /// \param scores   [tokens, 1]
  /// \param count    `count(n)` is how many of n real tokens are chosen.
  template <class Count>
  void choose_best(MatrixIn<T> scores, const Pass& pass, Count&& count) {
    for_each_sequence(pass, scores.rows(), [&](Index, Index first, Index last) {
      candidate.clear();
      place.clear();
      for (Index t = first; t < last; ++t) {
        if (!is_real(t)) continue;
        candidate.push_back(scores(t, 0));
        place.push_back(t);
      }
      const auto candidates = static_cast<Index>(place.size());
      best.resize(static_cast<std::size_t>(count(candidates)));
      top_k(candidate.data(), candidates, static_cast<Index>(best.size()), best.data());
      for (const Index i : best) {
        chosen[static_cast<std::size_t>(place[static_cast<std::size_t>(i)])] = 1;
      }
    });
    list(pass, scores.rows());
  }

  /// Chooses the tokens whose logits [tokens, 1] are above 0.
  void choose_positive(MatrixIn<T> logits, const Pass& pass) {
    for (Index t = 0; t < logits.rows(); ++t) {
      if (is_real(t) && logits(t, 0) > T(0)) chosen[static_cast<std::size_t>(t)] = 1;
    }
    list(pass, logits.rows());
  }

  /// The pass of the chosen tokens alone; lives as long as this and what `pass` points to.
  /// \param experts  Of the layer that it is for; only if pass.allowed is set.
  Pass pass_of_chosen(const Pass& pass, Index experts) {
    Pass inner = pass;
    inner.sequences = &sequences;
    inner.mask = {};
    if (!pass.token_ids.empty()) {
      token_ids.clear();
      for (const Index t : token) token_ids.push_back(pass.token_ids[static_cast<std::size_t>(t)]);
      inner.token_ids = token_ids;
    }
    const std::size_t each_token = static_cast<std::size_t>(experts) * chosen.size();
    if (!pass.allowed.empty() && pass.allowed.size() == each_token) {
      allowed.clear();
      for (const Index t : token) {
        const auto row = pass.allowed.begin() + t * experts;
        allowed.insert(allowed.end(), row, row + experts);
      }
      inner.allowed = allowed;
    }
    return inner;
  }

 private:
  void list(const Pass& pass, Index tokens) {
    token.clear();
    sequences.clear();
    for_each_sequence(pass, tokens, [&](Index, Index first, Index last) {
      const Index before = chosen_count();
      for (Index t = first; t < last; ++t) {
        if (chosen[static_cast<std::size_t>(t)] != 0) token.push_back(t);
      }
      sequences.append(chosen_count() - before);
    });
  }
};

}  // namespace weir
