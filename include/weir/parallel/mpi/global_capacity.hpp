// SPDX-License-Identifier: MIT
/// \file
/// Capacities of the tokens of all ranks together.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/capacity/capacity_wrapper.hpp>
#include <weir/moe/routing.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/exchange.hpp>

namespace weir {

/// What capacity policies look at of the routings of all ranks, as one routing.
template <class T>
class JoinedRouting {
 public:
  /// Collective. Tells all ranks the assignments of `routing` with their weights and probabilities,
  /// about 16 + sizeof(T) bytes for each and 9 for a token.
  /// \param seed     This rank's; that of rank 0 is kept.
  /// \throws RankError    if another rank routes among another number of experts.
  void gather(Channel& channel, const Routing<T>& routing, std::uint64_t seed);

  /// The tokens of rank 0, then those of rank 1, and so on. Without logits; probabilities are set
  /// where a token has an assignment.
  Routing<T>& all() { return all_; }
  std::uint64_t seed() const { return seed_; }
  /// The number in `all` of this rank's first assignment.
  Index first_own() const { return first_own_; }

 private:
  template <class Number>
  void put(const Number* from, Index count) {
    text_.append(reinterpret_cast<const char*>(from),
                 static_cast<std::size_t>(count) * sizeof(Number));
  }
  template <class Number>
  void put(Number number) {
    put(&number, 1);
  }

  /// Reads what `put` wrote; refuses to read beyond the end.
  struct Reader {
    std::string_view text;
    int rank = 0;
    template <class Number>
    Number take() {
      Number number{};
      if (text.size() < sizeof number) fail(rank);
      std::memcpy(&number, text.data(), sizeof number);
      text.remove_prefix(sizeof number);
      return number;
    }
    Index take_count() {
      const auto count = static_cast<Index>(take<std::int64_t>());
      if (count < 0 || static_cast<std::size_t>(count) > text.size()) fail(rank);
      return count;
    }
  };
  [[noreturn]] static void fail(int rank) {
    throw_error<RankError>("routings: what rank ", rank,
                           " sent is no routing of the same mixture, expected one");
  }

  void write(const Routing<T>& routing, std::uint64_t seed);
  void read(Reader reader, Index experts);

