// SPDX-License-Identifier: MIT
/// \file
/// The assignments that are kept, sorted by expert, and the moves between token order and expert
/// order.
#pragma once

#include <algorithm>
#include <span>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/routing.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Gives each assignment that is kept a slot: expert e owns the slots `begin(e)` to `end(e)`, in
/// token order. The sort is stable, so the order of every sum over slots is fixed. Assignments that
/// were dropped are listed apart.
template <class T>
class Dispatch {
 public:
  /// An assignment without a slot, since it was dropped.
  struct Dropped {
    Index token = 0;
    Index assignment = 0;
    T weight = T(0);
  };

  /// Sorts `assignments`, whose outputs are multiplied by `weight` [assignments]. Reuses the memory
  /// of an earlier call.
  void build(const Assignments& assignments, std::span<const T> weight);

  /// Sorts the assignments of `routing`.
  void build(const Routing<T>& routing) {
    build(routing, routing.applied.empty() ? routing.weight : routing.applied);
  }

  /// A part of `whole`: the slots for which `is_in(expert, slot)`, of its first `experts` experts.
  /// Assignments keep their numbers; nothing counts as dropped.
  template <class IsIn>
  void build_part(const Dispatch& whole, Index experts, IsIn&& is_in) {
    assignments_ = whole.assignments_;
    offsets_.assign(1, 0);
    token_.clear();
    weight_.clear();
    assignment_.clear();
    dropped_.clear();
    next_.assign(whole.slots(), kNoSlot);  // The slot here of each slot of `whole`.
    for (Index e = 0; e < experts; ++e) {
      for (Index s = whole.begin(e); s < whole.end(e); ++s) {
        if (!is_in(e, s)) continue;
        next_[s] = token_.count();
        token_.push_back(whole.token_[s]);
        weight_.push_back(whole.weight_[s]);
        assignment_.push_back(whole.assignment_[s]);
      }
      offsets_.push_back(token_.count());
    }
    slot_.clear();
    token_offsets_.assign(1, 0);
    for (Index t = 0; t < whole.tokens(); ++t) {
      for (const Index s : whole.slots_of(t)) {
        if (next_[s] != kNoSlot) slot_.push_back(next_[s]);
      }
      token_offsets_.push_back(slot_.count());
    }
  }

  Index experts() const { return offsets_.count() - 1; }
  Index tokens() const { return token_offsets_.count() - 1; }
  Index slots() const { return token_.count(); }
  Index assignments() const { return assignments_; }  ///< How many the routing has, dropped or not.

  /// The slots of expert e.
  Index begin(Index e) const { return offsets_[e]; }
  Index end(Index e) const { return offsets_[e + 1]; }
  Index rows(Index e) const { return end(e) - begin(e); }

  /// Calls `body(e, begin(e), rows(e))` for each expert that has any slot.
  template <class Body>
  void for_each_expert(Body&& body) const {
    for (Index e = 0; e < experts(); ++e) {
      if (rows(e) > 0) body(static_cast<std::size_t>(e), begin(e), rows(e));
    }
  }

  /// The token, the weight and the assignment of a slot.
  Index token(Index slot) const { return token_[slot]; }
  T weight(Index slot) const { return weight_[slot]; }
  Index assignment(Index slot) const { return assignment_[slot]; }

  /// The slots of token t, best choice first.
  std::span<const Index> slots_of(Index t) const {
    return {slot_.data() + token_offsets_[t], slot_.data() + token_offsets_[t + 1]};
  }

  /// The assignments that were dropped, in their order.
  std::span<const Dropped> dropped() const { return dropped_; }

 private:
  static constexpr Index kNoSlot = -1;

  Index assignments_ = 0;
  List<Index> offsets_ = {0};        // [experts + 1], into the slots.
  List<Index> token_offsets_ = {0};  // [tokens + 1], into slot_.
  List<Index> token_, assignment_, slot_, next_;
  List<T> weight_;
  List<Dropped> dropped_;
};

template <class T>
void Dispatch<T>::build(const Assignments& assignments, std::span<const T> weight) {
  assignments_ = assignments.assignments();
  offsets_.assign(assignments.experts() + 1, 0);
  Index kept = 0;
  for (Index a = 0; a < assignments_; ++a) {
    if (assignments.kept[a] == 0) continue;
    ++offsets_[assignments.expert[a] + 1];
    ++kept;
  }
  for (Index e = 1; e < offsets_.count(); ++e) offsets_[e] += offsets_[e - 1];

  token_.resize(kept);
  weight_.resize(kept);
  assignment_.resize(kept);
  slot_.resize(kept);
  dropped_.clear();
  token_offsets_.resize(assignments.offsets.count());
  next_.assign(offsets_.begin(), offsets_.end() - 1);
  kept = 0;
  for (Index t = 0; t < assignments.tokens(); ++t) {
    token_offsets_[t] = kept;
    for (Index a = assignments.first(t); a < assignments.last(t); ++a) {
      const T weight_of_a = element(weight, a);
      if (assignments.kept[a] == 0) {
        dropped_.push_back({t, a, weight_of_a});
        continue;
      }
      const Index slot = next_[assignments.expert[a]]++;
      token_[slot] = t;
      weight_[slot] = weight_of_a;
      assignment_[slot] = a;
      slot_[kept++] = slot;
    }
  }
  token_offsets_.back() = kept;
}

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

/// The derivative of `combine`: d_packed[s] = weight[s] * dy[token], and d_weight[assignment of s]
/// = dy[token] . packed[s]. Assignments without a slot, which are not run, keep their d_weight.
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
    throw_error<ShapeError>("combine_backward: d_weight has ", d_weight.size(),
                            " entries, expected ", dispatch.assignments(), " (one per assignment)");
  }
  parallel_rows(dispatch.slots(), 3 * dy.cols(), [&](Index begin, Index end) {
    for (Index s = begin; s < end; ++s) {
      const T* const gradient = &dy.coeffRef(dispatch.token(s), 0);
      element(d_weight, dispatch.assignment(s)) =
          loops::dot<T>(dy.cols(), gradient, &packed.coeffRef(s, 0));
      loops::scale<T>(dy.cols(), dispatch.weight(s), gradient, &d_packed(s, 0));
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

#ifdef WEIR_COMPILED
extern template class weir::Dispatch<float>;
extern template class weir::Dispatch<double>;
#endif
