// SPDX-License-Identifier: MIT
/// \file
/// What would be dropped if experts were chosen at random, with the capacity that a trace shows.
#pragma once

#include <algorithm>
#include <cstddef>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// In which order tokens get the places of their experts, as far as a trace tells it; see DropOrder
/// for what policies do.
enum class ServingOrder {
  kRankMajor,   ///< The first choices of all tokens in order, then the second ones, and so on.
  kTokenMajor,  ///< Token by token, each with all its choices.
  kOther,       ///< One that does not depend on the place, such as that of weights, or by chance.
};

/// How many of some independent events happen.
class CountDistribution {
 public:
  /// \param most     How many events there are at most.
  explicit CountDistribution(Index most) : probability_(static_cast<std::size_t>(most) + 1) {
    probability_[0] = 1.0;
  }

  /// One more event, which happens with probability p.
  void add(double p) {
    if (p == 0.0) return;
    ++events_;
    for (std::size_t n = events_; n > 0; --n) {
      probability_[n] = (1.0 - p) * probability_[n] + p * probability_[n - 1];
    }
    probability_[0] *= 1.0 - p;
  }

  /// Takes an event away that was added. It begins at the end from which errors do not grow.
  void remove(double p) {
    if (p == 0.0) return;
    if (p <= 0.5) {
      double below = 0.0;
      for (std::size_t n = 0; n < events_; ++n) {
        below = probability_[n] = (probability_[n] - p * below) / (1.0 - p);
      }
    } else {
      double above = 0.0;
      for (std::size_t n = events_; n > 0; --n) {
        const double here = (probability_[n] - (1.0 - p) * above) / p;
        probability_[n] = above;
        above = here;
      }
      probability_[0] = above;
    }
    probability_[events_] = 0.0;
    --events_;
  }

  /// The probability that at least n events happen.
  double at_least(Index n) const {
    double sum = 0.0;
    for (auto i = static_cast<std::size_t>(n); i <= events_; ++i) sum += probability_[i];
    return std::clamp(sum, 0.0, 1.0);
  }

  /// The expectation of max(0, events that happen - n).
  double mean_above(Index n) const {
    double sum = 0.0;
    for (auto i = static_cast<std::size_t>(n) + 1; i <= events_; ++i) {
      sum += static_cast<double>(i - static_cast<std::size_t>(n)) * probability_[i];
    }
    return std::max(0.0, sum);
  }

 private:
  std::vector<double> probability_;
  std::size_t events_ = 0;
};

/// How many choices all tokens of a group together lose on average if each chooses its `choices[t]`
/// different ones of `experts` at random, and an expert takes `capacity` of them:
///
///     experts * E[max(0, N - capacity)],  N = sum_t Bernoulli(choices[t] / experts)
///
/// N being the load of one expert; in which order tokens are served makes no difference to it.
inline double random_overflow(std::span<const Index> choices, Index experts, Index capacity) {
  CountDistribution load(static_cast<Index>(choices.size()));
  for (const Index k : choices) load.add(static_cast<double>(k) / static_cast<double>(experts));
  return static_cast<double>(experts) * load.mean_above(capacity);
}

