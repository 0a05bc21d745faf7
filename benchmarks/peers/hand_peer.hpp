// SPDX-License-Identifier: MIT
/// \file
/// The layer as one writes it by hand around somebody else's matrix products.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <omp.h>
#include <utility>
#include <vector>

#include <Eigen/Core>

#include <weir/core/types.hpp>

#include "peers/peer.hpp"

namespace weir::bench {

/// The assignments of tokens to experts, and the slots they have when sorted by expert.
struct HandRouting {
  Index k = 0;
  std::vector<Index> expert;  // [tokens * k], best first
  std::vector<float> weight;  // [tokens * k]
  std::vector<Index> slot;    // [tokens * k]
  std::vector<Index> begin;   // [experts + 1], into the slots
  std::vector<Index> token;   // [slots]

  /// Softmax, then the `choices` best.
  /// \param logits   [tokens, experts]
  void build(const Matrix<float>& logits, Index choices, bool renormalise) {
    k = choices;
    const Index tokens = logits.rows();
    const Index experts = logits.cols();
    for (auto* list : {&expert, &slot, &token}) list->resize(size(tokens * k));
    weight.resize(size(tokens * k));
    begin.assign(size(experts + 1), 0);
    order_.resize(size(experts));
    for (Index t = 0; t < tokens; ++t) {
      const auto row = logits.row(t);
      std::iota(order_.begin(), order_.end(), Index(0));
      std::partial_sort(order_.begin(), order_.begin() + k, order_.end(),
                        [&](Index a, Index b) { return row[a] > row[b]; });
      float sum = 0.0F;
      for (Index i = 0; i < k; ++i) {
        const Index e = order_[size(i)];
        expert[size(t * k + i)] = e;
        ++begin[size(e + 1)];
        weight[size(t * k + i)] = std::exp(row[e] - row[order_[0]]);
        sum += weight[size(t * k + i)];
      }
      if (!renormalise) sum = (row.array() - row[order_[0]]).exp().sum();
      for (Index i = 0; i < k; ++i) weight[size(t * k + i)] /= sum;
    }
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    order_.assign(begin.begin(), begin.end() - 1);
    for (Index a = 0; a < tokens * k; ++a) {
      slot[size(a)] = order_[size(expert[size(a)])]++;
      token[size(slot[size(a)])] = a / k;
    }
  }

  Index slots() const { return static_cast<Index>(token.size()); }

  /// Calls `body(e, first slot, slots)` for each expert that has any.
  template <class Body>
  void for_each_expert(Body&& body) const {
    for (std::size_t e = 0; e + 1 < begin.size(); ++e) {
      if (begin[e + 1] > begin[e]) body(e, begin[e], begin[e + 1] - begin[e]);
    }
  }

 private:
  static std::size_t size(Index i) { return static_cast<std::size_t>(i); }

  std::vector<Index> order_;
};

/// `Products` multiplies:
///
///     void nt(MatrixIn<float> a, MatrixIn<float> b, MatrixOut<float> out);            a b^T
///     void nn(MatrixIn<float> a, MatrixIn<float> b, MatrixOut<float> out, bool add);  a b
///     void add_tn(MatrixIn<float> a, MatrixIn<float> b, MatrixOut<float> out);        += a^T b
///
/// The rest is Eigen's arrays in OpenMP loops, in buffers that are kept.
template <class Products>
class HandPeer : public Peer {
 public:
  HandPeer(const MoeWeights& weights, int threads)
      : d_model_(weights.d_model),
        d_hidden_(weights.d_hidden),
        k_(weights.k),
        renormalise_(weights.renormalise),
        router_(weights.router, weights.experts, weights.d_model) {
    omp_set_num_threads(threads);
    for (std::size_t e = 0; e < weights.gate.size(); ++e) {
      gate_.emplace_back(weights.gate[e], d_hidden_, d_model_);
      up_.emplace_back(weights.up[e], d_hidden_, d_model_);
      down_.emplace_back(weights.down[e], d_model_, d_hidden_);
    }
  }

