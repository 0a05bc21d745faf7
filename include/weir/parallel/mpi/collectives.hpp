// SPDX-License-Identifier: MIT
/// \file
/// Small things that all ranks tell all others.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/parallel/mpi/exchange.hpp>

namespace weir {

/// Each rank tells all others `count` numbers; all[r * count + i] is number i of rank r.
/// \param what     What it is for, in messages; a literal.
template <class Number>
requires std::is_arithmetic_v<Number>
void all_gather(Channel& channel, Exchange& exchange, std::string_view what,
                std::span<const Number> mine, List<Number>& all) {
  const auto count = static_cast<Index>(mine.size());
  const Index bytes = count * static_cast<Index>(sizeof(Number));
  all.resize(count * channel.size());
  exchange.begin(channel, what, bytes, bytes * channel.size());
  if (count > 0) std::memcpy(exchange.outgoing(), mine.data(), mine.size_bytes());
  for (int r = 0; r < channel.size(); ++r) {
    if (r != channel.rank()) exchange.receive(r, r * bytes, bytes);
  }
  for (int r = 0; r < channel.size(); ++r) {
    if (r != channel.rank()) exchange.send(r, 0, bytes);
  }
  exchange.finish();
  for (int r = 0; r < channel.size(); ++r) {
    if (r == channel.rank()) {
      std::copy(mine.begin(), mine.end(), all.begin() + r * count);
    } else if (count > 0) {
      std::memcpy(all.data() + r * count, exchange.incoming() + r * bytes, mine.size_bytes());
    }
  }
}

/// Each rank tells all others a text; the texts in the order of the ranks.
inline std::vector<std::string> all_gather_texts(Channel& channel, Exchange& exchange,
                                                 std::string_view what, std::string_view mine) {
  List<std::int64_t> sizes;
  const auto size = static_cast<std::int64_t>(mine.size());
  all_gather<std::int64_t>(channel, exchange, what, std::span(&size, 1), sizes);
  Index total = 0;
  for (const std::int64_t of_rank : sizes) total += of_rank;
  exchange.begin(channel, what, size, total);
  std::copy_n(reinterpret_cast<const std::byte*>(mine.data()), mine.size(), exchange.outgoing());
  Index offset = 0;
  for (int r = 0; r < channel.size(); ++r) {
    if (r != channel.rank()) exchange.receive(r, offset, sizes[r]);
    offset += sizes[r];
  }
  for (int r = 0; r < channel.size(); ++r) {
    if (r != channel.rank()) exchange.send(r, 0, size);
  }
  exchange.finish();
  std::vector<std::string> all;
  offset = 0;
  for (int r = 0; r < channel.size(); ++r) {
    const auto* const begin = reinterpret_cast<const char*>(exchange.incoming() + offset);
    all.emplace_back(
        r == channel.rank() ? mine : std::string_view(begin, static_cast<std::size_t>(sizes[r])));
    offset += sizes[r];
  }
  return all;
}

/// Each rank tells each other one a text of its own: `mine[r]` is for rank r. The texts for this
/// rank in the order of the ranks, its own among them.
inline std::vector<std::string> all_to_all_texts(Channel& channel, Exchange& exchange,
                                                 std::string_view what,
                                                 const std::vector<std::string>& mine) {
  const Index ranks = channel.size(), me = channel.rank();
  List<std::int64_t> sizes, all;
  Index leaving = 0, arriving = 0;
  for (const std::string& text : mine) {
    sizes.push_back(static_cast<std::int64_t>(text.size()));
    leaving += sizes.back();
  }
  all_gather<std::int64_t>(channel, exchange, what, sizes, all);
  for (Index r = 0; r < ranks; ++r) arriving += all[r * ranks + me];
  exchange.begin(channel, what, leaving, arriving);
  Index offset = 0;
  for (Index r = 0; r < ranks; ++r) {
    const Index size = all[r * ranks + me];
    if (r != me) exchange.receive(static_cast<int>(r), offset, size);
    offset += size;
  }
  offset = 0;
  for (Index r = 0; r < ranks; ++r) {
    const std::string& text = mine[static_cast<std::size_t>(r)];
    std::copy_n(reinterpret_cast<const std::byte*>(text.data()), text.size(),
                exchange.outgoing() + offset);
    if (r != me) exchange.send(static_cast<int>(r), offset, sizes[r]);
    offset += sizes[r];
  }
  exchange.finish();
  std::vector<std::string> texts;
  offset = 0;
  for (Index r = 0; r < ranks; ++r) {
    const auto size = static_cast<std::size_t>(all[r * ranks + me]);
    const auto* const begin = reinterpret_cast<const char*>(exchange.incoming() + offset);
    texts.push_back(r == me ? mine[static_cast<std::size_t>(r)] : std::string(begin, size));
    offset += all[r * ranks + me];
  }
  return texts;
}

/// Puts numbers and matrices into a text for another rank, and takes them out again.
class RankText {
 public:
  template <class Number>
  requires std::is_arithmetic_v<Number>
  static void put(std::string& text, Number number) {
    text.append(reinterpret_cast<const char*>(&number), sizeof number);
  }
  template <class Number>
  static void put(std::string& text, const Matrix<Number>& matrix) {
    put(text, std::int64_t{matrix.rows()});
    put(text, std::int64_t{matrix.cols()});
    text.append(reinterpret_cast<const char*>(matrix.data()),
                static_cast<std::size_t>(matrix.size()) * sizeof(Number));
  }

  /// \param what     What it is for, in messages.
  RankText(std::string_view what, std::string_view text, Index rank)
      : what_(what), text_(text), rank_(rank) {}

  bool is_empty() const { return text_.empty(); }

  /// \throws RankError    if the text is too short.
  template <class Number>
  requires std::is_arithmetic_v<Number> Number take() {
    Number number{};
    std::memcpy(&number, bytes(sizeof number), sizeof number);
    return number;
  }
  template <class Number>
  void take(Matrix<Number>& matrix) {
    const auto rows = static_cast<Index>(take<std::int64_t>());
    const auto cols = static_cast<Index>(take<std::int64_t>());
    const auto most = static_cast<Index>(text_.size() / sizeof(Number));
    if (rows < 0 || cols < 0 || (cols > 0 && rows > most / cols)) fail();
    set_shape(matrix, rows, cols);
    const std::size_t size = static_cast<std::size_t>(matrix.size()) * sizeof(Number);
    const char* const from = bytes(size);
    if (size > 0) std::copy_n(from, size, reinterpret_cast<char*>(matrix.data()));
  }

  [[noreturn]] void fail() const {
    throw_error<RankError>(what_, ": what rank ", rank_, " sent is not what it should be");
  }

 private:
  const char* bytes(std::size_t size) {
    if (text_.size() < size) fail();
    const char* const from = text_.data();
    text_.remove_prefix(size);
    return from;
  }

  std::string_view what_, text_;
  Index rank_;
};

}  // namespace weir
