// SPDX-License-Identifier: MIT
// A mixture-of-experts layer: forward, backward, step. Fits eight experts, two for each token, to
// random targets.
#include <iostream>

#include <weir/weir.hpp>

int main() {
  weir::Rng rng(42);
  weir::MoELayer moe(weir::LinearRouter<float>(32, 8, rng), weir::TopKSoftmax<float>({.k = 2}),
                     weir::Dropless(), weir::GluBank<float>(32, 8, 64, rng),
                     weir::SwitchLoss<float>({.coefficient = 0.01}));
  weir::AdamW<float> optimizer({.learning_rate = 1e-3});

  const weir::Matrix<float> x = weir::normal_init<float>(256, 32, 1.0, rng);  // [tokens, d_model]
  const weir::Matrix<float> target = weir::normal_init<float>(256, 32, 1.0, rng);
  decltype(moe)::Cache cache;
  for (int step = 0; step <= 300; ++step) {
    weir::PassRecord record;
    const weir::Matrix<float> error =
        moe.forward(x, {.training = true, .record = &record}, cache) - target;
    moe.backward(2.0F / 256.0F * error, cache);  // adds the gradients, balancing loss included
    optimizer.step(moe);                         // uses the gradients and clears them
    if (step % 100 == 0) {
      std::cout << "step " << step << "  loss " << error.squaredNorm() / 256.0F << "  balance "
                << record.aux_loss() << "  max/mean load " << moe.report(cache).imbalance() << '\n';
    }
  }
}
