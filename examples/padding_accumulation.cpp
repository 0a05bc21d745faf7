// SPDX-License-Identifier: MIT
// A batch of padded sequences, at once and in two micro-batches: the gradients add up to the same,
// if each micro-batch has its share of the auxiliary loss (Pass::aux_scale) and of the mean.
#include <cstdint>
#include <iostream>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/moe/balance/switch_loss.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>

int main() {
  using Matrix = weir::Matrix<double>;
  constexpr weir::Index kLength = 16;  // of every sequence, with its padding
  constexpr weir::Index kReal[] = {16, 5, 9, 12, 3, 16};
  constexpr double kRealTokens = 61.0;
  weir::Rng rng(1);
  weir::MoELayer moe(
      weir::LinearRouter<double>(8, 4, rng), weir::TopKSoftmax<double>({.k = 2}), weir::Dropless(),
      weir::GluBank<double>(8, 4, 16, rng),
      weir::SwitchLoss<double>({.coefficient = 1.0, .scope = weir::Scope::kSequence}));
  const Matrix x = weir::normal_init<double>(6 * kLength, 8, 1.0, rng);
  const Matrix target = weir::normal_init<double>(6 * kLength, 8, 1.0, rng);

  decltype(moe)::Cache cache;
  // Adds the gradients of `count` sequences, from number `first` on.
  const auto add_gradients = [&](weir::Index first, weir::Index count, double aux_scale) {
    const auto sequences = weir::Sequences::uniform(count, kLength);
    std::vector<std::uint8_t> mask;
    for (weir::Index t = first * kLength; t < (first + count) * kLength; ++t) {
      mask.push_back(t % kLength < kReal[t / kLength] ? 1 : 0);
    }
    const weir::Pass pass = {
        .training = true, .sequences = &sequences, .mask = mask, .aux_scale = aux_scale};
    const weir::Index begin = first * kLength;
    const weir::Index rows = count * kLength;
    const Matrix& y = moe.forward(x.middleRows(begin, rows), pass, cache);
    Matrix dy = 2.0 / kRealTokens * (y - target.middleRows(begin, rows));
    for (weir::Index t = 0; t < rows; ++t) {
      if (pass.is_padding(t)) dy.row(t).setZero();
    }
    moe.backward(dy, cache);
  };
  // All gradients, one after the other.
  const auto take_gradients = [&] {
    std::vector<double> all;
    for (const auto& [name, parameter] : weir::parameters(moe)) {
      for (const double g : parameter->gradient().reshaped()) all.push_back(g);
    }
    weir::zero_gradients(moe);
    return Eigen::VectorXd(Eigen::VectorXd::Map(all.data(), static_cast<weir::Index>(all.size())));
  };

  add_gradients(0, 6, 1.0);
  const Eigen::VectorXd whole = take_gradients();
  add_gradients(0, 2, 2.0 / 6.0);
  add_gradients(2, 4, 4.0 / 6.0);
  const Eigen::VectorXd parts = take_gradients();
  add_gradients(0, 2, 1.0);
  add_gradients(2, 4, 1.0);
  const Eigen::VectorXd careless = take_gradients();
  std::cout << "norm of the gradient of the batch         " << whole.norm() << '\n'
            << "error of micro-batches with their shares  " << (parts - whole).norm() << '\n'
            << "error of micro-batches without            " << (careless - whole).norm() << '\n';
}
