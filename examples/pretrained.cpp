// SPDX-License-Identifier: MIT
// Models in folders as Hugging Face has them: saves a small OLMoE there, or takes the folder that
// is named, loads it with weights of 16 bits, and lets it continue a few tokens.
#include <filesystem>
#include <iostream>
#include <vector>

#include <weir/io/pretrained.hpp>
#include <weir/weir.hpp>

int main(int argc, char** argv) {
  namespace presets = weir::presets;
  const std::filesystem::path folder = argc > 1 ? argv[1] : "small-olmoe";
  if (argc == 1) {
    const auto config = presets::scaled(presets::olmoe_1b_7b(), {.d_model = 64, .vocab = 1000});
    weir::Rng rng(1);
    weir::Decoder<float> model = presets::make<float>(config, rng);  // and here you would train it
    weir::io::save_pretrained(folder, model, config, {.dtype = weir::io::Dtype::kBF16});
    std::cout << "saved " << folder.string() << " with " << weir::parameter_count(model)
              << " parameters\n";
  }

  const auto loaded = weir::io::load_pretrained(folder, {.storage = weir::Storage::kBfloat16});
  const weir::Decoder<float>& model = loaded.model;
  std::cout << "loaded " << model.layers().size() << " layers of width " << model.d_model() << '\n';

  weir::Rng rng(2);
  const std::vector<weir::Index> prompt = {1, 2, 3};
  std::cout << "1 2 3 goes on with";
  for (const weir::Index id : weir::generate(model, prompt, 8, {.temperature = 0.0}, rng)) {
    std::cout << ' ' << id;
  }
  std::cout << '\n';
}