  std::string text_;
  Exchange exchange_;
  Routing<T> all_;
  Sequences sequences_;
  List<std::uint8_t> mask_, open_;
  List<T> probability_;  // One for each assignment.
  std::uint64_t seed_ = 0;
  Index first_own_ = 0;
};

template <class T>
void JoinedRouting<T>::write(const Routing<T>& routing, std::uint64_t seed) {
  text_.clear();
  put(seed);
  put(std::int64_t{routing.experts()});
  put(std::int64_t{routing.open.count()});
  put(routing.open.data(), routing.open.count());
  const Sequences& sequences = routing.rows.sequences();
  put(std::int64_t{sequences.count()});
  for (Index s = 0; s < sequences.count(); ++s) put(std::int64_t{sequences.length(s)});
  put(std::int64_t{routing.tokens()});
  for (Index t = 0; t < routing.tokens(); ++t) {
    put(static_cast<std::uint8_t>(routing.rows.is_padding(t) ? 0 : 1));
    put(std::int64_t{routing.last(t) - routing.first(t)});
    for (Index a = routing.first(t); a < routing.last(t); ++a) {
      put(std::int64_t{routing.expert[a]});
      put(routing.kept[a]);
      put(routing.weight[a]);
      put(routing.probabilities(t, routing.expert[a]));
    }
  }
}

template <class T>
void JoinedRouting<T>::read(Reader reader, Index experts) {
  const auto seed = reader.template take<std::uint64_t>();
  if (reader.rank == 0) seed_ = seed;
  if (reader.template take<std::int64_t>() != experts) fail(reader.rank);
  const auto take_expert = [&] {
    const auto e = static_cast<Index>(reader.template take<std::int64_t>());
    if (e < 0 || e >= experts) fail(reader.rank);
    return e;
  };
  for (Index left = reader.take_count(); left > 0; --left) open_[take_expert()] = 1;
  Index rows = 0;
  for (Index left = reader.take_count(); left > 0; --left) {
    const Index length = reader.take_count();
    sequences_.append(length);
    rows += length;
  }
  const Index tokens = reader.take_count();
  if (tokens != rows) fail(reader.rank);
  for (Index t = 0; t < tokens; ++t) {
    mask_.push_back(reader.template take<std::uint8_t>());
    for (Index left = reader.take_count(); left > 0; --left) {
      all_.expert.push_back(take_expert());
      all_.kept.push_back(reader.template take<std::uint8_t>());
      all_.weight.push_back(reader.template take<T>());
      probability_.push_back(reader.template take<T>());
    }
    all_.offsets.push_back(all_.expert.count());
  }
  if (!reader.text.empty()) fail(reader.rank);
}

template <class T>
void JoinedRouting<T>::gather(Channel& channel, const Routing<T>& routing, std::uint64_t seed) {
  write(routing, seed);
  const std::vector<std::string> texts = all_gather_texts(channel, exchange_, "routings", text_);
  const Index experts = routing.experts();
  all_.expert_count = experts;
  all_.offsets.assign(1, 0);
  all_.expert.clear();
  all_.kept.clear();
  all_.weight.clear();
  all_.applied.clear();
  probability_.clear();
  mask_.clear();
  sequences_.clear();
  open_.assign(experts, 0);
  for (int r = 0; r < channel.size(); ++r) {
    if (r == channel.rank()) first_own_ = all_.assignments();
    read({texts[static_cast<std::size_t>(r)], r}, experts);
  }
  all_.open.clear();
  for (Index e = 0; e < experts; ++e) {
    if (open_[e] != 0) all_.open.push_back(e);
  }
  // As in one process: without a mask where no token is padding.
  const bool padded = std::count(mask_.begin(), mask_.end(), std::uint8_t{0}) > 0;
  Pass pass;
  pass.sequences = &sequences_;
  if (padded) pass.mask = mask_;
  all_.rows.set("GlobalCapacity", pass, all_.tokens());
  set_zero(all_.probabilities, all_.tokens(), experts);
  for (Index t = 0; t < all_.tokens(); ++t) {
    for (Index a = all_.first(t); a < all_.last(t); ++a) {
      all_.probabilities(t, all_.expert[a]) = probability_[a];
    }
  }
}

/// Lets the policy inside bound how many tokens of all ranks an expert takes, as one process would
/// that has the tokens of all ranks one after the other: which assignments are dropped does not
/// depend on the number of ranks. Without it, a policy bounds those of each rank by itself, as
/// GShard does with its local groups (arXiv:2006.16868, section 2.2), and needs no messages.
///
/// All ranks tell each other their assignments, see JoinedRouting, and compute the same decision.
/// Sequences stay sequences; a rank without sequences has one. Random orders are drawn from one
/// seed, that of rank 0, of which each rank's generator has moved on by one. A policy that learns
/// (AdaptiveCapacity) observes the routing of all ranks, for which they tell each other once more.
/// One that sets the applied weights, as RenormaliseKept does, goes around this one.
template <class Inner>
class GlobalCapacity : public CapacityWrapper<Inner> {
 public:
  using Base = CapacityWrapper<Inner>;

  template <class T>
  struct Cache : Base::template Cache<T> {
    JoinedRouting<T> joined;
  };

  /// \throws ConfigError  if there is no channel.
  GlobalCapacity(Inner inner, std::shared_ptr<Channel> channel)
      : Base(std::move(inner)), channel_(std::move(channel)) {
    if (channel_ == nullptr) {
      throw_error<ConfigError>("GlobalCapacity: channel = null, expected a Channel");
    }
  }

  /// \throws RankError    if another rank routes among another number of experts.
  /// \throws ConfigError  as the policy inside, or if that sets the applied weights.
  template <class T>
  void forward(const Pass& pass, Routing<T>& routing, Cache<T>& cache) const {
    cache.joined.gather(*channel_, routing, pass.rng == nullptr ? 0 : pass.rng->bits());
    Rng rng(cache.joined.seed());
    Pass of_all;
    of_all.training = pass.training;
    of_all.rng = pass.rng == nullptr ? nullptr : &rng;
    Routing<T>& all = cache.joined.all();
    this->inner_.forward(of_all, all, cache.inner);
    if (!all.applied.empty()) {
      throw_error<ConfigError>(
          "GlobalCapacity: the policy inside sets the applied weights, expected it around "
          "GlobalCapacity");
    }
    std::copy_n(all.kept.begin() + cache.joined.first_own(), routing.assignments(),
                routing.kept.begin());
  }

  template <class T>
  void backward(const Routing<T>& /*routing*/, RoutingGradient<T>& /*gradient*/,
                Cache<T>& /*cache*/) const {}

  template <class T>
  void observe(const Routing<T>& routing) {
    if constexpr (requires { this->inner_.discard_self(); }) {
      JoinedRouting<T> joined;
      joined.gather(*channel_, routing, 0);
      this->inner_.observe(joined.all());
    }
  }

 private:
  std::shared_ptr<Channel> channel_;
};

}  // namespace weir
