// SPDX-License-Identifier: MIT
/// \file
/// Load-balancing loss over the batch of all ranks.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <utility>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/load_count.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/routing.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/exchange.hpp>

namespace weir {

/// A GlobalBatchLoss whose counts are those of all ranks (Qiu et al. 2025, arXiv:2501.11873,
/// section 3, where they are summed over data-parallel groups):
///
///     loss of a rank = coefficient * experts * sum_e f_e * P_e
///
/// f_e is that of the micro-batches of all ranks in this step so far, with the one at hand; P_e is
/// the mean probability of this rank's tokens in it. With each rank's share of the tokens as
/// `Pass::aux_scale`, the losses of the ranks add up to that of one process with all their tokens.
/// Ranks tell each other [experts] counts in each forward and in each backward pass.
template <std::floating_point T>
class RankBatchLoss : public BalancerBase {
 public:
  static constexpr std::string_view kName = "global_batch";

  struct Cache {
    typename GlobalBatchLoss<T>::Cache inner;
    GlobalBatchLoss<T> with_others = GlobalBatchLoss<T>();
    Exchange exchange;
    RowVector<double> load;
    List<double> all;
  };

  /// \throws ConfigError  if the coefficient is negative, or there is no channel.
  RankBatchLoss(GlobalBatchLossConfig config, std::shared_ptr<Channel> channel)
      : loss_(config), channel_(std::move(channel)) {
    if (channel_ == nullptr) {
      throw_error<ConfigError>("RankBatchLoss: channel = null, expected a Channel");
    }
  }

  void check() const { loss_.check(); }

  /// \return         The loss, already scaled by the coefficient.
  double forward(const Routing<T>& routing, Cache& cache) const {
    cache.with_others = loss_;
    sum_others(routing, cache);
    cache.with_others.add_load(cache.load);
    return cache.with_others.forward(routing, cache.inner);
  }

  void backward(const Routing<T>& routing, double scale, RoutingGradient<T>& gradient,
                Cache& cache) const {
    loss_.backward(routing, scale, gradient, cache.inner);
  }

  void observe(const Routing<T>& routing) {
    Cache cache;
    sum_others(routing, cache);
    loss_.observe(routing);
    loss_.add_load(cache.load);
  }

  template <class S>
  void update(S& selector) {
    if (loss_.load().size() > 0) loss_.update(selector);
  }
  void discard_self() {
    if (loss_.load().size() > 0) loss_.discard_self();
  }

  /// What has been counted in this step, on all ranks; empty before the first pass.
  const RowVector<double>& load() const { return loss_.load(); }
  const GlobalBatchLossConfig& config() const { return loss_.config(); }

 private:
  /// Sets `cache.load` to what the other ranks count in their routings.
  void sum_others(const Routing<T>& routing, Cache& cache) const {
    const Index experts = routing.experts();
    set_zero(cache.load, experts);
    add_counted_load(loss_.config().count, routing, 0, routing.tokens(), cache.load);
    all_gather<double>(*channel_, cache.exchange, "loads of the batch",
                       span_of(std::as_const(cache.load).data(), experts), cache.all);
    cache.load.setZero();
    for (int r = 0; r < channel_->size(); ++r) {
      for (Index e = 0; r != channel_->rank() && e < experts; ++e) {
        cache.load[e] += cache.all[r * experts + e];
      }
    }
  }

  GlobalBatchLoss<T> loss_;
  std::shared_ptr<Channel> channel_;
};

}  // namespace weir
