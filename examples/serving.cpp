// SPDX-License-Identifier: MIT
// One layer serves several threads at once. `forward` is const, and whatever a pass writes is in
// the cache of the thread that runs it. The weights are arranged for inference beforehand. (weir
// starts no threads of its own unless told to: see set_threads.)
#include <iostream>
#include <thread>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

#include "progress.hpp"

namespace {

using Layer = weir::MoELayer<weir::LinearRouter<float>, weir::TopKSoftmax<float>, weir::Dropless,
                             weir::GluBank<float>>;
using Requests = std::vector<weir::Matrix<float>>;

Layer make_layer() {
  weir::Rng rng(1);
  Layer layer(weir::LinearRouter<float>(256, 16, rng), weir::TopKSoftmax<float>({.k = 2}),
              weir::Dropless(), weir::GluBank<float>(256, 16, 512, rng));
  weir::set_storage(layer, weir::Storage::kPacked);
  return layer;
}

// Answers every `stride`-th request from number `first` on.
void serve(const Layer& layer, const Requests& requests, std::size_t first, std::size_t stride,
           Requests& answers) {
  Layer::Cache cache;
  for (std::size_t i = first; i < requests.size(); i += stride) {
    answers[i] = layer.forward(requests[i], weir::Pass{}, cache);
  }
}

}  // namespace

int main() {
  const Layer layer = make_layer();
  weir::Rng rng(2);
  Requests requests;
  for (int i = 0; i < 400; ++i) requests.push_back(weir::normal_init<float>(4, 256, 1.0, rng));
  Requests alone(requests.size());
  serve(layer, requests, 0, 1, alone);

  for (std::size_t count = 1; count <= 4; count *= 2) {
    Requests answers(requests.size());
    const double seconds = seconds_of([&] {
      std::vector<std::thread> threads;
      for (std::size_t i = 0; i < count; ++i) {
        threads.emplace_back([&, i] { serve(layer, requests, i, count, answers); });
      }
      for (std::thread& thread : threads) thread.join();
    });
    std::cout << count << (count == 1 ? " thread   " : " threads  ")
              << padded(fixed(static_cast<double>(requests.size()) / seconds, 0), 6)
              << " requests/s, the answers are the same bits: " << (answers == alone ? "yes" : "no")
              << '\n';
  }
}
