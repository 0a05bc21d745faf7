// SPDX-License-Identifier: MIT
#include <array>
#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/traffic.hpp>

#include "parallel/mpi/counted_bytes.hpp"
#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::sent_bytes_test {

namespace {

constexpr Index kModel = 140, kExperts = 7, kTokens = 40;

/// With a replica of expert 1, where there are ranks for it.
Placement placed() {
  const Index ranks = test::ranks().size();
  const Placement plain = Placement::contiguous(kExperts, RankNodes::single(ranks));
  return plain.holds(ranks - 1, 1) ? plain : plain.with_replica(1, ranks - 1);
}

auto mixture(const ExpertParallelConfig& config) {
  Rng rng(2);
  const GluBank<float> bank(kModel, kExperts, 8, rng);
  return MoELayer(LinearRouter<float>(kModel, kExperts, rng), SoftmaxTopK<float>({.k = 2}),
                  Dropless(),
                  ExpertParallel<GluBank<float>>(
                      bank, placed(), std::make_shared<ExpertChannels>(test::ranks()), config));
}

}  // namespace

TEST_CASE("ExpertParallel sends the bytes that Traffic counts", "[parallel][mpi]") {
  const bool narrow = GENERATE(false, true);
  const RowFormat out = narrow ? RowFormat::kFp8 : RowFormat::kFull;
  const RowFormat back = narrow ? RowFormat::kBfloat16 : RowFormat::kFull;
  CHECK(row_bytes<float>(RowFormat::kFull, kModel) == 560);
  CHECK(row_bytes<float>(RowFormat::kBfloat16, kModel) == 280);
  CHECK(row_bytes<float>(RowFormat::kFp8, kModel) == 148);  // 140 codes and 2 scales.
  auto moe = mixture({.chunks = 3, .dispatch_format = out, .combine_format = back});
  decltype(moe)::Cache cache;
  const Index me = test::ranks().rank(), ranks = test::ranks().size();

  // The routing of all ranks' tokens, as each rank can work it out for itself.
  const Matrix<float> all = test::random_matrix<float>(kTokens, kModel, 5);
  LinearRouter<float>::Cache logits;
  SoftmaxTopK<float>::Cache selected;
  Routing<float> routing;
  moe.selector().forward(moe.router().forward(all, kTraining, logits), kTraining, routing,
                         selected);
  Traffic traffic(placed().nodes(), RowsSent::kPerAssignment);
  traffic.add(routing, placed(), [&](Index token) {
    Index rank = 0;
    while (token >= test::share(rank + 1, kTokens)) ++rank;
    return rank;
  });
  const RowSizes sizes = {row_bytes<float>(out, kModel), row_bytes<float>(back, kModel)};
  long counts = 0;
  for (Index d = 0; d < ranks; ++d) counts += d == me ? 0 : 8 * (11 + placed().slots(d));

  const Matrix<float> x = test::own_rows(all);
  const auto forward = test::sent_by([&] { moe.forward(x, kTraining, cache); });
  CHECK(forward.bytes == counts + traffic.bytes_out(me, sizes));
  const auto backward = test::sent_by([&] { moe.backward(x, cache); });
  CHECK(backward.bytes == traffic.bytes_out(me, sizes));
  if (ranks > 1) CHECK(traffic.total() > 0);
  CHECK(forward.messages <= (ranks - 1) * (1 + 2 * 3));  // Counts, and two ways of three chunks.
}

TEST_CASE(
    "In two levels, a rank sends one message to each other node, of as many bytes as directly",
    "[parallel][mpi]") {
  if (test::ranks().size() != 4) return;
  const RankNodes nodes = RankNodes::uniform(4, 2);
  const auto node_of_rank = [&](int rank) { return nodes.node_of(rank); };
  const Matrix<float> x = test::random_matrix<float>(50, kModel, 5);
  std::vector<test::SentSoFar> across;
  for (const bool two_level : {false, true}) {
    Rng rng(2);
    const GluBank<float> bank(kModel, 8, 8, rng);
    MoELayer moe(LinearRouter<float>(kModel, 8, rng), SoftmaxTopK<float>({.k = 2}), Dropless(),
                 ExpertParallel<GluBank<float>>(bank, Placement::contiguous(8, nodes),
                                                std::make_shared<ExpertChannels>(test::ranks()),
                                                {.chunks = 1, .two_level = two_level}));
    decltype(moe)::Cache cache;
    moe.forward(x, kTraining, cache);
    across.push_back(test::sent_by(
        [&] { moe.backward(x, cache); },
        [&](int to) { return node_of_rank(to) != node_of_rank(test::ranks().rank()); }));
  }
  // What a node sends another one is the same, though its ranks share it otherwise.
  const auto of_all = [&](double own) { return DataParallel<float>(test::ranks()).sum(own); };
  CHECK(of_all(static_cast<double>(across[0].bytes)) ==
        of_all(static_cast<double>(across[1].bytes)));
  CHECK(across[0].messages == 4);  // Two ranks, out and back.
  CHECK(across[1].messages == 2);
}

