// SPDX-License-Identifier: MIT
// A balancing loss and a router of one's own, in one file. Each derives from the base of its role,
// which has everything that it does not say itself; nothing is registered.
//
// The task has a trap: all tokens lie near one direction, so that a router left alone sends nearly
// all of them to the same experts. The program trains the same layer without balancing and with the
// loss below, and shows the load of each expert.
#include <iomanip>
#include <iostream>
#include <string>

#include <weir/core/init.hpp>
#include <weir/moe/capacity/dropless.hpp>
#include <weir/moe/experts/mlp_bank.hpp>
#include <weir/moe/moe_layer.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>
#include <weir/optim/adamw.hpp>

// Pulls the mean probability of each expert towards 1 / experts:
//
//     loss = coefficient * sum_e (P_e - 1/E)^2,    P_e = mean over tokens of p_te
//     dloss/dp_te = 2 coefficient / T * (P_e - 1/E)
//
// The gradient goes to the probabilities; the selector carries it on to the logits.
class FlatLoss : public weir::BalancerBase {
 public:
  static constexpr std::string_view kName = "flat";  // its name in records and reports

  explicit FlatLoss(double coefficient = 1.0) : coefficient_(coefficient) {}

  double forward(const weir::Routing<float>& routing, Cache& /*cache*/) const {
    return coefficient_ * static_cast<double>(excess(routing).squaredNorm());
  }

  void backward(const weir::Routing<float>& routing, double scale,
                weir::RoutingGradient<float>& gradient, Cache& /*cache*/) const {
    const double factor = 2.0 * scale * coefficient_ / static_cast<double>(routing.tokens());
    gradient.probabilities.rowwise() += static_cast<float>(factor) * excess(routing);
  }

 private:
  static weir::RowVector<float> excess(const weir::Routing<float>& routing) {
    return routing.probabilities.colwise().mean().array() -
           1.0F / static_cast<float>(routing.experts());
  }

  double coefficient_;
};

// Scores each expert by its distance to a learned point: logits_te = -|x_t - c_e|^2 / 2.
class DistanceRouter : public weir::RouterBase<float> {
 public:
  struct Cache {
    weir::CacheState state;  // lets backward refuse a cache that does not fit
    weir::Matrix<float> x, logits, dx;
  };

  DistanceRouter(weir::Index d_model, weir::Index experts, weir::Rng& rng)
      : centres_{weir::normal_init<float>(experts, d_model, 0.3, rng)} {}

  const weir::Matrix<float>& forward(weir::MatrixIn<float> x, const weir::Pass& pass,
                                     Cache& cache) const {
    cache.state.begin();
    if (pass.training) cache.x = x;
    cache.logits.resize(x.rows(), experts());
    for (weir::Index t = 0; t < x.rows(); ++t) {
      for (weir::Index e = 0; e < experts(); ++e) {
        cache.logits(t, e) = -0.5F * (x.row(t) - centres_.value.row(e)).squaredNorm();
      }
    }
    return cache.state.finish(*this, pass, cache.logits);
  }

  // dlogits_te/dx_t = c_e - x_t, and the opposite for c_e.
  const weir::Matrix<float>& backward(weir::MatrixIn<float> d_logits, Cache& cache) {
    cache.state.begin_backward("DistanceRouter::backward", *this, d_logits);
    cache.dx.setZero(cache.x.rows(), cache.x.cols());
    for (weir::Index t = 0; t < cache.x.rows(); ++t) {
      for (weir::Index e = 0; e < experts(); ++e) {
        const weir::RowVector<float> away = cache.x.row(t) - centres_.value.row(e);
        cache.dx.row(t) -= d_logits(t, e) * away;
        centres_.gradient().row(e) += d_logits(t, e) * away;
      }
    }
    return cache.dx;
  }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("centres", self.centres_);
  }

  weir::Index d_model() const { return centres_.value.cols(); }
  weir::Index experts() const { return centres_.value.rows(); }

 private:
  weir::Parameter<float> centres_;
};

template <class... Balancers>
void train(const std::string& title, Balancers... balancers) {
  constexpr weir::Index kModel = 16;
  constexpr weir::Index kExperts = 6;
  weir::Rng rng(7);
  weir::MoELayer moe(DistanceRouter(kModel, kExperts, rng), weir::SoftmaxTopK<float>({.k = 1}),
                     weir::Dropless(), weir::MlpBank<float>(kModel, kExperts, 32, rng),
                     balancers...);
  weir::AdamW<float> optimizer({.learning_rate = 1e-2, .weight_decay = 0.0});

  const weir::RowVector<float> trap = weir::normal_init<float>(1, kModel, 1.0, rng);
  weir::Matrix<float> x = weir::normal_init<float>(512, kModel, 0.5, rng);
  x.rowwise() += trap;
  const weir::Matrix<float> target = x.array().sin();

  typename decltype(moe)::Cache cache;
  float loss = 0.0F;
  for (int step = 0; step < 200; ++step) {
    const weir::Matrix<float> error = moe.forward(x, weir::kTraining, cache) - target;
    loss = error.squaredNorm() / static_cast<float>(error.size());
    moe.backward(2.0F / static_cast<float>(error.size()) * error, cache);
    optimizer.step(moe);
  }

  const weir::LayerReport report = moe.report(cache);
  std::cout << std::fixed << std::setprecision(3) << title << "\n  error " << loss
            << "   max/mean load " << report.imbalance() << '\n';
  for (std::size_t e = 0; e < report.load.size(); ++e) {
    std::cout << "  expert " << e << "  " << std::setw(3) << report.load[e] << " tokens  "
              << std::string(static_cast<std::size_t>(report.load[e] / 8), '#') << '\n';
  }
  for (const auto& [name, value] : report.losses) {
    std::cout << "  " << name << " loss " << value << '\n';
  }
}

int main() {
  train("without balancing");
  train("with FlatLoss", FlatLoss(1.0));
}
