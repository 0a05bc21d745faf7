// SPDX-License-Identifier: MIT
// Somebody else's program: compiled with nothing but what weir::weir brings along.
#include <iostream>

#include <weir/weir.hpp>

int main() {
  weir::set_threads(weir::hardware_threads());
  weir::Rng rng(1);
  weir::MoELayer moe(weir::LinearRouter<float>(16, 4, rng), weir::SoftmaxTopK<float>({.k = 2}),
                     weir::Dropless(), weir::GluBank<float>(16, 4, 32, rng),
                     weir::SwitchLoss<float>(), weir::ZLoss<float>());
  const weir::Matrix<float> x = weir::normal_init<float>(64, 16, 1.0, rng);
  decltype(moe)::Cache cache;
  weir::PassRecord record;
  const weir::Matrix<float>& y = moe.forward(x, {.training = true, .record = &record}, cache);
  const weir::Matrix<float>& dx = moe.backward(y, cache);
  std::cout << "auxiliary loss " << record.aux_loss() << '\n';
  return dx.allFinite() && record.aux_loss() > 0.0 ? 0 : 1;
}
