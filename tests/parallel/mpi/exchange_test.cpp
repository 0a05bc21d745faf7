// SPDX-License-Identifier: MIT
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>

#include <weir/core/random.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/exchange_log.hpp>

#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::exchange_test {

namespace {

int me() {
  return test::ranks().rank();
}
int size() {
  return test::ranks().size();
}

/// How many bytes rank `from` sends to rank `to` in exchange `round`: none now and then.
Index bytes(int from, int to, int round) {
  return (7 * from + 3 * to + round) % 5 * 1000 * ((from + round) % 3);
}
std::byte content(int from, int to, Index i) {
  return static_cast<std::byte>(31 * from + 17 * to + i);
}

void begin(Exchange& exchange, Channel& channel, int round) {
  Index in = 0, out = 0;
  for (int r = 0; r < size(); ++r) {
    in += bytes(r, me(), round);
    out += bytes(me(), r, round);
  }
  exchange.begin(channel, "test", out, in);
  Index offset = 0;
  for (int r = 0; r < size(); ++r) {
    if (r != me()) exchange.receive(r, offset, bytes(r, me(), round));
    offset += bytes(r, me(), round);
  }
  offset = 0;
  for (int r = 0; r < size(); ++r) {
    for (Index i = 0; i < bytes(me(), r, round); ++i) {
      exchange.outgoing()[offset + i] = content(me(), r, i);
    }
    if (r != me()) exchange.send(r, offset, bytes(me(), r, round));
    offset += bytes(me(), r, round);
  }
}

void check(const Exchange& exchange, int round) {
  Index offset = 0, wrong = 0;
  for (int r = 0; r < size(); ++r) {
    for (Index i = 0; r != me() && i < bytes(r, me(), round); ++i) {
      wrong += exchange.incoming()[offset + i] == content(r, me(), i) ? 0 : 1;
    }
    offset += bytes(r, me(), round);
  }
  CHECK(wrong == 0);
}

/// What rank 0 is told when rank 1 sends `sent` bytes where it expects `expected`, or nothing.
std::string told(Index sent, Index expected) {
  const Communicator impatient(test::ranks(), {.timeout_seconds = 0.3});
  Channel channel(impatient);
  Exchange exchange;
  exchange.begin(channel, "test", sent, expected);
  if (me() == 1) exchange.send(0, 0, sent);
  const std::string message = test::message_of<RankError>([&] {
    if (me() == 0) exchange.receive(1, 0, expected);
    exchange.finish();
  });
  MPI_Barrier(test::ranks().get());
  return message;
}

}  // namespace

TEST_CASE("An Exchange brings what each rank sends to each, many at once", "[parallel][mpi]") {
  Channel channel(test::ranks()), other(test::ranks());
  Exchange a, b, c;
  for (int round = 0; round < 12; round += 3) {
    begin(a, channel, round);
    begin(b, other, round + 1);
    begin(c, channel, round + 2);
    b.finish();
    check(b, round + 1);
    c.finish_receiving();
    check(c, round + 2);
    while (!a.advance()) continue;
    check(a, round);
    c.finish();
    CHECK(a.pending() + b.pending() + c.pending() == 0);
  }
}

TEST_CASE("An Exchange refuses messages of another size, naming their rank", "[parallel][mpi]") {
  if (size() < 2) return;
  const std::string ending = " bytes, expected 100 (rank 0, exchange 0)";
  const std::string of = " of " + std::to_string(size());
  const std::string fewer = told(60, 100);
  const std::string more = told(140, 100);
  if (me() != 0) return;
  CHECK(fewer == "test: rank 1" + of + " sent a message of 60" + ending);
  CHECK(more == "test: rank 1" + of + " sent a message of more than 100" + ending);
}

TEST_CASE("An Exchange names the rank that sends nothing, once the time is over",
          "[parallel][mpi]") {
  if (size() < 2) return;
  const auto start = std::chrono::steady_clock::now();
  const std::string message = told(0, 100);
  const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
  CHECK(taken.count() < 10.0);
  if (me() != 0) return;
  CHECK(taken.count() >= 0.3);
  CHECK(message == "test: rank 1 of " + std::to_string(size()) +
                       " sent nothing for 0.3 s, expected a message (rank 0, exchange 0)");
}

