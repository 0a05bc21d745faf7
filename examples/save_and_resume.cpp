// SPDX-License-Identifier: MIT
// Trains, saves a checkpoint every few steps, and goes on where the last run stopped, bit for bit:
// run it again, or stop it with Ctrl-C and run it again.
#include <filesystem>
#include <iostream>
#include <string>

#include <weir/io/checkpoint.hpp>
#include <weir/weir.hpp>

int main(int argc, char** argv) {
  const std::filesystem::path folder = argc > 1 ? argv[1] : "checkpoints";
  const weir::Index total_steps = argc > 2 ? std::stol(argv[2]) : 300;

  weir::Rng rng(42);
  weir::MoELayer moe(weir::JitterRouter(weir::LinearRouter<float>(32, 8, rng)),
                     weir::SigmoidTopK<float>(8, {.k = 2}), weir::Dropless(),
                     weir::GluBank<float>(32, 8, 64, rng), weir::BiasBalance<float>());
  const weir::Mlp<float> teacher(32, 64, rng);
  weir::AdamW<float> optimizer({.learning_rate = 3e-3});
  weir::io::TrainingState state{.rng = weir::Rng(7)};

  if (const auto checkpoint = weir::io::latest_checkpoint(folder)) {
    state = weir::io::load(*checkpoint, moe, optimizer);
    std::cout << "going on from " << checkpoint->string() << '\n';
  }
  decltype(moe)::Cache cache;
  while (optimizer.steps() < total_steps) {
    const weir::Matrix<float> x = weir::normal_init<float>(256, 32, 1.0, state.rng);
    const weir::Matrix<float> error =
        moe.forward(x, {.training = true, .rng = &state.rng}, cache) - weir::infer(teacher, x);
    moe.backward(2.0F / 8192.0F * error, cache);
    optimizer.step(moe);
    if (optimizer.steps() % 100 == 0) {
      const auto saved = weir::io::save(folder, moe, optimizer, state, {.keep = 2});
      std::cout << "step " << optimizer.steps() << "  loss " << error.squaredNorm() / 8192.0F
                << "  saved as " << saved.string() << '\n';
    }
  }
  weir::io::save_weights(folder / "trained.safetensors", moe);  // what other programs need
}
