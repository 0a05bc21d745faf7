// SPDX-License-Identifier: MIT
#include <chrono>
#include <cstddef>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <weir/core/random.hpp>
#include <weir/model/block_stack.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/nn/rms_norm.hpp>
#include <weir/parallel/mpi/data_parallel.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/timeline.hpp>

#include "parallel/mpi/rank_folder.hpp"
#include "parallel/mpi/ranks.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::overlap_test {

namespace {

constexpr Index kModel = 16;
constexpr auto kPause = std::chrono::milliseconds(40);

/// A network that takes its time; asleep, so that it does not depend on what else the machine does.
class SlowGlu {
 public:
  using Scalar = double;
  using Cache = Glu<double>::Cache;

  /// \param pauses   How long `backward` takes.
  explicit SlowGlu(Rng& rng, int pauses = 1) : glu_(kModel, 8, rng), pauses_(pauses) {}

  const Matrix<double>& forward(MatrixIn<double> x, const Pass& pass, Cache& cache) const {
    std::this_thread::sleep_for(kPause);
    return glu_.forward(x, pass, cache);
  }
  const Matrix<double>& backward(MatrixIn<double> dy, Cache& cache) {
    std::this_thread::sleep_for(pauses_ * kPause);
    return glu_.backward(dy, cache);
  }
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.glu_);
  }

 private:
  Glu<double> glu_;
  int pauses_;
};

bool is_within(const TimelineSpan& inner, const TimelineSpan& outer) {
  return inner.begin >= outer.begin && inner.end <= outer.end;
}

/// The only span of a track.
const TimelineSpan& span_of_track(Timeline& timeline, const std::string& name) {
  INFO(name);
  REQUIRE(timeline.track(name).spans() == 1);
  return timeline.track(name).span(0);
}

}  // namespace

TEST_CASE("Gradients of a layer are summed while those of the layers before it are computed",
          "[parallel][mpi]") {
  constexpr std::size_t kLayers = 4;
  const bool is_slow = test::ranks().rank() == 1;  // The others wait for its gradients.
  Rng rng(2);
  std::vector<Block<double>> blocks;
  for (std::size_t l = 0; l < kLayers; ++l) {
    std::vector<Branch<double>> branches;
    branches.push_back({"mlp", RmsNorm<double>(kModel), SlowGlu(rng, is_slow ? 3 : 1)});
    blocks.emplace_back(std::move(branches));
  }
  BlockStack<double> model(std::move(blocks));
  DataParallel<double> together(test::ranks());
  together.agree(model);
  Timeline timeline({.rank = test::ranks().rank()});
  together.set_timeline(&timeline);

  BlockStack<double>::Cache cache;
  const Matrix<double> x = test::own_rows(test::random_matrix(24, kModel, 3));
  model.forward(x, kTraining, cache);
  test::wait_for_ranks();
  Nanoseconds begin = Timeline::now();
  cache.layer_done = [&](std::size_t l) {
    timeline.track("backward").add("layer " + std::to_string(l), begin, Timeline::now());
    together.begin(model, "layers." + std::to_string(l) + ".");
    begin = Timeline::now();
  };
  model.backward(x, x, cache);
  together.reduce(model);

  TimelineTrack& backward = timeline.track("backward");
  REQUIRE(backward.spans() == static_cast<Index>(kLayers));
  if (test::ranks().size() == 1) return;
  Index seen = 0;
  for (std::size_t i = 0; i < kLayers; ++i) {  // Buckets come in the order of backward, as spans.
    const std::string name = "gradients " + std::to_string(i);
    const TimelineSpan& sum = span_of_track(timeline, name);
    INFO("bucket " << i);
    CHECK(sum.begin >= backward.span(static_cast<Index>(i)).end);
    if (i + 1 == kLayers || sum.bytes == 0) continue;
    const TimelineSpan& next = backward.span(static_cast<Index>(i) + 1);
    CHECK(sum.begin <= next.begin);
    if (is_slow) continue;
    // On its way while the next layer is differentiated.
    CHECK(overlap_time(backward, timeline.track(name)) >= next.end - next.begin);
    ++seen;
  }
  if (!is_slow) CHECK(seen > 0);
}

TEST_CASE("Shared experts are computed while tokens travel", "[parallel][mpi]") {
  constexpr Index kExperts = 8;
  Rng rng(2);
  auto channels = std::make_shared<ExpertChannels>(test::ranks());
  SharedExperts layer(
      MoELayer(LinearRouter<double>(kModel, kExperts, rng), SoftmaxTopK<double>({.k = 4}),
               Dropless(),
               ExpertParallel<GluBank<double>>(
                   GluBank<double>(kModel, kExperts, 8, rng),
                   Placement::contiguous(kExperts, RankNodes::single(test::ranks().size())),
                   channels, {.chunks = 2})),
      SlowGlu(rng));
  const Matrix<double> x = test::random_matrix(16, kModel, 3);
  decltype(layer)::Cache cache;
  layer.forward(x, kTraining, cache);  // Without a timeline.
  layer.backward(x, cache);
  for (const bool is_forward : {true, false}) {
    Timeline timeline({.rank = test::ranks().rank()});
    channels->timeline = &timeline;
    const Nanoseconds begin = Timeline::now();
    if (is_forward) {
      layer.forward(x, kTraining, cache);
    } else {
      layer.backward(x, cache);
    }
    const Nanoseconds end = Timeline::now();
    channels->timeline = nullptr;
    const TimelineSpan& shared = span_of_track(timeline, "meanwhile");
    CHECK(shared.begin >= begin);
    CHECK(shared.end <= end);
    CHECK(shared.end - shared.begin >= std::chrono::nanoseconds(kPause).count());
    if (test::ranks().size() == 1) continue;
    for (const char* const way : {"dispatch 0", "dispatch 1"}) {
      INFO(way);
      CHECK(is_within(shared, span_of_track(timeline, way)));
      CHECK(span_of_track(timeline, way).bytes > 0);
    }
    // Nothing of it is left for later.
    const TimelineTrack& experts = timeline.track("experts");
    REQUIRE(experts.spans() == 2);
    CHECK(shared.end <= experts.span(0).begin);
  }
}

}  // namespace weir::overlap_test
