// SPDX-License-Identifier: MIT
/// \file
/// The best groups of experts, and the best experts in each: two-level mixtures (Shazeer et al.
/// 2017; Mesh TensorFlow).
#pragma once

#include <concepts>
#include <string_view>

#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/router/group_count.hpp>
#include <weir/moe/routing.hpp>
#include <weir/moe/selector/k_best.hpp>
#include <weir/ops/logsumexp.hpp>
#include <weir/ops/softmax.hpp>
#include <weir/ops/top_k.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// Settings of HierarchicalTopK.
struct HierarchicalTopKConfig {
  Index groups = 2;         ///< How many groups the experts are cut into.
  Index group_k = 2;        ///< How many groups a token has.
  Index k = 2;              ///< How many experts it has in the first of them.
  Index rest_k = 1;         ///< How many it has in each of the others.
  bool renormalise = true;  ///< On by default, as in Shazeer et al. and Mesh TensorFlow.
};

/// Chooses groups, then experts in them, with the product of the two levels' weights:
///
///     P_G = sum_{e in G} p_e,    q_e = p_e / P_G,    p = softmax(z)
///     S = the group_k groups G of largest P,    S_G = the experts of largest q in G
///     g_e = u_G v_e,    u_G = P_G / sum_{H in S} P_H,    v_e = q_e / sum_{j in S_G} q_j
///
/// or, not renormalised, u_G = P_G and v_e = q_e, so that g_e = p_e. The first group has `k`
/// experts, each of the others `rest_k`. The groups are neighbours, all of the same size. P and q
/// are the softmaxes of the two levels of a HierarchicalRouter; another router's logits do as well.
/// Equal values: the lowest index first. The choice is constant to the derivative. Renormalised, a
/// single group has a constant u, a single expert of a group a constant v, through which the task's
/// loss does not reach that level.
///
/// Assignments are listed group by group, best group first, and in a group best expert first:
/// rank-major capacity serves the first expert of the first group before all others, as Mesh
/// TensorFlow's importance does; there what comes after that is served in the order of the tokens
/// (DropOrder has no such order), and the groups have capacities of their own. Causal.
///
/// With k = rest_k this is the gate of Shazeer et al. 2017 (arXiv:1701.06538, appendix B, eq. 12);
/// ImportanceLoss of its weights is their Importance_H (eq. 13), HierarchicalLoadLoss has their
/// Load_H (eq. 14). The defaults are Mesh TensorFlow's top-2 of top-2
/// (mesh_tensorflow/transformer/moe.py, transformer_moe_layer_v2), which sends a token to one
/// expert of its second group, and adds 1e-9 to each denominator.
template <std::floating_point T>
class HierarchicalTopK : public SelectorBase<T> {
 public:
  using typename SelectorBase<T>::Cache;

  explicit HierarchicalTopK(HierarchicalTopKConfig config = {}) : config_(config) {}

  /// How many experts a token has.
  Index assignments() const { return config_.k + (config_.group_k - 1) * config_.rest_k; }

  /// \throws ConfigError  unless groups divides the experts, 1 <= group_k <= groups and both k and
  ///                      rest_k are from 1 to experts / groups.
  void check(Index experts) const;

  /// \throws ConfigError  if the router has groups, and another number of them.
  template <class R>
  void check_router(const R& router) const {
    expect_groups_of(router, "HierarchicalTopK", config_.groups);
  }

  /// \param logits   [tokens, experts]
  /// \throws NonFiniteError  if a logit of a real token is not finite.
  /// \throws ConfigError     as `check`; if a token is allowed too few experts in its groups.
  void forward(MatrixIn<T> logits, const Pass& pass, Routing<T>& routing, Cache& /*cache*/) const {
    check(logits.cols());
    routing.begin("HierarchicalTopK", logits, pass, assignments());
    routing.assign_each(assignments());
    routing.rows.for_each_real(32 * routing.experts(), [&](Index t) { choose(t, routing); });
    expect_allowed_chosen("HierarchicalTopK", routing);
  }

  void backward(const Routing<T>& routing, RoutingGradient<T>& gradient, Cache& /*cache*/) const;

  const HierarchicalTopKConfig& config() const { return config_; }

 private:
  static void expect_up_to(std::string_view name, Index value, std::string_view most_name,
                           Index most) {
    if (value >= 1 && value <= most) return;
    throw_error<ConfigError>("HierarchicalTopK: ", name, " = ", value, ", expected 1 <= ", name,
                             " <= ", most_name, " = ", most);
  }

  /// Calls `body(first, count)` for the assignments of each group of a token, best first.
  template <class Body>
  void for_each_group(Body&& body) const {
    body(Index(0), config_.k);
    for (Index i = 0; i < config_.group_k - 1; ++i) {
      body(config_.k + i * config_.rest_k, config_.rest_k);
    }
  }

