// SPDX-License-Identifier: MIT
// A published model made small: Qwen3-30B-A3B with its structure and few numbers. It learns a short
// text by heart, byte by byte, and then continues its beginning.
#include <iostream>
#include <span>
#include <string_view>
#include <vector>

#include <weir/model/generate.hpp>
#include <weir/nn/cross_entropy.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/presets/count.hpp>
#include <weir/presets/qwen3_30b_a3b.hpp>
#include <weir/presets/scaled.hpp>

#include "bytes.hpp"
#include "progress.hpp"

int main() {
  namespace presets = weir::presets;
  constexpr std::string_view kText =
      "A weir is a low dam across a river. It holds the water back until it stands as high\n"
      "as the crest, and lets the rest pass over.\n";

  const auto published = presets::qwen3_30b_a3b();
  const auto small = presets::scaled(published, {.d_model = 64});
  weir::Rng rng(1);
  weir::Decoder<float> model = presets::make<float>(small, rng);
  std::cout << "published: " << grouped(presets::count(published.shape).total()) << " parameters, "
            << published.shape.layers << " layers, " << published.shape.experts << " experts\n"
            << "here:      " << grouped(weir::parameter_count(model)) << " parameters, "
            << small.shape.layers << " layers, " << small.shape.experts << " experts\n";

  const std::vector<weir::Index> ids = to_ids(kText);
  const auto inputs = std::span(ids).first(ids.size() - 1);
  const auto targets = std::span(ids).subspan(1);
  weir::AdamW<float> optimizer({.learning_rate = 3e-3});
  const weir::CrossEntropy<float> cross_entropy;
  weir::CrossEntropy<float>::Cache loss_cache;
  weir::Decoder<float>::Cache cache;
  for (int step = 0; step <= 60; ++step) {
    const auto& logits = model.forward(inputs, weir::kTraining, cache);
    const float loss = cross_entropy.forward(logits, targets, loss_cache);
    model.backward(cross_entropy.backward(loss_cache), cache);
    optimizer.step(model);
    if (step % 20 == 0) std::cout << "step " << step << "  loss " << fixed(loss, 4) << '\n';
  }

  weir::set_storage(model, weir::Storage::kPacked);  // from here on for inference only
  const std::string_view prompt = "A weir";
  const auto more = weir::generate(model, to_ids(prompt), 120, {.temperature = 0.0}, rng);
  std::cout << "\n[" << prompt << "]" << to_text(more) << '\n';
}
