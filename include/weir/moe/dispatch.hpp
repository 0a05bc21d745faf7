// SPDX-License-Identifier: MIT
/// \file
/// The assignments that are run, sorted by expert, and the moves between token order and expert
/// order.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Gives each assignment that is run a slot: expert e owns the slots `begin(e)` to `end(e)`, in
/// token order. The sort is stable, so the order of every sum over slots is fixed.
template <class T>
class Dispatch {
 public:
  /// Sorts the assignments of `routing` that are kept and not masked; nothing of an earlier one
  /// remains but the memory.
  void build(const Routing<T>& routing) {
    assignments_ = routing.assignments();
    offsets_.assign(static_cast<std::size_t>(routing.experts()) + 1, 0);
    for (std::size_t a = 0; a < routing.expert.size(); ++a) {
      if (!routing.is_run(static_cast<Index>(a))) continue;
      ++offsets_[static_cast<std::size_t>(routing.expert[a]) + 1];
    }
    for (std::size_t e = 1; e < offsets_.size(); ++e) offsets_[e] += offsets_[e - 1];

    const auto slots = static_cast<std::size_t>(offsets_.back());
    token_.resize(slots);
    weight_.resize(slots);
    assignment_.resize(slots);
    slot_.resize(slots);
    token_offsets_.resize(routing.offsets.size());
    next_.assign(offsets_.begin(), offsets_.end() - 1);
    Index kept = 0;
    for (Index t = 0; t < routing.tokens(); ++t) {
      token_offsets_[static_cast<std::size_t>(t)] = kept;
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        if (!routing.is_run(a)) continue;
        const auto i = static_cast<std::size_t>(a);
        const Index slot = next_[static_cast<std::size_t>(routing.expert[i])]++;
        token_[static_cast<std::size_t>(slot)] = t;
        weight_[static_cast<std::size_t>(slot)] = routing.weight[i];
        assignment_[static_cast<std::size_t>(slot)] = a;
        slot_[static_cast<std::size_t>(kept++)] = slot;
      }
    }
    token_offsets_.back() = kept;
  }

  Index experts() const { return static_cast<Index>(offsets_.size()) - 1; }
  Index tokens() const { return static_cast<Index>(token_offsets_.size()) - 1; }
  Index slots() const { return static_cast<Index>(token_.size()); }
  Index assignments() const { return assignments_; }  ///< Of the routing, run or not.

  /// The slots of expert e.
  Index begin(Index e) const { return offsets_[static_cast<std::size_t>(e)]; }
  Index end(Index e) const { return offsets_[static_cast<std::size_t>(e) + 1]; }
  Index rows(Index e) const { return end(e) - begin(e); }

  /// Calls `body(e, begin(e), rows(e))` for each expert that has any slot.
  template <class Body>
  void for_each_expert(Body&& body) const {
    for (Index e = 0; e < experts(); ++e) {
      if (rows(e) > 0) body(static_cast<std::size_t>(e), begin(e), rows(e));
    }
  }

  /// What a slot holds.
  Index token(Index slot) const { return token_[static_cast<std::size_t>(slot)]; }
  T weight(Index slot) const { return weight_[static_cast<std::size_t>(slot)]; }
  Index assignment(Index slot) const { return assignment_[static_cast<std::size_t>(slot)]; }

  /// The slots of token t, best choice first.
  std::span<const Index> slots_of(Index t) const {
    const Index first = token_offsets_[static_cast<std::size_t>(t)];
    const Index last = token_offsets_[static_cast<std::size_t>(t) + 1];
    return {slot_.data() + first, static_cast<std::size_t>(last - first)};
  }

 private:
  Index assignments_ = 0;
  std::vector<Index> offsets_ = {0};        // [experts + 1] into slots
  std::vector<Index> token_offsets_ = {0};  // [tokens + 1] into slot_
  std::vector<Index> token_, assignment_, slot_, next_;
  std::vector<T> weight_;
};

