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
#include <weir/parallel/mpi/expert_channels.hpp>
#include <weir/parallel/mpi/once_exchange.hpp>
#include <weir/parallel/mpi/row_exchange.hpp>
#include <weir/parallel/mpi/rows_once.hpp>
#include <weir/parallel/mpi/token_exchange.hpp>
#include <weir/parallel/placement.hpp>
#include <weir/parallel/row_format.hpp>
#include <weir/parallel/timeline.hpp>

namespace weir {

/// Carries rows to the ranks of their experts, and what these make of them back: the part of
/// ExpertParallel that does not depend on the bank.
template <class T>
class TokenTravel {
 public:
  struct Chunk {
    RowExchange out, back;
    OnceExchange once;  ///< Instead of `out`, where rows go once to each node.
    bool is_once = false;
    Assignments assignments;  ///< Of the rows that came, to the experts here.
    Dispatch<T> dispatch;
    Scratch<T> rows;  ///< [rows, .], read from `out` where the format is not full.
    List<T> ones;
  };

  struct Cache {
    TokenCounts counts;
    RowsOnce once;  ///< Where rows go once to each node.
    ArrivedRows arrived;
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
  /// \param of_tokens  Whether the rows of a token's slots are the same.
  void run(const Dispatch<T>& dispatch, Index cols, Row row, bool of_tokens, Compute compute,
           Cache& cache, MatrixOut<T> home) const;

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
  void send_once(Index c, const Dispatch<T>& dispatch, Index cols, Row row, Cache& cache) const;
  void encode_own(Index c, Index d, const Dispatch<T>& dispatch, Index cols, Row row,
                  const TokenCounts& counts, std::byte* to) const;
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

  /// Calls `use` with what carries the rows of a chunk to the experts.
  template <class Use>
  static decltype(auto) with_out(Chunk& chunk, Use&& use) {
    return chunk.is_once ? use(chunk.once) : use(chunk.out);
  }

  template <class Out>
  static void add_span(Timeline& timeline, std::string_view way, Index c, const Out& of) {
    const std::string name = std::string(way) + std::to_string(c);
    timeline.track(name).add(name, of.began(), of.arrived(), of.arriving_bytes());
  }

