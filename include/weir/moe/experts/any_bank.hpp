// SPDX-License-Identifier: MIT
/// \file
/// Experts that are layers of any kind.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/layer.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/random.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/workspace.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/gathered_pass.hpp>

namespace weir {

/// A bank made of a vector of layers [tokens, d_in] -> [tokens, d_out], each run on the rows of its
/// expert. For experts of different kinds or sizes, let `Expert` be an AnyLayer; mixtures of
/// experts may be experts themselves.
///
/// The rows of an expert are its tokens in their order; to the expert, they are neither sequences
/// nor padded, and it may use all that is in it. Its pass has the ids of its tokens, if they are
/// known, and a generator of its own, split from pass.rng for each expert whether it has tokens or
/// not: what it draws depends neither on the others nor on threads. Auxiliary losses and reports of
/// expert e are told to the record of the pass as those of a part "e".
///
/// An expert without tokens is not run: it has no gradient and no auxiliary loss.
///
/// An expert's cache follows the number of its tokens: where its matrices are Eigen's, memory is
/// allocated whenever that number changes. GluBank and MlpBank do without.
template <Layer Expert>
class AnyBank {
 public:
  using Scalar = typename Expert::Scalar;
  using T = Scalar;

  struct Cache {
    std::vector<typename Expert::Cache> experts;
    List<Rng> rngs;                   ///< One per expert.
    std::vector<PassRecord> records;  ///< One per expert.
    List<Index> token_ids;            ///< [slots], where the pass has ids.
    Scratch<T> x, out;                ///< [slots, .]
    Matrix<T> y, dx;                  ///< [tokens, .]
    Workspace workspace;              ///< For gradients of slots.
  };

  /// \param d_in, d_out  The widths of every expert.
  /// \throws ConfigError  without experts or if a width is below 1.
  AnyBank(std::vector<Expert> experts, Index d_in, Index d_out)
      : experts_(std::move(experts)), d_in_(d_in), d_out_(d_out) {
    expect_at_least<std::size_t>("AnyBank", "experts", experts_.size(), 1);
    expect_at_least<Index>("AnyBank", "d_in", d_in, 1);
    expect_at_least<Index>("AnyBank", "d_out", d_out, 1);
  }

  /// \throws ShapeError   if an expert's output is not d_out wide.
  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const {
    gather<T>(x, dispatch, cache.x.reshape(dispatch.slots(), d_in_));
    auto out = cache.out.reshape(dispatch.slots(), d_out_);
    const Pass shared = prepare(pass, dispatch, cache);
    run(dispatch, [&](std::size_t e, Index begin, Index rows) {
      const Pass own = pass_of_expert(shared, e, begin, rows, cache);
      const Matrix<T>& y =
          experts_[e].forward(cache.x.view().middleRows(begin, rows), own, cache.experts[e]);
      expect_shape("AnyBank::forward", "an expert's output", y, rows, d_out_);
      out.middleRows(begin, rows) = y;
    });
    for (std::size_t e = 0; pass.record != nullptr && e < experts_.size(); ++e) {
      const PassRecord::Scope scope(pass.record, std::to_string(e));
      pass.record->add(cache.records[e]);
    }
    set_shape(cache.y, x.rows(), d_out_);
    combine<T>(out, dispatch, cache.y);
    return cache.y;
  }

  /// Experts without tokens are not called.
  /// \throws StateError   if an expert does.
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache) {
    Workspace::Frame frame(cache.workspace);
    auto d_out = frame.matrix<T>(dispatch.slots(), d_out_);
    auto d_packed = frame.matrix<T>(dispatch.slots(), d_in_);
    combine_backward<T>(dy, cache.out.view(), dispatch, d_out, d_weight);
    run(dispatch, [&](std::size_t e, Index begin, Index rows) {
      const Matrix<T>& dx = experts_[e].backward(d_out.middleRows(begin, rows), cache.experts[e]);
      d_packed.middleRows(begin, rows) = dx;
    });
    set_shape(cache.dx, dy.rows(), d_in_);
    gather_backward<T>(d_packed, dispatch, cache.dx);
    return cache.dx;
  }

  /// Changes the experts. A layer of any kind cannot be made cold.
  /// \throws ConfigError  if the map does not fit or has a cold expert.
  void remap_experts(const ExpertMap& map) {
    map.check("AnyBank::remap_experts", experts());
    if (map.has_cold()) {
      throw_error<ConfigError>(
          "AnyBank::remap_experts: the map has a cold expert, expected only "
          "experts that are there");
    }
    std::vector<Expert> next;
    for (const Index from : map.source) next.push_back(expert(from));
    experts_ = std::move(next);
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (std::size_t e = 0; e < self.experts_.size(); ++e) {
      visit(std::to_string(e), self.experts_[e]);
    }
  }

  Index experts() const { return static_cast<Index>(experts_.size()); }
  Index d_in() const { return d_in_; }
  Index d_out() const { return d_out_; }

  /// Expert number e.
  Expert& expert(Index e) { return experts_[static_cast<std::size_t>(e)]; }
  const Expert& expert(Index e) const { return experts_[static_cast<std::size_t>(e)]; }

 private:
  /// Prepares what each expert has for itself, and returns what all of their passes share.
  Pass prepare(const Pass& pass, const Dispatch<T>& dispatch, Cache& cache) const {
    cache.experts.resize(experts_.size());
    cache.records.resize(experts_.size());
    for (PassRecord& record : cache.records) record.restart(pass.record);
    cache.rngs.clear();
    for (Index e = 0; pass.rng != nullptr && e < experts(); ++e) {
      cache.rngs.push_back(pass.rng->split());
    }
    const auto row_of = [](Index slot) { return slot; };
    return gathered_pass(pass, dispatch, dispatch.slots(), row_of, cache.token_ids);
  }

  /// The pass of expert e, whose rows are `rows` slots from `begin` on.
  static Pass pass_of_expert(const Pass& shared, std::size_t e, Index begin, Index rows,
                             Cache& cache) {
    Pass own = shared;
    if (shared.rng != nullptr) own.rng = cache.rngs.data() + e;
    if (shared.record != nullptr) own.record = &cache.records[e];
    if (!shared.token_ids.empty()) {
      own.token_ids =
          shared.token_ids.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(rows));
    }
    return own;
  }

  /// Calls `body` for each expert with slots: side by side, or, where one expert has more than a
  /// thread's share of them, one after the other with all threads inside each.
  template <class Body>
  static void run(const Dispatch<T>& dispatch, Body&& body) {
    Index largest = 0;
    for (Index e = 0; e < dispatch.experts(); ++e) largest = std::max(largest, dispatch.rows(e));
    if (largest * threads() > dispatch.slots()) {
      dispatch.for_each_expert(body);
    } else {
      parallel_for(dispatch.experts(), [&](Index e) {
        const Workspace::Lend none(nullptr);  // Which thread runs an expert is left to chance.
        if (dispatch.rows(e) > 0) {
          body(static_cast<std::size_t>(e), dispatch.begin(e), dispatch.rows(e));
        }
      });
    }
  }

  std::vector<Expert> experts_;
  Index d_in_;
  Index d_out_;
};

}  // namespace weir