/// The same token by token. A choice is lost if its expert has been asked for by `capacity` others
/// before, who are independent of it. With k_j = choices[j] and E experts:
///
///     token-major   lost_t = k_t P(sum_{j<t} Bernoulli(k_j / E) >= capacity)
///     rank-major    lost_t = sum_{r<k_t} P(sum_{j<t} Bernoulli(min(k_j, r + 1) / E)
///                                        + sum_{j>t} Bernoulli(min(k_j, r) / E) >= capacity)
///     other         lost_t = k_t random_overflow / sum_j k_j
///
/// In the second, before rank r of token t come the ranks up to r of the tokens before it, and
/// those below r of the ones behind it: a token's choices are different, so that its own others do
/// not count. The formulas are this library's own.
/// \return         [choices], how many choices of each are lost on average.
inline std::vector<double> random_drops(std::span<const Index> choices, Index experts,
                                        Index capacity, ServingOrder order) {
  const std::size_t tokens = choices.size();
  const auto chance = [&](std::size_t t, Index most) {
    return static_cast<double>(std::min(choices[t], most)) / static_cast<double>(experts);
  };
  std::vector<double> lost(tokens);
  CountDistribution before(static_cast<Index>(tokens));
  const Index ranks = tokens == 0 ? 0 : *std::max_element(choices.begin(), choices.end());
  if (order == ServingOrder::kTokenMajor) {
    for (std::size_t t = 0; t < tokens; ++t) {
      lost[t] = static_cast<double>(choices[t]) * before.at_least(capacity);
      before.add(chance(t, ranks));
    }
  } else if (order == ServingOrder::kRankMajor) {
    for (Index r = 0; r < ranks; ++r) {
      for (std::size_t t = 0; t < tokens; ++t) {
        before.remove(chance(t, r));
        if (r < choices[t]) lost[t] += before.at_least(capacity);
        before.add(chance(t, r + 1));
      }
    }
  } else {
    const Index all = std::accumulate(choices.begin(), choices.end(), Index(0));
    const double share =
        all == 0 ? 0.0 : random_overflow(choices, experts, capacity) / static_cast<double>(all);
    for (std::size_t t = 0; t < tokens; ++t) lost[t] = share * static_cast<double>(choices[t]);
  }
  return lost;
}

/// The capacity of a layer's experts, as far as the places that were full tell it: an expert that
/// dropped something kept as many choices as it has places.
struct TracedCapacity {
  /// Tokens that share the places of experts, in their order.
  struct Group {
    std::vector<Index> tokens;
    Index capacity = 0;  ///< Of each expert.
  };

  std::vector<Group> groups;  ///< Those in which an expert was full: others tell nothing.
  ServingOrder order = ServingOrder::kOther;

  /// Groups are the passes, or the sequences of each pass if those do not explain what was kept;
  /// then orders are tried on all groups. There is no capacity if nothing was dropped, or if
  /// neither explains it: a trace of a part of the tokens or choices, groups cut otherwise, budgets
  /// of devices.
  static std::optional<TracedCapacity> of(const TracedTokens& tokens, const TracedLayer& layer);
};

namespace detail {

/// The tokens of each pass, or of each sequence of each pass, in their order.
inline std::vector<TracedCapacity::Group> capacity_groups(const TracedTokens& tokens,
                                                          const TracedLayer& layer,
                                                          bool by_sequence) {
  struct Place {
    Index pass, sequence, record, token;
  };
  std::vector<Place> places;
  for (Index s = 0; s < tokens.count(); ++s) {
    const TracedTokens::Sequence& sequence = tokens.sequences[static_cast<std::size_t>(s)];
    for (Index t = sequence.begin; t < sequence.end; ++t) {
      if (layer.recorded[t] == 0) continue;
      places.push_back({layer.pass[t], by_sequence ? s : 0, layer.record[t], t});
    }
  }
  const auto group_of = [](const Place& p) { return std::pair(p.pass, p.sequence); };
  std::sort(places.begin(), places.end(), [&](const Place& a, const Place& b) {
    return group_of(a) != group_of(b) ? group_of(a) < group_of(b) : a.record < b.record;
  });
  std::vector<TracedCapacity::Group> groups;
  for (std::size_t i = 0; i < places.size(); ++i) {
    if (i == 0 || group_of(places[i]) != group_of(places[i - 1])) groups.emplace_back();
    groups.back().tokens.push_back(places[i].token);
  }
  return groups;
}

/// How many choices an expert of the group takes: -1 if none was full, no value if full ones took
/// different numbers, or another one took more.
inline std::optional<Index> capacity_of(const TracedLayer& layer, const std::vector<Index>& group) {
  std::vector<Index> kept(static_cast<std::size_t>(layer.experts));
  std::vector<bool> full(kept.size(), false);
  for (const Index t : group) {
    for (Index a = layer.first(t); a < layer.last(t); ++a) {
      const auto expert = static_cast<std::size_t>(layer.expert[a]);
      kept[expert] += layer.kept[a] != 0 ? 1 : 0;
      if (layer.kept[a] == 0) full[expert] = true;
    }
  }
  Index capacity = -1;
  for (std::size_t e = 0; e < kept.size(); ++e) {
    if (full[e]) capacity = std::max(capacity, kept[e]);
  }
  for (std::size_t e = 0; e < kept.size() && capacity >= 0; ++e) {
    if (full[e] ? kept[e] != capacity : kept[e] > capacity) return std::nullopt;
  }
  return capacity;
}

/// Whether serving the group in this order keeps what was kept.
inline bool is_served_in(ServingOrder order, const TracedLayer& layer,
                         const TracedCapacity::Group& group) {
  std::vector<Index> taken(static_cast<std::size_t>(layer.experts));
  const auto agrees = [&](Index a) {
    Index& places = taken[static_cast<std::size_t>(layer.expert[a])];
    const bool has_place = places < group.capacity;
    places += has_place ? 1 : 0;
    return has_place == (layer.kept[a] != 0);
  };
  Index ranks = 0;
  for (const Index t : group.tokens) ranks = std::max(ranks, layer.choices(t));
  const Index rounds = order == ServingOrder::kRankMajor ? ranks : Index(1);
  for (Index r = 0; r < rounds; ++r) {
    for (const Index t : group.tokens) {
      const Index first = layer.first(t) + r;
      const Index last = rounds == 1 ? layer.last(t) : std::min(first + 1, layer.last(t));
      for (Index a = first; a < last; ++a) {
        if (!agrees(a)) return false;
      }
    }
  }
  return true;
}

}  // namespace detail