  const float* forward(const float* x, std::ptrdiff_t tokens) override {
    const Map tokens_in(x, tokens, d_model_);
    route(tokens_in);
    gather(tokens_in);
    run_experts();
    combine(tokens);
    return y_.data();
  }

  const float* step(const float* x, const float* dy, std::ptrdiff_t tokens) override {
    HandPeer::forward(x, tokens);
    backward(Map(x, tokens, d_model_), Map(dy, tokens, d_model_));
    return dx_.data();
  }

  void zero_gradients() override {
    d_router_.setZero(router_.rows(), router_.cols());
    for (auto* gradients : {&d_gate_, &d_up_, &d_down_}) gradients->resize(gate_.size());
    for (std::size_t e = 0; e < gate_.size(); ++e) {
      d_gate_[e].setZero(d_hidden_, d_model_);
      d_up_[e].setZero(d_hidden_, d_model_);
      d_down_[e].setZero(d_model_, d_hidden_);
    }
  }

  MoeGradients gradients() override {
    MoeGradients all = {d_router_.data(), {}, {}, {}};
    for (std::size_t e = 0; e < d_gate_.size(); ++e) {
      all.gate.push_back(d_gate_[e].data());
      all.up.push_back(d_up_[e].data());
      all.down.push_back(d_down_[e].data());
    }
    return all;
  }

 protected:
  using Map = Eigen::Map<const Matrix<float>>;

  void route(const Map& x) {
    logits_.resize(x.rows(), router_.rows());
    products_.nt(x, router_, logits_);
    routing_.build(logits_, k_, renormalise_);
  }

  /// y_t = sum over the slots s of t of weight_s * out_s
  void combine(Index tokens) {
    y_.resize(tokens, d_model_);
#pragma omp parallel for schedule(static)
    for (Index t = 0; t < tokens; ++t) {
      y_.row(t).setZero();
      for (Index a = t * k_; a < (t + 1) * k_; ++a) {
        y_.row(t) += weight_of(a) * out_.row(slot_of(a));
      }
    }
  }

  float weight_of(Index a) const {
    return routing_.weight[static_cast<std::size_t>(a)];
  }
  Index slot_of(Index a) const {
    return routing_.slot[static_cast<std::size_t>(a)];
  }
  Index token_of(Index s) const {
    return routing_.token[static_cast<std::size_t>(s)];
  }

  Index d_model_, d_hidden_, k_;
  bool renormalise_;
  Map router_;
  std::vector<Map> gate_, up_, down_;
  Products products_;
  HandRouting routing_;
  Matrix<float> logits_;  // [tokens, experts]
  Matrix<float> out_;     // [slots, d_model]
  Matrix<float> y_;       // [tokens, d_model]

 private:
  void gather(const Map& x) {
    x_.resize(routing_.slots(), d_model_);
#pragma omp parallel for schedule(static)
    for (Index s = 0; s < routing_.slots(); ++s) x_.row(s) = x.row(token_of(s));
  }