TEST_CASE(
    "A token that has several experts on a node crosses to it once, and the bytes are counted",
    "[parallel][mpi]") {
  const Index ranks = test::ranks().size(), me = test::ranks().rank();
  if (ranks != 4) return;
  const RankNodes nodes({0, 1, 1, 0});  // Places 0, 0, 1, 1.
  const auto place_of = [](Index rank) { return rank / 2; };
  constexpr Index kChunks = 2, kTokensHere = 50;
  const bool narrow = GENERATE(false, true);
  const RowFormat format = narrow ? RowFormat::kFp8 : RowFormat::kFull;
  Rng rng(2);
  const GluBank<float> bank(kModel, 8, 8, rng);
  const Placement placement = Placement::contiguous(8, nodes);
  MoELayer moe(LinearRouter<float>(kModel, 8, rng), SoftmaxTopK<float>({.k = 4}), Dropless(),
               ExpertParallel<GluBank<float>>(
                   bank, placement, std::make_shared<ExpertChannels>(test::ranks()),
                   {.chunks = kChunks, .dispatch_format = format, .once_per_node = true}));
  const Matrix<float> all = test::random_matrix<float>(4 * kTokensHere, kModel, 5);
  LinearRouter<float>::Cache logits;
  SoftmaxTopK<float>::Cache selected;
  Routing<float> routing;
  moe.selector().forward(moe.router().forward(all, kTraining, logits), kTraining, routing,
                         selected);
  const auto count = [&](RowsSent rows) {
    Traffic traffic(nodes, rows);
    traffic.add(routing, placement, [&](Index token) { return token / kTokensHere; });
    return traffic;
  };
  const Traffic by_assignment = count(RowsSent::kPerAssignment),
                by_rank = count(RowsSent::kPerRank), by_node = count(RowsSent::kPerNode);

  // Of all ranks: what a pass sends inside of nodes [0], and across [1].
  const auto sent_by_all = [&](auto&& f) {
    std::array<double, 2> bytes{};
    const std::vector<test::SentSoFar> before = test::sent_so_far();
    f();
    for (int r = 0; r < ranks; ++r) {
      const std::size_t to = static_cast<std::size_t>(r);
      if (to >= test::sent_so_far().size()) continue;
      bytes[nodes.share_node(r, me) ? 0 : 1] += static_cast<double>(
          test::sent_so_far()[to].bytes - (to < before.size() ? before[to].bytes : 0));
    }
    DataParallel<float> together(test::ranks());
    return std::array{together.sum(bytes[0]), together.sum(bytes[1])};
  };
  std::array<Index, 2> expected{};
  const RowSizes sizes = {row_bytes<float>(format, kModel),
                          row_bytes<float>(RowFormat::kFull, kModel)};
  for (Index s = 0; s < ranks; ++s) {
    for (Index d = 0; d < ranks; ++d) {
      if (s == d) continue;
      Index& bytes = expected[nodes.share_node(s, d) ? 0 : 1];
      const bool relays = !nodes.share_node(s, d) && place_of(s) == place_of(d);
      bytes += 8 * (11 + placement.slots(d));                                 // Counts of tokens,
      bytes += nodes.share_node(s, d) ? 8 * 2 * kChunks * nodes.nodes() : 0;  // of relays,
      bytes += 8 * kChunks * (relays ? 2 + 2 : 1);                            // and of rows.
      bytes += 4 * by_assignment.rows(s, d);                                  // Their places.
      for (Index to = 0; relays && to < ranks; ++to) {
        bytes += nodes.share_node(to, d) ? 4 * by_rank.rows(s, to) : 0;
      }
      bytes += sizes.dispatch * by_node.rows(s, d);
      // Back, a row for each assignment, inside of its node first, unless the places are the same.
      if (place_of(s) != place_of(d)) expected[0] += sizes.combine * by_assignment.rows(s, d);
      if (!nodes.share_node(s, d)) expected[1] += sizes.combine * by_assignment.rows(s, d);
    }
  }
  CHECK(by_node.across() < by_rank.across());
  CHECK(by_rank.across() < by_assignment.across());
  decltype(moe)::Cache cache;
  const Matrix<float> x = all.middleRows(me * kTokensHere, kTokensHere);
  const auto sent = sent_by_all([&] { moe.forward(x, kTraining, cache); });
  CHECK(sent[0] == static_cast<double>(expected[0]));
  CHECK(sent[1] == static_cast<double>(expected[1]));
}

TEST_CASE("DataParallel sends each gradient to its owner once, and the value or the sum back",
          "[parallel][mpi]") {
  const bool shards = GENERATE(true, false);
  auto moe = mixture({});
  decltype(moe)::Cache cache;
  DataParallel<float> together(test::ranks(), {.bucket_size = 500, .shards_states = shards});
  together.agree(moe);
  const Matrix<float> x = test::random_matrix<float>(5, kModel, 5);
  moe.forward(x, kTraining, cache);
  moe.backward(x, cache);
  long to_owners = 0, from_owner = 0;
  for (const auto& entry : together.parameters().all()) {
    if (entry.parameter == nullptr) continue;
    const long bytes = 4 * (1 + entry.size());
    if (entry.owner == together.rank()) {
      from_owner += (entry.ranks.count() - 1) * bytes;
    } else {
      to_owners += bytes;
    }
  }
  const auto reduced = test::sent_by([&] { together.reduce(moe); });
  CHECK(reduced.bytes == to_owners + (shards ? 0 : from_owner));
  const auto shared = test::sent_by([&] { together.share_values(moe); });
  CHECK(shared.bytes == from_owner);
}

}  // namespace weir::sent_bytes_test
