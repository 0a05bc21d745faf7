// SPDX-License-Identifier: MIT
// The layer of the Switch Transformer: one expert for each token, jitter on the router's input, a
// capacity beyond which tokens are dropped, and a loss that levels the load. All tokens lean to the
// same side, so that at first some experts get more than they can take.
// (Fedus et al. 2021, arXiv:2101.03961.)
#include <iostream>

#include <weir/core/init.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/optim/adamw.hpp>

#include "progress.hpp"

int main() {
  weir::Rng rng(3);
  weir::MoELayer moe(
      weir::JitterRouter(weir::LinearRouter<float>(16, 8, rng), {.epsilon = 0.01}),
      weir::SoftmaxTopK<float>({.k = 1}), weir::CapacityFactor({.train = 1.25, .evaluate = 2.0}),
      weir::MlpBank<float>(16, 8, 64, rng), weir::SwitchLoss<float>({.coefficient = 0.03}));
  weir::AdamW<float> optimizer({.learning_rate = 3e-3});

  const weir::RowVector<float> direction = weir::normal_init<float>(1, 16, 0.5, rng);
  weir::Matrix<float> x = weir::normal_init<float>(512, 16, 1.0, rng);
  x.rowwise() += direction;
  const weir::Matrix<float> target = x.array().sin();

  std::cout << "step   error  switch loss  dropped  load of the 8 experts\n";
  decltype(moe)::Cache cache;
  for (int step = 0; step <= 250; ++step) {
    weir::PassRecord record;
    const weir::Pass pass = {.training = true, .rng = &rng, .record = &record};
    // A dropped token gets zero from the layer: the residual around it carries the token.
    const weir::Matrix<float> error = x + moe.forward(x, pass, cache) - target;
    const float share = 1.0F / static_cast<float>(error.size());
    moe.backward(2.0F * share * error, cache);
    optimizer.step(moe);
    if (step % 50 != 0) continue;
    const weir::LayerReport report = moe.report(cache);
    std::cout << padded(std::to_string(step), 4) << padded(fixed(share * error.squaredNorm(), 3), 8)
              << padded(fixed(record.aux_loss("switch"), 4), 13)
              << padded(fixed(100.0 * report.drop_rate(), 1), 7) << " %  "
              << spark_line(report.load) << "  max/mean " << fixed(report.imbalance(), 2) << '\n';
  }
}