TEST_CASE("An Exchange notices a rank that left one out", "[parallel][mpi]") {
  if (size() < 2) return;
  Channel channel(test::ranks());
  Exchange exchange;
  if (me() == 1) channel.begin("another one");
  exchange.begin(channel, "test", 8, 8);
  if (me() == 1) exchange.send(0, 0, 8);
  if (me() == 0) exchange.receive(1, 0, 8);
  const std::string message = test::message_of<RankError>([&] { exchange.finish(); });
  if (me() == 0) {
    CHECK(message == "test: rank 1 of " + std::to_string(size()) +
                         " is at exchange 1, expected exchange 0 as rank 0");
  } else {
    CHECK(message == "no exception");
  }
}

TEST_CASE("Of ranks that began different exchanges, those are named that most others contradict",
          "[parallel][mpi]") {
  using State = ExchangeLog::State;
  // Exchanges 0, 1, ... of a rank, each named by a letter.
  const auto state = [](const std::string& letters) {
    State made;
    for (const char letter : letters) {
      State::Entry& entry =
          made.last[static_cast<std::size_t>(made.count++ % ExchangeLog::kWindow)];
      entry = {};
      entry.what[0] = letter;
    }
    return std::optional(made);
  };
  const std::string many(100, 'x');
  CHECK(ExchangeLog::out_of_step({state("ab"), state("abc"), std::nullopt}).empty());
  CHECK(ExchangeLog::out_of_step({std::nullopt}).empty());
  CHECK(ExchangeLog::out_of_step({state("abc"), state("acc"), state("ab")}) ==
        "rank 1 began 'c' as exchange 1 of the job, expected 'b' as rank 0, rank 2");
  CHECK(ExchangeLog::out_of_step({state("a"), state("b")}) ==
        "rank 0 began 'a' and rank 1 began 'b' as exchange 0 of the job, expected the same on all "
        "ranks");
  CHECK(ExchangeLog::out_of_step({state("a"), state("b"), state("c"), state("c")}) ==
        "rank 0 began 'a' and rank 1 began 'b' as exchange 0 of the job, expected 'c' as rank 2, "
        "rank 3");
  CHECK(ExchangeLog::out_of_step({state("a" + many + "b"), state("b" + many + "c"),
                                  state("c" + many), state("c" + many + "b")}) ==
        "rank 1 began 'c' as exchange 101 of the job, expected 'b' as rank 0, rank 3");
  CHECK(ExchangeLog::out_of_step({state(many), state("ab")}).empty());
}

TEST_CASE("Exchanges and communicators say what is wrong with a call", "[parallel][mpi]") {
  CHECK(test::message_of<ConfigError>([] {
          const Communicator none(test::ranks().get(), {.timeout_seconds = 0.0});
        }) == "Communicator: timeout_seconds = 0, expected a finite number > 0");
  Channel channel(test::ranks());
  Exchange exchange;
  exchange.begin(channel, "test", 8, 8);
  // Behind the colon is what the MPI says; MPICH has other words than Open MPI.
  const std::string message = test::message_of<MpiError>([&] { exchange.send(size(), 0, 8); });
  CHECK(message.starts_with("MPI_Isend: "));
  CHECK((message.find("MPI_ERR_RANK") != std::string::npos ||
         message.find("Invalid rank") != std::string::npos));
  if (size() == 1) return;
  Exchange waiting;
  waiting.begin(channel, "first", 1, 1);
  if (me() == 0) waiting.receive(1, 0, 1);
  if (me() == 0) {
    CHECK(test::message_of<StateError>([&] { waiting.begin(channel, "second", 0, 0); }) ==
          "Exchange::begin: 1 messages of first are on their way, expected finish() before");
  }
  if (me() == 1) waiting.send(0, 0, 1);
  waiting.finish();
}

}  // namespace weir::exchange_test
