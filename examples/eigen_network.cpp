// SPDX-License-Identifier: MIT
// A mixture of experts inside a network that is somebody's own: two matrices of Eigen with
// hand-written derivatives and plain gradient descent, and the mixture between them. It learns to
// tell two spirals apart and draws what it has learned.
#include <cmath>
#include <iostream>

#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/optim/adamw.hpp>

int main() {
  constexpr int kPoints = 400;  // in both spirals together
  constexpr int kWidth = 24;
  Eigen::MatrixXf points(kPoints, 2);
  Eigen::VectorXf side(kPoints);  // +1 or -1
  for (int i = 0; i < kPoints; ++i) {
    side[i] = i % 2 == 0 ? 1.0F : -1.0F;
    const float turn = 0.5F + 7.5F * static_cast<float>(i) / kPoints;
    points.row(i) << side[i] * turn / 8.0F * std::cos(turn), side[i] * turn / 8.0F * std::sin(turn);
  }

  weir::Rng rng(1);
  std::srand(1);
  Eigen::MatrixXf in = 2.0F * Eigen::MatrixXf::Random(2, kWidth);
  Eigen::VectorXf out = 0.3F * Eigen::VectorXf::Random(kWidth);
  weir::MoELayer moe(weir::LinearRouter<float>(kWidth, 8, rng), weir::TopKSoftmax<float>({.k = 2}),
                     weir::Dropless(), weir::GluBank<float>(kWidth, 8, 32, rng));
  weir::AdamW<float> optimizer({.learning_rate = 3e-3});

  decltype(moe)::Cache cache;
  for (int step = 0; step <= 500; ++step) {
    const Eigen::MatrixXf hidden = (points * in).array().tanh();
    const Eigen::MatrixXf mixed = moe.forward(hidden, weir::kTraining, cache);
    const Eigen::VectorXf margin = side.array() * ((hidden + mixed) * out).array();
    // loss = mean log(1 + exp(-margin))
    const Eigen::VectorXf d_score = -side.array() / (1.0F + margin.array().exp()) / kPoints;
    const Eigen::MatrixXf d_mixed = d_score * out.transpose();
    const Eigen::MatrixXf d_hidden = d_mixed + moe.backward(d_mixed, cache);
    out -= 0.1F * (hidden + mixed).transpose() * d_score;
    in -=
        0.1F * points.transpose() * (d_hidden.array() * (1.0F - hidden.array().square())).matrix();
    optimizer.step(moe);
    if (step % 100 == 0) {
      std::cout << "step " << step << "  loss " << (1.0F + (-margin).array().exp()).log().mean()
                << "  right " << (margin.array() > 0.0F).count() << " of " << kPoints << '\n';
    }
  }

  const Eigen::VectorXf across = Eigen::VectorXf::LinSpaced(60, -1.0F, 1.0F);
  for (const float height : Eigen::VectorXf::LinSpaced(24, 1.0F, -1.0F)) {
    Eigen::MatrixXf line(60, 2);  // the points behind the characters of a line
    line << across, Eigen::VectorXf::Constant(60, height);
    const Eigen::MatrixXf hidden = (line * in).array().tanh();
    const Eigen::VectorXf score = (hidden + Eigen::MatrixXf(weir::infer(moe, hidden))) * out;
    for (const float s : score) std::cout << (s > 0.0F ? '#' : '.');
    std::cout << '\n';
  }
}
