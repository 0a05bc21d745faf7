// SPDX-License-Identifier: MIT
/// \file
/// A part of the tokens of a pass, for a layer that runs another for some of them only.
#pragma once

#include <cstdint>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/token_rows.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/top_k.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Which tokens of a pass are chosen, and the pass that is left of it if they are all there is.
/// Padding is never chosen.
template <class T>
struct TokenPart {
  TokenRows rows;              ///< All rows of the pass.
  List<Index> token;           ///< The chosen tokens, in order.
  List<std::uint8_t> chosen;   ///< [tokens], 1 for the chosen.
  Sequences sequences;         ///< How the chosen tokens divide into sequences.
  List<Index> places;          ///< The places of the chosen tokens in their sequences.
  List<Index> token_ids;       ///< The ids of the chosen tokens, where the pass knows ids.
  List<std::uint8_t> allowed;  ///< pass.allowed of the chosen, where it is for each token.
  List<T> candidate;           ///< Workspace of `choose_best`.
  List<Index> place, best;     ///< Workspace of `choose_best`.

  Index count() const { return token.count(); }
  bool is_real(Index t) const { return !rows.is_padding(t); }

  /// Takes over the rows of `pass`; none is chosen yet.
  /// \throws ShapeError   if the pass does not fit `tokens` rows.
  void begin(std::string_view where, const Pass& pass, Index tokens) {
    rows.set(where, pass, tokens);
    chosen.assign(tokens, 0);
  }

  /// Chooses the tokens of the highest scores in each sequence; of equal ones, the earlier.
  /// \param scores   [tokens, 1]
  /// \param share    `share(n)` is how many of n real tokens are chosen.
  template <class Share>
  void choose_best(MatrixIn<T> scores, Share&& share) {
    rows.for_each_group(Scope::kSequence, [&](Index first, Index last) {
      candidate.clear();
      place.clear();
      for (Index t = first; t < last; ++t) {
        if (!is_real(t)) continue;
        candidate.push_back(scores(t, 0));
        place.push_back(t);
      }
      best.resize(share(place.count()));
      top_k<T>(candidate, best);
      for (const Index i : best) chosen[place[i]] = 1;
    });
    list();
  }

  /// Chooses the tokens whose logits [tokens, 1] are above 0.
  void choose_positive(MatrixIn<T> logits) {
    for (Index t = 0; t < logits.rows(); ++t) {
      if (is_real(t) && logits(t, 0) > T(0)) chosen[t] = 1;
    }
    list();
  }

  /// The pass of the chosen tokens alone; lives as long as this and what `pass` points to.
  /// \param experts  The number of experts that pass.allowed is about; 0 if it is not known.
  /// \throws ConfigError  if pass.allowed is set and `experts` is 0.
  Pass pass_of_part(std::string_view where, const Pass& pass, Index experts);

  /// part[i] = x[token of i], [chosen, cols].
  void gather(MatrixIn<T> x, Matrix<T>& part) const {
    set_shape(part, count(), x.cols());
    for (Index i = 0; i < count(); ++i) part.row(i) = x.row(token[i]);
  }

  /// y[token of i] += part[i].
  void add_to(MatrixIn<T> part, Matrix<T>& y) const {
    for (Index i = 0; i < count(); ++i) {
      loops::add_scaled<T>(y.cols(), T(1), &part.coeffRef(i, 0), &y(token[i], 0));
    }
  }

 private:
  void list();
};

template <class T>
Pass TokenPart<T>::pass_of_part(std::string_view where, const Pass& pass, Index experts) {
  Pass inner = pass;
  inner.sequences = &sequences;
  inner.mask = {};
  if (!pass.places.empty()) {
    for (Index i = 0; i < count(); ++i) places[i] = element(pass.places, token[i]);
  }
  inner.places = places;
  if (!pass.token_ids.empty()) {
    token_ids.clear();
    for (const Index t : token) token_ids.push_back(pass.token_ids[static_cast<std::size_t>(t)]);
    inner.token_ids = token_ids;
  }
  if (pass.allowed.empty()) return inner;
  if (experts == 0) {
    throw_error<ConfigError>(
        where, ": pass.allowed is set, expected none around a layer without experts()");
  }
  if (static_cast<Index>(pass.allowed.size()) == experts * chosen.count()) {
    allowed.clear();
    for (const Index t : token) {
      const auto row = pass.allowed.begin() + t * experts;
      allowed.insert(allowed.end(), row, row + experts);
    }
    inner.allowed = allowed;
  }
  return inner;
}

template <class T>
void TokenPart<T>::list() {
  token.clear();
  places.clear();
  sequences.clear();
  rows.for_each_group(Scope::kSequence, [&](Index first, Index last) {
    const Index before = count();
    for (Index t = first; t < last; ++t) {
      if (chosen[t] == 0) continue;
      token.push_back(t);
      places.push_back(t - first);
    }
    sequences.append(count() - before);
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template struct weir::TokenPart<float>;
extern template struct weir::TokenPart<double>;
#endif