namespace detail {

/// y[t] = sum over the slots s of t of weight(s) * packed[s], one after the other.
template <class T, class Weight>
void add_up_slots(MatrixIn<T> packed, const Dispatch<T>& dispatch, Weight&& weight,
                  MatrixOut<T>& y) {
  parallel_rows(dispatch.tokens(), 2 * y.cols(), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const std::span<const Index> slots = dispatch.slots_of(t);
      for (Index col = 0; col < y.cols(); col += kLanes<T>) {
        const Index count = std::min(kLanes<T>, y.cols() - col);
        Lanes<T> sum{};
        for (const Index s : slots) {
          sum += weight(s) * load_lanes<T>(&packed.coeffRef(s, col), count);
        }
        store_lanes<T>(sum, &y(t, col), count);
      }
    }
  });
}

}  // namespace detail

/// packed[slot] = x[token of slot].
/// \param x       [tokens, d].
/// \param packed  [slots, d].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void gather(MatrixIn<T> x, const Dispatch<T>& dispatch, MatrixOut<T> packed) {
  expect_shape("gather", "x", x, dispatch.tokens(), x.cols());
  expect_shape("gather", "packed", packed, dispatch.slots(), x.cols());
  parallel_rows(dispatch.slots(), x.cols(), [&](Index begin, Index end) {
    for (Index s = begin; s < end; ++s) {
      std::copy_n(&x.coeffRef(dispatch.token(s), 0), x.cols(), &packed(s, 0));
    }
  });
}

/// y[t] = sum over the slots s of t of weight[s] * packed[s]; zero for a token without slots.
/// \param packed  [slots, d].
/// \param y       [tokens, d].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void combine(MatrixIn<T> packed, const Dispatch<T>& dispatch, MatrixOut<T> y) {
  expect_shape("combine", "packed", packed, dispatch.slots(), packed.cols());
  expect_shape("combine", "y", y, dispatch.tokens(), packed.cols());
  const auto weight = [&](Index s) { return dispatch.weight(s); };
  detail::add_up_slots<T>(packed, dispatch, weight, y);
}

/// The derivative of `combine`: d_packed[s] = weight[s] * dy[token], and
/// d_weight[assignment of s] = dy[token] . packed[s]. Assignments that are not run have no
/// slot: theirs is left alone.
///
/// \param dy        [tokens, d].
/// \param packed    [slots, d], as given to `combine`.
/// \param d_packed  [slots, d].
/// \param d_weight  [assignments].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void combine_backward(MatrixIn<T> dy, MatrixIn<T> packed, const Dispatch<T>& dispatch,
                      MatrixOut<T> d_packed, std::span<T> d_weight) {
  expect_shape("combine_backward", "packed", packed, dispatch.slots(), packed.cols());
  expect_shape("combine_backward", "dy", dy, dispatch.tokens(), packed.cols());
  expect_shape("combine_backward", "d_packed", d_packed, dispatch.slots(), packed.cols());
  if (static_cast<Index>(d_weight.size()) != dispatch.assignments()) {
    fail<ShapeError>("combine_backward: d_weight has ", d_weight.size(), " entries, expected ",
                     dispatch.assignments(), " (one per assignment)");
  }
  parallel_rows(dispatch.slots(), 3 * dy.cols(), [&](Index begin, Index end) {
    for (Index s = begin; s < end; ++s) {
      const T* const gradient = &dy.coeffRef(dispatch.token(s), 0);
      d_weight[static_cast<std::size_t>(dispatch.assignment(s))] =
          dot<T>(dy.cols(), gradient, &packed.coeffRef(s, 0));
      const auto weighted = [weight = dispatch.weight(s)](const Lanes<T>& g) -> Lanes<T> {
        return weight * g;
      };
      map_lanes<T>(dy.cols(), weighted, &d_packed(s, 0), gradient);
    }
  });
}

/// The derivative of `gather`: dx[t] = sum over the slots s of t of d_packed[s].
/// \param d_packed  [slots, d].
/// \param dx        [tokens, d].
/// \throws ShapeError   if the shapes do not fit.
template <class T>
void gather_backward(MatrixIn<T> d_packed, const Dispatch<T>& dispatch, MatrixOut<T> dx) {
  expect_shape("gather_backward", "d_packed", d_packed, dispatch.slots(), d_packed.cols());
  expect_shape("gather_backward", "dx", dx, dispatch.tokens(), d_packed.cols());
  const auto one = [](Index) { return T(1); };
  detail::add_up_slots<T>(d_packed, dispatch, one, dx);
}

}  // namespace weir