inline std::optional<TracedCapacity> TracedCapacity::of(const TracedTokens& tokens,
                                                        const TracedLayer& layer) {
  for (const bool by_sequence : {false, true}) {
    TracedCapacity found;
    bool explained = true;
    for (Group& group : detail::capacity_groups(tokens, layer, by_sequence)) {
      const std::optional<Index> capacity = detail::capacity_of(layer, group.tokens);
      explained = explained && capacity.has_value();
      if (!explained) break;
      if (*capacity < 0) continue;
      group.capacity = *capacity;
      found.groups.push_back(std::move(group));
    }
    if (!explained) continue;
    if (found.groups.empty()) return std::nullopt;
    for (const ServingOrder order : {ServingOrder::kRankMajor, ServingOrder::kTokenMajor}) {
      if (std::all_of(found.groups.begin(), found.groups.end(), [&](const Group& group) {
            return detail::is_served_in(order, layer, group);
          })) {
        found.order = order;
        break;
      }
    }
    return found;
  }
  return std::nullopt;
}

/// How many choices of each token would be lost on average if all were made at random, with the
/// capacity and in the order that the trace shows.
/// \return         [tokens]; NaN for tokens whose capacity is not known.
inline std::vector<double> random_drops(const TracedTokens& tokens, const TracedLayer& layer) {
  std::vector<double> lost(static_cast<std::size_t>(tokens.tokens()),
                           std::numeric_limits<double>::quiet_NaN());
  const std::optional<TracedCapacity> found = TracedCapacity::of(tokens, layer);
  if (!found) return lost;
  std::vector<Index> choices, last_choices;
  Index last_capacity = -1;
  std::vector<double> of_group;
  for (const TracedCapacity::Group& group : found->groups) {
    choices.clear();
    for (const Index t : group.tokens) choices.push_back(layer.choices(t));
    if (choices != last_choices || group.capacity != last_capacity) {  // Most are alike.
      of_group = random_drops(choices, layer.experts, group.capacity, found->order);
      last_choices = choices;
      last_capacity = group.capacity;
    }
    for (std::size_t i = 0; i < of_group.size(); ++i) {
      lost[static_cast<std::size_t>(group.tokens[i])] = of_group[i];
    }
  }
  return lost;
}

}  // namespace weir
