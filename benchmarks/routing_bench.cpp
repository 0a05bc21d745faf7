// SPDX-License-Identifier: MIT
// What it costs to decide who goes where:
//
//     routing/SHAPE/STORAGE/inference|training/tokens:N/threads:N
//         share%  router, selector, capacity and balancers alone, of the time of the whole layer
//
// The row's time is theirs alone. The layer has a linear router, softmax and top-k, a capacity
// factor, SwitchLoss and ZLoss. In training, backward is part of both; in inference nobody asks for
// the balancers' losses.
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <benchmark/benchmark.h>

#include <weir/core/pass.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/balancers.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

#include "support/clock.hpp"
#include "support/mixture.hpp"
#include "support/program.hpp"
#include "support/rows.hpp"

namespace {

namespace bench = weir::bench;
using bench::Shape;
using weir::Index;
using weir::Matrix;
using weir::Storage;

auto make_layer(const Shape& shape) {
  bench::MixtureWeights weights = bench::make_weights(shape);
  return weir::MoELayer(
      weir::LinearRouter<float>(std::move(weights.router)),
      weir::SoftmaxTopK<float>({.k = shape.k, .renormalise = true}),
      weir::CapacityFactor({.train = 1.25, .evaluate = 2.0}),
      weir::GluBank<float>(std::move(weights.gate), std::move(weights.up), std::move(weights.down)),
      weir::SwitchLoss<float>(), weir::ZLoss<float>());
}

using Layer = decltype(make_layer(bench::kFewLarge));

/// What MoELayer does about routing, without the experts.
class Routing {
 public:
  explicit Routing(Layer& layer)
      : layer_(layer), balancers_(layer.balancer<0>(), layer.balancer<1>()) {}

  void forward(const Matrix<float>& x, const weir::Pass& pass) {
    const Matrix<float>& logits = layer_.router().forward(x, pass, cache_.router);
    layer_.selector().forward(logits, pass, cache_.routing, cache_.selector);
    layer_.capacity().forward(pass, cache_.routing, cache_.capacity);
    balancers_.forward(cache_.routing, layer_.router(), pass, cache_.balancers);
  }

  void backward() {
    cache_.gradient.reset(cache_.routing);
    cache_.gradient.weights.array() += 1.0F;  // What the experts would say.
    layer_.capacity().backward(cache_.routing, cache_.gradient, cache_.capacity);
    balancers_.backward(cache_.routing, layer_.router(), cache_.gradient, cache_.balancers);
    layer_.selector().backward(cache_.routing, cache_.gradient, cache_.selector);
    layer_.router().backward(cache_.gradient.logits, cache_.router);
  }

 private:
  Layer& layer_;
  weir::Balancers<weir::LinearRouter<float>, weir::SoftmaxTopK<float>, weir::SwitchLoss<float>,
                  weir::ZLoss<float>>
      balancers_;
  Layer::Cache cache_;
};

struct Setting {
  std::string_view name;
  Storage storage;
  bool training;
};

constexpr Setting kSettings[] = {{"fp32-trainable/training", Storage::kTrainable, true},
                                 {"fp32/inference", Storage::kPacked, false},
                                 {"bf16/inference", Storage::kBfloat16, false}};

double measure(benchmark::State& state, const Shape& shape, const Setting& setting, Index tokens) {
  const Matrix<float> x = bench::make_tokens(shape, tokens, bench::Load::kUniform, 0);
  const weir::Pass pass{.training = setting.training};
  Layer layer = make_layer(shape);
  weir::set_storage(layer, setting.storage);
  Layer::Cache cache;
  const Matrix<float> dy = layer.forward(x, pass, cache);
  Routing routing(layer);

  const auto run_layer = [&] {
    layer.forward(x, pass, cache);
    if (setting.training) layer.backward(dy, cache);
  };
  const auto run_routing = [&] {
    routing.forward(x, pass);
    if (setting.training) routing.backward();
  };
  run_layer();
  run_routing();

  constexpr double kPercent = 100.0;
  bench::Figures figures;
  std::vector<double> times;
  bench::repeat_rounds([&] {
    const double whole = bench::seconds_of(run_layer);
    times.push_back(bench::seconds_of(run_routing));
    figures.add("share%", kPercent * times.back() / whole);
    figures.add("tokens/s", static_cast<double>(tokens) / times.back());
  });
  figures.report(state);
  return bench::median(times);
}

}  // namespace

int main(int argc, char** argv) {
  for (const Shape& shape : {bench::kFewLarge, bench::kManySmall}) {
    for (const Setting& setting : kSettings) {
      for (const Index tokens : {64, 2048}) {
        for (const int threads : bench::thread_counts()) {
          const std::string name = "routing/" + std::string(shape.name) + '/' +
                                   std::string(setting.name) + "/tokens:" + std::to_string(tokens);
          bench::add_row(name, threads, [=](benchmark::State& state) {
            return measure(state, shape, setting, tokens);
          });
        }
      }
    }
  }
  return bench::run_rows(argc, argv);
}
