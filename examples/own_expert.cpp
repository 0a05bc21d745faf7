// SPDX-License-Identifier: MIT
// Experts of a type of one's own, with a hand-written derivative: AnyBank makes a bank of any
// layers. These are waves; the mixture learns a function that is another wave on each side of zero.
#include <cmath>
#include <iostream>
#include <utility>
#include <vector>

#include <weir/core/init.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/any_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/top_k_softmax.hpp>
#include <weir/optim/adamw.hpp>

#include "progress.hpp"

using Matrix = weir::Matrix<double>;
using In = weir::MatrixIn<double>;

// y = sin(x W^T), W [d_out, d_in].
class Wave {
 public:
  using Scalar = double;

  struct Cache {
    weir::CacheState state;  // lets backward refuse a cache that does not fit
    Matrix x, phase, y, dx;
  };

  Wave(weir::Index d_in, weir::Index d_out, weir::Rng& rng)
      : weight_{weir::normal_init<double>(d_out, d_in, 2.0, rng)} {}

  const Matrix& forward(In x, const weir::Pass& pass, Cache& cache) const {
    cache.state.begin();
    if (pass.training) cache.x = x;
    cache.phase = x * weight_.value.transpose();
    cache.y = cache.phase.array().sin();
    return cache.state.finish(*this, pass, cache.y);
  }

  // d_phase = dy cos(phase),   dW += d_phase^T x,   dx = d_phase W
  const Matrix& backward(In dy, Cache& cache) {
    cache.state.begin_backward("Wave::backward", *this, dy);
    const Matrix d_phase = dy.array() * cache.phase.array().cos();
    weight_.gradient() += d_phase.transpose() * cache.x;
    cache.dx = d_phase * weight_.value;
    return cache.dx;
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight_);
  }

 private:
  weir::Parameter<double> weight_;
};

int main() {
  weir::Rng rng(1);
  std::vector<Wave> waves;
  waves.reserve(6);
  for (int e = 0; e < 6; ++e) waves.emplace_back(2, 1, rng);
  weir::MoELayer moe(weir::LinearRouter<double>(2, 6, rng), weir::TopKSoftmax<double>({.k = 2}),
                     weir::Dropless(), weir::AnyBank<Wave>(std::move(waves), 2, 1));
  weir::AdamW<double> optimizer({.learning_rate = 1e-2, .weight_decay = 0.0});

  Matrix x = weir::normal_init<double>(256, 2, 1.0, rng);
  x.col(1).setOnes();  // for the phase
  const Matrix target = x.col(0).unaryExpr(
      [](double at) { return at > 0.0 ? std::sin(3.0 * at) : std::sin(at + 1.0); });

  decltype(moe)::Cache cache;
  for (int step = 0; step <= 500; ++step) {
    const Matrix error = moe.forward(x, weir::kTraining, cache) - target;
    moe.backward(2.0 / 256.0 * error, cache);
    optimizer.step(moe);
    if (step % 100 == 0) {
      std::cout << "step " << padded(std::to_string(step), 3) << "  loss "
                << fixed(error.squaredNorm() / 256.0, 5) << "  load "
                << spark_line(moe.report(cache).load) << '\n';
    }
  }
}