  /// Adds what reaches dz through renormalised weights, where u is a softmax of log P over S, v one
  /// of z over S_G, and d log P_G / dz_e = q_e:
  ///
  ///     du_G = m_G = sum_e v_e dg_e,    dv_e = u_G dg_e
  void add_renormalised_backward(const T* p, const Index* chosen, const T* weight,
                                 const T* d_weight, Index experts, T* dz) const;

  void choose(Index t, Routing<T>& routing) const;

  HierarchicalTopKConfig config_;
};

template <std::floating_point T>
void HierarchicalTopK<T>::check(Index experts) const {
  expect_at_least<Index>("HierarchicalTopK", "groups", config_.groups, 1);
  if (experts % config_.groups != 0) {
    throw_error<ConfigError>("HierarchicalTopK: groups = ", config_.groups,
                             ", expected a divisor of experts = ", experts);
  }
  expect_up_to("group_k", config_.group_k, "groups", config_.groups);
  expect_up_to("k", config_.k, "experts / groups", experts / config_.groups);
  expect_up_to("rest_k", config_.rest_k, "experts / groups", experts / config_.groups);
}

template <std::floating_point T>
void HierarchicalTopK<T>::backward(const Routing<T>& routing, RoutingGradient<T>& gradient,
                                   Cache& /*cache*/) const {
  const Index experts = routing.experts();
  routing.rows.for_each_real(16 * experts, [&](Index t) {
    const T* const p = routing.probabilities.row(t).data();
    T* const dp = gradient.probabilities.row(t).data();
    T* const dz = gradient.logits.row(t).data();
    const Index* const chosen = routing.expert.data() + routing.first(t);
    const T* const weight = routing.weight.data() + routing.first(t);
    const T* const d_weight = gradient.weights.data() + routing.first(t);
    if (config_.renormalise) {
      add_renormalised_backward(p, chosen, weight, d_weight, experts, dz);
    } else {
      for (Index i = 0; i < assignments(); ++i) dp[chosen[i]] += d_weight[i];
    }
    add_softmax_backward_row<T>(span_of(p, experts), span_of(dp, experts), span_of(dz, experts));
  });
}

template <std::floating_point T>
void HierarchicalTopK<T>::add_renormalised_backward(const T* p, const Index* chosen,
                                                    const T* weight, const T* d_weight,
                                                    Index experts, T* dz) const {
  const Index size = experts / config_.groups;
  T mean = T(0);
  for (Index i = 0; i < assignments(); ++i) mean += weight[i] * d_weight[i];
  for_each_group([&](Index first, Index count) {
    T u = T(0);
    T m = T(0);
    for (Index i = first; i < first + count; ++i) {
      u += weight[i];
      m += weight[i] * d_weight[i];
    }
    if (!(u > T(0))) return;  // No weight that a gradient could go through.
    m /= u;
    for (Index i = first; i < first + count; ++i) dz[chosen[i]] += weight[i] * (d_weight[i] - m);
    const Index begin = chosen[first] / size * size;
    const T sum = loops::sum(size, p + begin);
    if (sum > T(0)) loops::add_scaled(size, u * (m - mean) / sum, p + begin, dz + begin);
  });
}

template <std::floating_point T>
void HierarchicalTopK<T>::choose(Index t, Routing<T>& routing) const {
  const Index experts = routing.experts();
  const Index groups = config_.groups;
  const Index group_k = config_.group_k;
  const Index size = experts / groups;
  const T* const z = routing.logits.row(t).data();
  T* const p = routing.probabilities.row(t).data();
  Index* const chosen = routing.expert.data() + routing.first(t);
  T* const weight = routing.weight.data() + routing.first(t);
  softmax_row<T>(span_of(z, experts), span_of(p, experts));

  auto& space = ThreadSpace<T, HierarchicalTopK>::of_this_thread();
  space.reserve(groups + group_k);
  T* const log_group = space.take(groups);
  T* const u = space.take(group_k);
  auto& indices = ThreadSpace<Index, HierarchicalTopK>::of_this_thread();
  indices.reserve(group_k);
  Index* const best = indices.take(group_k);
  for (Index g = 0; g < groups; ++g) log_group[g] = logsumexp<T>(span_of(z + g * size, size));
  top_k<T>(span_of(log_group, groups), span_of(best, group_k));
  for (Index i = 0; i < group_k; ++i) u[i] = log_group[best[i]];
  softmax_row<T>(span_of(u, group_k), span_of(u, group_k));

  Index rank = 0;
  for_each_group([&](Index first, Index count) {
    const Index start = best[rank] * size;
    top_k<T>(span_of(z + start, size), span_of(chosen + first, count));
    for (Index i = first; i < first + count; ++i) {
      chosen[i] += start;
      weight[i] = config_.renormalise ? z[chosen[i]] : p[chosen[i]];
    }
    if (config_.renormalise) {
      softmax_row<T>(span_of(weight + first, count), span_of(weight + first, count));
      for (Index i = first; i < first + count; ++i) weight[i] *= u[rank];
    }
    ++rank;
  });
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::HierarchicalTopK<float>;
extern template class weir::HierarchicalTopK<double>;
#endif
