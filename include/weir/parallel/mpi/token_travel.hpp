// SPDX-License-Identifier: MIT
/// \file
/// The way of tokens to the experts of other ranks and back.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/list.hpp>
#include <weir/core/meanwhile.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/routing.hpp>
#include <weir/parallel/mpi/communicator.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/row_exchange.hpp>
#include <weir/parallel/mpi/token_exchange.hpp>
#include <weir/parallel/placement.hpp>
#include <weir/parallel/row_format.hpp>
#include <weir/parallel/timeline.hpp>

namespace weir {

/// What the layers of a model talk through, one after the other. Shared by all of them.
struct ExpertChannels {
  explicit ExpertChannels(const Communicator& ranks)
      : counts(ranks),
        dispatch(ranks),
        combine(ranks),
        dispatch_across(ranks),
        combine_across(ranks) {}

  Channel counts, dispatch, combine;
  Channel dispatch_across, combine_across;  ///< Between nodes, where rows go in two levels.

  /// Where spans of time go, if anywhere: "experts", and for each chunk "dispatch 0", "combine 0",
  /// from the moment its messages set out until they were found to be here. They are looked for
  /// between the chunks, and while a rank waits.
  Timeline* timeline = nullptr;
};

/// Settings of ExpertParallel; the same on all ranks.
struct ExpertParallelConfig {
  /// In how many parts the rows travel. While the experts of one part compute, the rows of the next
  /// parts and the results of those before travel. More than a rank has experts do not help.
  Index chunks = 2;
  /// What rows are written as on the way to the experts: tokens, and in `backward` gradients.
  RowFormat dispatch_format = RowFormat::kFull;
  /// The same of the way back. DeepSeek-V3: kFp8 out, kBfloat16 back.
  RowFormat combine_format = RowFormat::kFull;
  /// Whether rows go inside their node first, then across, see RowExchange: for nodes of many
  /// ranks, all of the same number.
  bool two_level = false;
};

/// Carries rows to the ranks of their experts, and what these make of them back: the part of
/// ExpertParallel that does not depend on the bank.
template <class T>
class TokenTravel {
 public:
  struct Chunk {
    RowExchange out, back;
    Assignments assignments;  ///< Of the rows that came, to the experts here.
    Dispatch<T> dispatch;
    Scratch<T> rows;  ///< [rows, .], read from `out` where the format is not full.
    List<T> ones;
  };

  struct Cache {
    TokenCounts counts;
    std::vector<Chunk> chunks;

    Chunk& chunk(Index c) { return chunks[static_cast<std::size_t>(c)]; }
  };

  /// Computes the experts of chunk c for their rows, which are the tokens of `dispatch`; returns
  /// what they yield.
  using Compute = FunctionRef<const Matrix<T>&(Index c, MatrixIn<T> rows, const Dispatch<T>&)>;
  /// The first number of the row of a slot.
  using Row = FunctionRef<const T*(Index slot)>;

  /// \throws ConfigError  if the placement is one of another number of ranks, there are no
  ///                      channels, or a setting is out of range.
  TokenTravel(Placement placement, std::shared_ptr<ExpertChannels> channels,
              ExpertParallelConfig config);

  /// Agrees with all ranks on who sends what in this pass, and in its backward pass.
  void begin(const Dispatch<T>& dispatch, Index d_in, Index d_out, bool training,
             Cache& cache) const;

  /// Carries `row` [slots, cols] to the experts, and their results [slots, cols_back] to `home`.
  void run(const Dispatch<T>& dispatch, Index cols, Row row, Compute compute, Cache& cache,
           MatrixOut<T> home) const;

  int rank() const { return channels_->counts.rank(); }
  std::span<const Index> own() const { return placement_.experts_on(rank()); }
  const Placement& placement() const { return placement_; }
  const ExpertParallelConfig& config() const { return config_; }
  ExpertChannels& channels() const { return *channels_; }
  const std::shared_ptr<ExpertChannels>& shared_channels() const { return channels_; }

 private:
  const NodeRanks* nodes() const { return nodes_ ? &*nodes_ : nullptr; }
  TokenExchangeTerms terms(Index d_in, Index d_out, bool training) const;
  void assign(Index c, Cache& cache) const;
  void send_out(Index c, const Dispatch<T>& dispatch, Index cols, Row row, Cache& cache) const;
  Eigen::Map<const Matrix<T>> rows_of(Index c, Index cols, Cache& cache) const;
  void expect_back(Index c, Index cols, Cache& cache) const;
  void send_back(Index c, const Matrix<T>& y, Cache& cache) const;
  void bring_home(Index c, const Dispatch<T>& dispatch, Cache& cache, MatrixOut<T> home) const;

