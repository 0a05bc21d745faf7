// SPDX-License-Identifier: MIT
// Training in full: capacity, noise, auxiliary losses, balancing without a loss, clipping and a
// learning-rate schedule. The task is to imitate a fixed network, on new tokens at every step.
#include <iostream>

#include <weir/core/init.hpp>
#include <weir/core/parallel.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/balance/z_loss.hpp>
#include <weir/moe/capacity/capacity_factor.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/jitter_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/sigmoid_top_k.hpp>
#include <weir/nn/mlp.hpp>
#include <weir/optim/adamw.hpp>
#include <weir/optim/clip.hpp>
#include <weir/optim/warmup_cosine.hpp>

int main() {
  weir::set_threads(weir::hardware_threads());  // 1 unless set; the results are the same bits
  weir::Rng rng(1);
  weir::MoELayer moe(
      weir::JitterRouter(weir::LinearRouter<float>(32, 8, rng), {.epsilon = 0.01}),
      weir::SigmoidTopK<float>(8, {.k = 2}), weir::CapacityFactor({.train = 1.25, .evaluate = 2.0}),
      weir::GluBank<float>(32, 8, 64, rng), weir::SwitchLoss<float>({.coefficient = 1e-3}),
      weir::ZLoss<float>({.coefficient = 1e-4}), weir::BiasBalance<float>({.rate = 1e-2}));
  weir::AdamW<float> optimizer({.weight_decay = 0.01});
  const weir::WarmupCosine schedule{.peak = 1e-2, .warmup_steps = 50, .total_steps = 1000};

  const weir::Mlp<float> teacher(32, 64, rng);
  decltype(moe)::Cache cache;  // one for each layer; kept, so that later steps allocate nothing
  weir::PassRecord record(weir::PassRecord::Collects::kLossesAndReports);
  while (optimizer.steps() < schedule.total_steps) {
    const weir::Matrix<float> x = weir::normal_init<float>(256, 32, 1.0, rng);
    const weir::Matrix<float> target = weir::infer(teacher, x);

    record.clear();
    const weir::Pass pass{.training = true, .rng = &rng, .record = &record};
    const weir::Matrix<float> error = moe.forward(x, pass, cache) - target;
    const auto count = static_cast<float>(error.size());
    moe.backward(2.0F / count * error, cache);  // the auxiliary losses are included

    const double norm = weir::clip_global_norm(moe, 1.0);  // refuses NaN and infinity
    optimizer.set_learning_rate(schedule.at(optimizer.steps()));
    optimizer.step(moe);  // moves the parameters, clears the gradients, lets BiasBalance act

    if (optimizer.steps() % 500 == 0) {
      const weir::LayerReport& report = record.reports().front().report;
      std::cout << "step " << optimizer.steps() << "  loss " << error.squaredNorm() / count
                << "  auxiliary " << record.aux_loss() << "  gradient " << norm
                << "  max/mean load " << report.imbalance() << "  dropped " << report.drop_rate()
                << '\n';
    }
  }

  weir::set_storage(moe, weir::Storage::kPacked);  // from here on for inference only
  const weir::Matrix<float> x = weir::normal_init<float>(256, 32, 1.0, rng);
  const weir::Matrix<float> error = weir::infer(moe, x) - weir::infer(teacher, x);
  std::cout << "new tokens: loss " << error.squaredNorm() / static_cast<float>(error.size())
            << '\n';
}
