// SPDX-License-Identifier: MIT
// Fine-tuning with parameters treated differently by name: routers are frozen, experts learn at a
// tenth of the rate, and the embedding does not decay. Shows how far each kind has moved.
#include <cmath>
#include <iostream>
#include <span>
#include <string_view>
#include <vector>

#include <weir/nn/cross_entropy.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/presets/olmoe_1b_7b.hpp>
#include <weir/presets/scaled.hpp>

#include "bytes.hpp"
#include "progress.hpp"

int main() {
  weir::Rng rng(1);
  weir::Decoder<float> model = weir::presets::make<float>(
      weir::presets::scaled(weir::presets::olmoe_1b_7b(), {.d_model = 64}), rng);
  const weir::Index frozen = weir::freeze(model, "*.router.*");
  std::cout << frozen << " parameters are frozen\n\n";

  weir::AdamW<float> optimizer({.learning_rate = 3e-3,
                                .groups = {{.pattern = "*.experts.*", .learning_rate_factor = 0.1},
                                           {.pattern = "embedding.*", .weight_decay = 0.0}}});
  weir::Decoder<float> before = model;

  const std::vector<weir::Index> ids = to_ids("Water that is too much passes over the weir.");
  const auto inputs = std::span(ids).first(ids.size() - 1);
  const auto targets = std::span(ids).subspan(1);
  const weir::CrossEntropy<float> cross_entropy;
  weir::CrossEntropy<float>::Cache loss_cache;
  weir::Decoder<float>::Cache cache;
  for (int step = 0; step <= 20; ++step) {
    const auto& logits = model.forward(inputs, weir::kTraining, cache);
    const float loss = cross_entropy.forward(logits, targets, loss_cache);
    model.backward(cross_entropy.backward(loss_cache), cache);
    optimizer.step(model);
    if (step % 10 == 0) std::cout << "step " << step << "  loss " << fixed(loss, 4) << '\n';
  }

  std::cout << "\nmoved, relative to where they were:\n";
  const auto then = weir::parameters(before);
  const auto now = weir::parameters(model);
  for (const std::string_view pattern :
       {"*.router.*", "*.experts.*", "embedding.*", "*.attention.*", "head.*"}) {
    double moved = 0.0;
    double norm = 0.0;
    for (std::size_t i = 0; i < now.size(); ++i) {
      if (!weir::matches_pattern(pattern, now[i].name)) continue;
      moved += (now[i].parameter->value - then[i].parameter->value).squaredNorm();
      norm += then[i].parameter->value.squaredNorm();
    }
    std::cout << "  " << pattern << std::string(15 - pattern.size(), ' ')
              << padded(fixed(100.0 * std::sqrt(moved / norm), 2), 6) << " %\n";
  }
}