  /// Calls `body(e)` for each expert of rank d that gets this rank's rows in chunk c.
  template <class Body>
  void for_each_expert(Index c, Index d, const TokenCounts& counts, Body&& body) const {
    const std::span<const Index> experts = placement_.experts_on(d);
    const auto slots = static_cast<Index>(experts.size());
    for (Index l = counts.first_slot(c, slots); l < counts.first_slot(c + 1, slots); ++l) {
      if (destination_[element(experts, l)] == d) body(element(experts, l));
    }
  }

  static void add_span(Timeline& timeline, std::string_view way, Index c, const RowExchange& of) {
    const std::string name = std::string(way) + std::to_string(c);
    timeline.track(name).add(name, of.began(), of.arrived(), of.arriving_bytes());
  }

  static void advance(Cache& cache) {
    bool out = true, back = true;
    for (Chunk& chunk : cache.chunks) {
      out = chunk.out.advance(out);
      back = chunk.back.advance(back);
    }
  }

  Placement placement_;
  List<Index> destination_;  // The rank that this rank's tokens go to, for each expert.
  std::shared_ptr<ExpertChannels> channels_;
  ExpertParallelConfig config_;
  std::optional<NodeRanks> nodes_;  // Where rows go in two levels.
};

template <class T>
TokenTravel<T>::TokenTravel(Placement placement, std::shared_ptr<ExpertChannels> channels,
                            ExpertParallelConfig config)
    : placement_(std::move(placement)), channels_(std::move(channels)), config_(config) {
  if (channels_ == nullptr) {
    throw_error<ConfigError>("ExpertParallel: channels = null, expected ExpertChannels");
  }
  if (placement_.ranks() != channels_->counts.size()) {
    throw_error<ConfigError>("ExpertParallel: the placement is one of ", placement_.ranks(),
                             " ranks, expected ", channels_->counts.size(), " as the channels");
  }
  expect_at_least<Index>("ExpertParallel", "chunks", config_.chunks, 1);
  expect_row_format<T>("ExpertParallel", "dispatch_format", config_.dispatch_format);
  expect_row_format<T>("ExpertParallel", "combine_format", config_.combine_format);
  destination_ = placement_.destinations(rank());
  if (config_.two_level) nodes_.emplace(placement_.nodes(), rank());
}

template <class T>
TokenExchangeTerms TokenTravel<T>::terms(Index d_in, Index d_out, bool training) const {
  std::uint64_t hash = 14695981039346656037ULL;  // FNV-1a of which rank holds which expert.
  for (Index e = 0; e < placement_.experts(); ++e) {
    for (const Index r : placement_.ranks_of(e)) {
      hash = (hash ^ static_cast<std::uint64_t>(e * placement_.ranks() + r)) * 1099511628211ULL;
    }
  }
  return {{1, d_in, d_out, placement_.experts(), config_.chunks, training ? 1 : 0,
           static_cast<std::int64_t>(hash >> 1U),
           static_cast<std::int64_t>(config_.dispatch_format),
           static_cast<std::int64_t>(config_.combine_format), config_.two_level ? 1 : 0}};
}

template <class T>
void TokenTravel<T>::begin(const Dispatch<T>& dispatch, Index d_in, Index d_out, bool training,
                           Cache& cache) const {
  cache.chunks.resize(static_cast<std::size_t>(config_.chunks));
  cache.counts.agree(channels_->counts, placement_, destination_, terms(d_in, d_out, training),
                     config_.chunks, nodes(), [&](Index e) { return dispatch.rows(e); });
  for (Index c = 0; c < config_.chunks; ++c) assign(c, cache);
}

template <class T>
void TokenTravel<T>::run(const Dispatch<T>& dispatch, Index cols, Row row, Compute compute,
                         Cache& cache, MatrixOut<T> home) const {
  for (Index c = 0; c < config_.chunks; ++c) send_out(c, dispatch, cols, row, cache);
  for (Index c = 0; c < config_.chunks; ++c) expect_back(c, home.cols(), cache);
  Meanwhile::do_offered();
  Timeline* const timeline = channels_->timeline;
  TimelineTrack* const experts = timeline == nullptr ? nullptr : &timeline->track("experts");
  for (Index c = 0; c < config_.chunks; ++c) {
    Chunk& part = cache.chunk(c);
    part.out.finish_receiving();
    if (!own().empty()) {
      const SpanTimer timer(experts, "experts");
      send_back(c, compute(c, rows_of(c, cols, cache), part.dispatch), cache);
    }
    part.back.sent();
    advance(cache);
  }
  for (Index c = 0; c < config_.chunks; ++c) {
    cache.chunk(c).back.finish_receiving();
    bring_home(c, dispatch, cache, home);
  }
  for (Chunk& part : cache.chunks) {
    part.out.finish();
    part.back.finish();
  }
  for (Index c = 0; timeline != nullptr && c < config_.chunks; ++c) {
    add_span(*timeline, "dispatch ", c, cache.chunk(c).out);
    add_span(*timeline, "combine ", c, cache.chunk(c).back);
  }
}

template <class T>
void TokenTravel<T>::assign(Index c, Cache& cache) const {
  Chunk& part = cache.chunk(c);
  const TokenCounts& counts = cache.counts;
  const auto slots = static_cast<Index>(own().size());
  part.assignments.expert_count = slots;
  part.assignments.offsets.assign(1, 0);
  part.assignments.expert.clear();
  for (Index s = 0; s < placement_.ranks(); ++s) {
    for (Index l = counts.first_slot(c, slots); l < counts.first_slot(c + 1, slots); ++l) {
      for (Index i = 0; i < counts.rows(s, l); ++i) {
        part.assignments.expert.push_back(l);
        part.assignments.offsets.push_back(part.assignments.expert.count());
      }
    }
  }
  part.assignments.kept.assign(counts.received(c), 1);
  part.ones.assign(counts.received(c), T(1));
  part.dispatch.build(part.assignments, part.ones);
}

template <class T>
void TokenTravel<T>::send_out(Index c, const Dispatch<T>& dispatch, Index cols, Row row,
                              Cache& cache) const {
  const RowFormat format = config_.dispatch_format;
  const Index bytes = row_bytes<T>(format, cols);
  const TokenCounts& counts = cache.counts;
  RowExchange& out = cache.chunk(c).out;
  out.begin(channels_->dispatch, channels_->dispatch_across, "dispatch", counts.out(c, bytes),
            nodes());
  for (Index d = 0; d < placement_.ranks(); ++d) {
    std::byte* to = d == rank() ? out.incoming() + counts.received_before(c, d) * bytes
                                : out.outgoing() + counts.sent_before(c, d) * bytes;
    for_each_expert(c, d, counts, [&](Index e) {
      const Index first = dispatch.begin(e);
      const auto row_of = [&](Index i) { return row(first + i); };
      encode_rows<T>(format, dispatch.rows(e), cols, row_of, to);
      to += dispatch.rows(e) * bytes;
    });
    if (d != rank()) out.send(d);
  }
  out.sent();
}

template <class T>
Eigen::Map<const Matrix<T>> TokenTravel<T>::rows_of(Index c, Index cols, Cache& cache) const {
  Chunk& part = cache.chunk(c);
  const Index count = cache.counts.received(c);
  if (config_.dispatch_format == RowFormat::kFull) {
    return {reinterpret_cast<const T*>(part.out.incoming()), count, cols};
  }
  auto rows = part.rows.reshape(count, cols);
  decode_rows<T>(config_.dispatch_format, part.out.incoming(), rows);
  return {rows.data(), count, cols};
}

template <class T>
void TokenTravel<T>::expect_back(Index c, Index cols, Cache& cache) const {
  const Index bytes = row_bytes<T>(config_.combine_format, cols);
  cache.chunk(c).back.begin(channels_->combine, channels_->combine_across, "combine",
                            cache.counts.back(c, bytes), nodes());
}

template <class T>
void TokenTravel<T>::send_back(Index c, const Matrix<T>& y, Cache& cache) const {
  const RowFormat format = config_.combine_format;
  const Index bytes = row_bytes<T>(format, y.cols());
  const TokenCounts& counts = cache.counts;
  RowExchange& back = cache.chunk(c).back;
  for (Index s = 0; s < placement_.ranks(); ++s) {
    const Index first = counts.received_before(c, s);
    std::byte* const to = s == rank() ? back.incoming() + counts.sent_before(c, s) * bytes
                                      : back.outgoing() + first * bytes;
    const auto row = [&](Index i) { return &y(first + i, 0); };
    encode_rows<T>(format, counts.received(c, s), y.cols(), row, to);
    if (s != rank()) back.send(s);
  }
}

template <class T>
void TokenTravel<T>::bring_home(Index c, const Dispatch<T>& dispatch, Cache& cache,
                                MatrixOut<T> home) const {
  const Index bytes = row_bytes<T>(config_.combine_format, home.cols());
  const std::byte* from = cache.chunk(c).back.incoming();
  for (Index d = 0; d < placement_.ranks(); ++d) {
    for_each_expert(c, d, cache.counts, [&](Index e) {
      decode_rows<T>(config_.combine_format, from,
                     home.middleRows(dispatch.begin(e), dispatch.rows(e)));
      from += dispatch.rows(e) * bytes;
    });
  }
}

}  // namespace weir
