// SPDX-License-Identifier: MIT
// Somebody else's program: compiled with nothing but what weir::weir brings along.
#include <iostream>

#include <weir/weir.hpp>

int main() {
  weir::set_threads(weir::hardware_threads());
  weir::Rng rng(1);
  weir::MoELayer moe(weir::LinearRouter<float>(16, 4, rng), weir::SoftmaxTopK<float>{.k = 2},
                     weir::Dropless{}, weir::GluBank<float>(4, 16, 32, rng),
                     weir::SwitchLoss<float>{}, weir::ZLoss<float>{});
  const weir::Matrix<float> x = weir::normal_init<float>(64, 16, 1.0, rng);
  decltype(moe)::Cache cache;
  moe.backward(moe.forward(x, cache), cache);
  std::cout << "auxiliary loss " << cache.aux_loss << '\n';
  return cache.dx.allFinite() && cache.aux_loss > 0.0F ? 0 : 1;
}
