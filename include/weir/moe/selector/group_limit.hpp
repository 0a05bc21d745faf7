// SPDX-License-Identifier: MIT
/// \file
/// Group-limited routing: a token's experts come from a few groups, which live on a few devices.
#pragma once

#include <algorithm>
#include <concepts>
#include <functional>
#include <limits>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// The experts are cut into `count` groups of neighbours of equal size. The score of a group is the
/// sum of the `summed` largest scores in it; a token may choose from the `allowed` groups of the
/// largest score, among equal ones those with the lowest index. The scores are those that the
/// selector chooses experts by, and the decision is constant to the derivative.
///
///     summed = 1              the maximum: DeepSeek-V2's device-limited routing
///                             (arXiv:2405.04434, section 2.2.2; count = 8, allowed = 3)
///     summed = 2              DeepSeek-V3's node-limited routing, of biased scores
///                             (arXiv:2412.19437, section 2.1.2; count = 8, allowed = 4)
///     summed = k / allowed    Megatron-Core's group_limited_topk
///
/// Experts of other groups take part with the score -infinity, as in DeepSeek's own code and
/// Megatron-Core. Hugging Face's takes 0 for them, which lets them win against a negative biased
/// score. A group with fewer than `summed` experts above -infinity scores -infinity.
struct GroupLimit {
  Index count = 1;
  Index allowed = 1;
  Index summed = 1;

  bool operator==(const GroupLimit&) const = default;

  /// Whether any expert can be out of reach.
  bool limits() const { return allowed < count; }

  /// \param who      The selector's name, for messages.
  /// \throws ConfigError  unless count divides the experts, 1 <= allowed <= count,
  ///                      1 <= summed <= experts / count and allowed * experts / count >= k.
  void check(std::string_view who, Index experts, Index k) const {
    expect_at_least<Index>(who, "groups.count", count, 1);
    if (experts % count != 0) {
      throw_error<ConfigError>(who, ": groups.count = ", count,
                               ", expected a divisor of experts = ", experts);
    }
    if (allowed < 1 || allowed > count) {
      throw_error<ConfigError>(who, ": groups.allowed = ", allowed,
                               ", expected 1 <= allowed <= groups.count = ", count);
    }
    const Index size = experts / count;
    if (summed < 1 || summed > size) {
      throw_error<ConfigError>(who, ": groups.summed = ", summed,
                               ", expected 1 <= summed <= experts / groups.count = ", size);
    }
    if (k > allowed * size) {
      throw_error<ConfigError>(who, ": k = ", k, ", expected k <= ", allowed * size,
                               ", the experts of ", allowed, " groups");
    }
  }

  /// What one token chooses from.
  /// \param scores   [experts]; not NaN, below infinity.
  /// \return         `scores` where there is no limit. Else a copy in which the experts of other
  ///                 groups are -infinity; it lives until the next call on this thread.
  template <std::floating_point T>
  const T* candidates(const T* scores, Index experts) const {
    if (!limits()) return scores;
    constexpr T kInfinity = std::numeric_limits<T>::infinity();
    const Index size = experts / count;
    auto& space = ThreadSpace<T, GroupLimit>::of_this_thread();
    space.reserve(experts + count + size);
    T* const candidate = space.take(experts);
    T* const of_group = space.take(count);
    T* const sorted = space.take(size);
    std::copy_n(scores, experts, candidate);
    for (Index g = 0; g < count; ++g) of_group[g] = score(scores + g * size, size, sorted);

    // The worst group goes, among equal ones the last, until as many are left as are allowed.
    for (Index left = count; left > allowed; --left) {
      Index worst = 0;
      for (Index g = 1; g < count; ++g) {
        if (of_group[g] <= of_group[worst]) worst = g;
      }
      of_group[worst] = kInfinity;  // Gone. Above every score, so that it is not found again:
      std::fill_n(candidate + worst * size, size, -kInfinity);  // some other group is left.
    }
    return candidate;
  }

 private:
  template <class T>
  T score(const T* scores, Index size, T* sorted) const {
    if (summed == 1) return loops::max(size, scores);
    std::partial_sort_copy(scores, scores + size, sorted, sorted + summed, std::greater<T>());
    T sum = T(0);
    for (Index i = 0; i < summed; ++i) sum += sorted[i];
    return sum;
  }
};

}  // namespace weir
