// SPDX-License-Identifier: MIT
/// \file
/// Text from a decoder whose experts are on the ranks of an MPI job, each of which has
/// conversations of its own.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <type_traits>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/sequences.hpp>
#include <weir/core/token_ids.hpp>
#include <weir/core/types.hpp>
#include <weir/model/decoder.hpp>
#include <weir/model/generate.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/exchange.hpp>

namespace weir {

namespace detail {

/// Lets ranks run the passes of their conversations together.
template <class T>
class PassesTogether final : public GenerationObserver<T> {
 public:
  PassesTogether(Channel& channel, const std::function<void(Index)>& on_pass)
      : channel_(channel), on_pass_(on_pass) {}

  PassRecord* begin(std::span<const Index> conversations) override {
    agree(static_cast<std::int64_t>(conversations.size()));
    return nullptr;
  }
  void drawn(Index /*conversation*/, MatrixIn<T> /*logits*/, Index /*token*/) override { ++drawn_; }

  /// Tells all ranks how many conversations this one has in the next pass.
  /// \return         Whether there is one at all.
  bool agree(std::int64_t present) {
    const std::array<std::int64_t, 2> mine = {present, drawn_};
    all_gather<std::int64_t>(channel_, exchange_, "conversations of a pass", mine, all_);
    std::int64_t running = 0, drawn = 0;
    for (Index r = 0; r < channel_.size(); ++r) {
      running += all_[2 * r];
      drawn += all_[2 * r + 1];
    }
    if (on_pass_) on_pass_(static_cast<Index>(drawn));
    return running > 0;
  }

 private:
  Channel& channel_;
  const std::function<void(Index)>& on_pass_;
  Exchange exchange_;
  List<std::int64_t> all_;
  std::int64_t drawn_ = 0;
};

}  // namespace detail

/// Continues the conversations of all ranks at once, as `generate` of one process does with all of
/// them, with a model whose experts are spread over the ranks (ExpertParallel, `spread_experts`).
/// Each rank computes attention and all that is dense for its own conversations, whose keys and
/// values it holds, and its experts for those of all; a rank that has none, or whose have ended,
/// serves the others until all have ended. (Attention by data parallelism with experts by expert
/// parallelism: DeepSeek-V3, arXiv:2412.19437, section 3.4.)
///
/// Tokens are those that one process would draw, up to rounding: an expert gets the same rows, but
/// dense products have fewer of them. Where the model has a CapacityPolicy that drops, a rank
/// counts its own tokens, unless it is GlobalCapacity. Collective; one thread of each rank.
///
/// \param conversations  This rank's; perhaps none.
/// \param on_pass   Is called before each pass, on all ranks, and behind the last one, with the
///                  number of new tokens that all ranks have so far; may be empty.
/// \return          One result for each of this rank's conversations, in their order.
/// \throws ConfigError     as `generate`; or if a conversation names adapters, since rows of other
///                         ranks would be computed with them.
/// \throws NonFiniteError  as `generate`. Other ranks are left waiting: end the job, as `run_job`
///                         does.
/// \throws RankError       if a rank does not take part.
template <std::floating_point T>
std::vector<Generated> generate(Channel& channel, const Decoder<T>& model,
                                std::span<Conversation<std::type_identity_t<T>>> conversations,
                                const std::function<void(Index)>& on_pass = {}) {
  for (std::size_t i = 0; channel.size() > 1 && i < conversations.size(); ++i) {
    if (conversations[i].adapters == "*") continue;
    throw_error<ConfigError>("generate: adapters = '", conversations[i].adapters,
                             "' of conversation ", i, ", expected '*' on several ranks");
  }
  detail::PassesTogether<T> together(channel, on_pass);
  std::vector<Generated> results = generate(model, conversations, &together);
  typename Decoder<T>::Cache cache;
  const Sequences none;
  while (together.agree(0)) {
    model.decode(TokenIds(), {.sequences = &none}, {}, cache, true);
  }
  return results;
}

}  // namespace weir