  void run_experts() {
    const Index slots = routing_.slots();
    for (Matrix<float>* m : {&g_, &u_, &hidden_}) m->resize(slots, d_hidden_);
    out_.resize(slots, d_model_);
    routing_.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      products_.nt(x_.middleRows(begin, rows), gate_[e], g_.middleRows(begin, rows));
      products_.nt(x_.middleRows(begin, rows), up_[e], u_.middleRows(begin, rows));
#pragma omp parallel for schedule(static)
      for (Index s = begin; s < begin + rows; ++s) {
        const auto g = g_.row(s).array();
        hidden_.row(s).array() = g * g.logistic() * u_.row(s).array();
      }
      products_.nt(hidden_.middleRows(begin, rows), down_[e], out_.middleRows(begin, rows));
    });
  }

  void backward(const Map& x, const Map& dy) {
    if (d_gate_.empty()) zero_gradients();
    const Index slots = routing_.slots();
    d_out_.resize(slots, d_model_);
    d_x_.resize(slots, d_model_);
    for (Matrix<float>* m : {&d_hidden_out_, &d_g_, &d_u_}) m->resize(slots, d_hidden_);
    d_weight_.resize(dy.rows(), k_);
#pragma omp parallel for schedule(static)
    for (Index t = 0; t < dy.rows(); ++t) {
      for (Index i = 0; i < k_; ++i) {
        const Index s = slot_of(t * k_ + i);
        d_out_.row(s) = weight_of(t * k_ + i) * dy.row(t);
        d_weight_(t, i) = dy.row(t).dot(out_.row(s));
      }
    }
    routing_.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      const auto d_out = d_out_.middleRows(begin, rows);
      const auto x_e = x_.middleRows(begin, rows);
      products_.nn(d_out, down_[e], d_hidden_out_.middleRows(begin, rows), false);
      products_.add_tn(d_out, hidden_.middleRows(begin, rows), d_down_[e]);
#pragma omp parallel for schedule(static)
      for (Index s = begin; s < begin + rows; ++s) {
        const auto g = g_.row(s).array();
        const auto d = d_hidden_out_.row(s).array();
        // d_u_ holds the sigmoid of g until it is no longer needed.
        d_u_.row(s).array() = g.logistic();
        const auto sigmoid = d_u_.row(s).array();
        d_g_.row(s).array() = d * u_.row(s).array() * sigmoid * (1.0F + g * (1.0F - sigmoid));
        d_u_.row(s).array() *= d * g;
      }
      products_.add_tn(d_g_.middleRows(begin, rows), x_e, d_gate_[e]);
      products_.add_tn(d_u_.middleRows(begin, rows), x_e, d_up_[e]);
      products_.nn(d_g_.middleRows(begin, rows), gate_[e], d_x_.middleRows(begin, rows), false);
      products_.nn(d_u_.middleRows(begin, rows), up_[e], d_x_.middleRows(begin, rows), true);
    });

    d_logits_.setZero(dy.rows(), router_.rows());
    dx_.resize(dy.rows(), d_model_);
#pragma omp parallel for schedule(static)
    for (Index t = 0; t < dy.rows(); ++t) {
      // With g the weights, p the softmax over all experts, or over the chosen ones if
      // renormalised: dz_e = [e chosen] g_e dg_e - p_e sum_j g_j dg_j.
      float sum = 0.0F;
      for (Index i = 0; i < k_; ++i) sum += weight_of(t * k_ + i) * d_weight_(t, i);
      if (!renormalise_) {
        const auto p = (logits_.row(t).array() - logits_.row(t).maxCoeff()).exp();
        d_logits_.row(t) = -sum / p.sum() * p;
      }
      dx_.row(t).setZero();
      for (Index i = 0; i < k_; ++i) {
        const Index a = t * k_ + i;
        const Index e = routing_.expert[static_cast<std::size_t>(a)];
        d_logits_(t, e) += weight_of(a) * (d_weight_(t, i) - (renormalise_ ? sum : 0.0F));
        dx_.row(t) += d_x_.row(slot_of(a));
      }
    }
    products_.add_tn(d_logits_, x, d_router_);
    products_.nn(d_logits_, router_, dx_, true);
  }

  Matrix<float> x_;                         // [slots, d_model]
  Matrix<float> g_, u_, hidden_;            // [slots, d_hidden]
  Matrix<float> d_out_, d_x_;               // [slots, d_model]
  Matrix<float> d_hidden_out_, d_g_, d_u_;  // [slots, d_hidden]
  Matrix<float> d_weight_;                  // [tokens, k]
  Matrix<float> d_logits_;                  // [tokens, experts]
  Matrix<float> dx_;                        // [tokens, d_model]
  Matrix<float> d_router_;
  std::vector<Matrix<float>> d_gate_, d_up_, d_down_;
};

}  // namespace weir::bench