  static void advance(Cache& cache) {
    bool out = true, back = true;
    for (Chunk& chunk : cache.chunks) {
      out = with_out(chunk, [&](auto& of) { return of.advance(out); });
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
  if (config_.two_level || config_.once_per_node) {
    nodes_.emplace(placement_.nodes(), rank(),
                   config_.once_per_node ? "once_per_node" : "two_level");
  }
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
           static_cast<std::int64_t>(config_.combine_format), config_.two_level ? 1 : 0,
           config_.once_per_node ? 1 : 0}};
}

template <class T>
void TokenTravel<T>::begin(const Dispatch<T>& dispatch, Index d_in, Index d_out, bool training,
                           Cache& cache) const {
  cache.chunks.resize(static_cast<std::size_t>(config_.chunks));
  cache.counts.agree(channels_->counts, placement_, destination_, terms(d_in, d_out, training),
                     config_.chunks, nodes(), [&](Index e) { return dispatch.rows(e); });
  for (Index c = 0; c < config_.chunks; ++c) assign(c, cache);
  if (!config_.once_per_node) return;
  cache.once.agree(
      channels_->counts, *nodes_, cache.counts, dispatch.tokens(),
      [&](Index slot) { return dispatch.token(slot); },
      [&](Index c, Index d, auto&& use) {
        for_each_expert(c, d, cache.counts, [&](Index e) {
          for (Index slot = dispatch.begin(e); slot < dispatch.end(e); ++slot) use(slot);
        });
      });
}

template <class T>
void TokenTravel<T>::run(const Dispatch<T>& dispatch, Index cols, Row row, bool of_tokens,
                         Compute compute, Cache& cache, MatrixOut<T> home) const {
  const bool once = of_tokens && config_.once_per_node;
  if (once) cache.arrived.begin(placement_.ranks(), nodes_->nodes());
  for (Index c = 0; c < config_.chunks; ++c) {
    cache.chunk(c).is_once = once;
    once ? send_once(c, dispatch, cols, row, cache) : send_out(c, dispatch, cols, row, cache);
  }
  for (Index c = 0; c < config_.chunks; ++c) expect_back(c, home.cols(), cache);
  Timeline* const timeline = channels_->timeline;
  if (Meanwhile::is_offered()) {
    const SpanTimer timer(timeline == nullptr ? nullptr : &timeline->track("meanwhile"),
                          "meanwhile");
    Meanwhile::do_offered();
  }
  TimelineTrack* const experts = timeline == nullptr ? nullptr : &timeline->track("experts");
  for (Index c = 0; c < config_.chunks; ++c) {
    Chunk& part = cache.chunk(c);
    with_out(part, [](auto& out) { out.finish_receiving(); });
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
    with_out(part, [](auto& out) { out.finish(); });
    part.back.finish();
  }
  for (Index c = 0; timeline != nullptr && c < config_.chunks; ++c) {
    with_out(cache.chunk(c), [&](auto& out) { add_span(*timeline, "dispatch ", c, out); });
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
void TokenTravel<T>::encode_own(Index c, Index d, const Dispatch<T>& dispatch, Index cols, Row row,
                                const TokenCounts& counts, std::byte* to) const {
  const Index bytes = row_bytes<T>(config_.dispatch_format, cols);
  for_each_expert(c, d, counts, [&](Index e) {
    const Index first = dispatch.begin(e);
    const auto row_of = [&](Index i) { return row(first + i); };
    encode_rows<T>(config_.dispatch_format, dispatch.rows(e), cols, row_of, to);
    to += dispatch.rows(e) * bytes;
  });
}

template <class T>
void TokenTravel<T>::send_out(Index c, const Dispatch<T>& dispatch, Index cols, Row row,
                              Cache& cache) const {
  const Index bytes = row_bytes<T>(config_.dispatch_format, cols);
  const TokenCounts& counts = cache.counts;
  RowExchange& out = cache.chunk(c).out;
  out.begin(channels_->dispatch, channels_->dispatch_across, "dispatch", counts.out(c, bytes),
            nodes());
  for (Index d = 0; d < placement_.ranks(); ++d) {
    std::byte* const to = d == rank() ? out.incoming() + counts.received_before(c, d) * bytes
                                      : out.outgoing() + counts.sent_before(c, d) * bytes;
    encode_own(c, d, dispatch, cols, row, counts, to);
    if (d != rank()) out.send(d);
  }
  out.sent();
}

template <class T>
void TokenTravel<T>::send_once(Index c, const Dispatch<T>& dispatch, Index cols, Row row,
                               Cache& cache) const {
  const Index bytes = row_bytes<T>(config_.dispatch_format, cols);
  const TokenCounts& counts = cache.counts;
  OnceExchange& once = cache.chunk(c).once;
  once.begin(channels_->dispatch, channels_->dispatch_across, channels_->dispatch_on,
             counts.out(c, bytes), c, *nodes_, cache.once, cache.arrived,
             [&](Index slot, std::byte* to) {
               const auto row_of = [&](Index /*i*/) { return row(slot); };
               encode_rows<T>(config_.dispatch_format, 1, cols, row_of, to);
             });
  encode_own(c, rank(), dispatch, cols, row, counts,
             once.incoming() + counts.received_before(c, rank()) * bytes);
}

template <class T>
Eigen::Map<const Matrix<T>> TokenTravel<T>::rows_of(Index c, Index cols, Cache& cache) const {
  Chunk& part = cache.chunk(c);
  const Index count = cache.counts.received(c);
  const std::byte* const arrived = with_out(part, [](auto& out) { return out.incoming(); });
  if (config_.dispatch_format == RowFormat::kFull) {
    return {reinterpret_cast<const T*>(arrived), count, cols};
  }
  auto rows = part.rows.reshape(count, cols);
  decode_rows<T>(config_.dispatch_format, arrived, rows);
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
