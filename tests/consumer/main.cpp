// SPDX-License-Identifier: MIT
// Somebody else's program: compiled with nothing but what weir::weir brings along.
#include <iostream>

#include <weir/core/init.hpp>
#include <weir/kernels/matmul.hpp>

#if defined(EXPECT_NO_OPENMP) && defined(_OPENMP)
#error "OpenMP was switched off, but came along"
#endif

int main() {
  weir::Rng rng(1);
  const weir::Matrix<float> x = weir::uniform_init<float>(8, 16, rng);
  const weir::Matrix<float> w = weir::uniform_init<float>(4, 16, rng);
  weir::Matrix<float> y(8, 4);
  weir::set_threads(weir::hardware_threads());
  weir::multiply_nt<float>(x, w, y);
  const float error = (y - x * w.transpose()).norm();
  std::cout << "error " << error << '\n';
  return error < 1e-5F ? 0 : 1;
}
