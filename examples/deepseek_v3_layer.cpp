// SPDX-License-Identifier: MIT
// The mixture of DeepSeek-V3: sigmoids instead of a softmax, one expert that every token visits,
// and no loss for balance: a bias on each expert's score goes up while the expert gets too little,
// and down while it gets too much. (DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2.)
#include <iostream>

#include <weir/core/init.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/beside/shared_experts.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/nn/glu.hpp>
#include <weir/optim/adamw.hpp>

#include "progress.hpp"

int main() {
  weir::Rng rng(1);
  weir::MoELayer routed(weir::LinearRouter<float>(16, 32, rng),
                        weir::SigmoidTopK<float>(32, {.k = 4, .scale = 2.5}), weir::Dropless(),
                        weir::GluBank<float>(16, 32, 16, rng),
                        weir::BiasBalance<float>({.rate = 0.005}));
  weir::SharedExperts layer(std::move(routed), weir::Glu<float>(16, 16, rng));
  weir::AdamW<float> optimizer({.learning_rate = 1e-3});

  const weir::RowVector<float> direction = weir::normal_init<float>(1, 16, 1.0, rng);
  weir::Matrix<float> x = weir::normal_init<float>(512, 16, 0.5, rng);
  x.rowwise() += direction;
  const weir::Matrix<float> target = (2.0F * x).array().sin();

  std::cout << "step   error  max/mean  load of the 32 routed experts\n";
  decltype(layer)::Cache cache;
  for (int step = 0; step <= 200; ++step) {
    const weir::Matrix<float> error = layer.forward(x, weir::kTraining, cache) - target;
    layer.backward(2.0F / 512.0F * error, cache);
    optimizer.step(layer);  // also lets the bias move
    if (step % 25 != 0) continue;
    const weir::LayerReport report = layer.moe().report(cache.moe);
    std::cout << padded(std::to_string(step), 4) << padded(fixed(error.squaredNorm() / 512.0, 2), 8)
              << padded(fixed(report.imbalance(), 2), 10) << "  " << spark_line(report.load)
              << '\n';
  }
  const weir::Matrix<float>& bias = layer.moe().selector().selection_bias().value;
  std::cout << "the bias is between " << fixed(bias.minCoeff(), 3) << " and "
            << fixed(bias.maxCoeff(), 3) << "; the scores it is added to, between 0 and 1\n";
}
