// SPDX-License-Identifier: MIT
/// \file
/// Experts that compute nothing, or next to nothing, behind those of a bank: MoE++, LongCat-Flash.
#pragma once

#include <cmath>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/init.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/bank_wrapper.hpp>
#include <weir/ops/lanes.hpp>
#include <weir/ops/rows.hpp>
#include <weir/ops/vector_loops.hpp>

namespace weir {

/// How many experts of each kind stand behind those of the bank, in this order.
struct WithZeroExpertsConfig {
  Index zero = 0;      ///< E(x) = 0
  Index identity = 0;  ///< E(x) = x; LongCat-Flash has these alone.
  Index constant = 0;  ///< E(x) = a_1 x + a_2 v
};

/// The experts of `Bank`, and zero-computation experts behind them, which tokens choose like others
/// and which cost nothing or little: a token that needs less computation gets less.
///
///     E(x) = 0                                                    zero
///     E(x) = x                                                    identity (copy)
///     E(x) = a_1 x + a_2 v,  [a_1, a_2] = softmax(W_c x)          constant
///
/// W_c [2, d_model] and v [1, d_model] of each constant expert are trained, everything has its
/// exact gradient, and the weight of a zero expert has the gradient zero.
/// (Jin et al. 2024, arXiv:2410.07348, eq. 3-5; identity alone: Meituan 2025, arXiv:2509.01322.)
template <ExpertBank Bank>
class WithZeroExperts : public BankWrapper<Bank> {
 public:
  using typename BankWrapper<Bank>::T;
  using BankWrapper<Bank>::d_in;
  using BankWrapper<Bank>::d_out;

  struct Cache : BankWrapper<Bank>::Cache {
    Dispatch<T> dispatch;            ///< The slots of the bank's experts.
    Matrix<T> x;                     ///< [tokens, d_model], if the pass trains.
    Scratch<T> share;                ///< [slots of constant experts, 2], a_1 and a_2.
    Scratch<T> d_logit, d_constant;  ///< [slots of constant experts, 1], dL/d(W_c x)_1 and w a_2.
    Matrix<T> y, dx;
  };

  /// W_c from `switch_init` and v from N(0, 1).
  /// \throws ConfigError  if a number is negative, or if identity or constant experts stand behind
  ///                      a bank that changes the width.
  WithZeroExperts(Bank bank, Rng& rng, WithZeroExpertsConfig config = {})
      : BankWrapper<Bank>(std::move(bank)), config_(config) {
    check();
    for (Index e = 0; e < config_.constant; ++e) {
      mix_.push_back({switch_init<T>(2, d_in(), rng, 1.0)});
      constant_.push_back({normal_init<T>(1, d_in(), 1.0, rng)});
    }
  }

  /// Without constant experts, which have weights.
  /// \throws ConfigError  as above, or if there are to be constant experts.
  explicit WithZeroExperts(Bank bank, WithZeroExpertsConfig config = {})
      : WithZeroExperts(std::move(bank), {}, {}, config) {}

  /// From existing weights, one of each per constant expert.
  /// \param mix       W_c, [2, d_model]
  /// \param constant  v, [1, d_model]
  /// \throws ConfigError  as above, or if there are not as many weights as constant experts.
  /// \throws ShapeError   if a weight has another shape.
  WithZeroExperts(Bank bank, std::vector<Matrix<T>> mix, std::vector<Matrix<T>> constant,
                  WithZeroExpertsConfig config)
      : BankWrapper<Bank>(std::move(bank)), config_(config) {
    check();
    const auto count = static_cast<std::size_t>(config_.constant);
    if (mix.size() != count || constant.size() != count) {
      throw_error<ConfigError>("WithZeroExperts: ", mix.size(), " mix and ", constant.size(),
                               " constant weights, expected ", count,
                               " of each (one per constant expert)");
    }
    for (std::size_t e = 0; e < count; ++e) {
      const std::string which = "[" + std::to_string(e) + "]";
      expect_shape("WithZeroExperts", "mix" + which, mix[e], 2, d_in());
      expect_shape("WithZeroExperts", "constant" + which, constant[e], 1, d_in());
    }
    for (std::size_t e = 0; e < count; ++e) {
      mix_.push_back({std::move(mix[e])});
      constant_.push_back({std::move(constant[e])});
    }
  }

  /// The numbers of its experts are not those of the bank's.
  void remap_experts(const ExpertMap& map) = delete;

  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const {
    expect_shape("WithZeroExperts::forward", "x", x, dispatch.tokens(), d_in());
    if (pass.training) copy_rows<T>(x, cache.x);
    cache.dispatch.build_part(dispatch, bank_.experts(), [](Index, Index) { return true; });
    copy_rows<T>(bank_.forward(x, cache.dispatch, pass, cache.inner), cache.y);

    const Index first = dispatch.begin(first_constant());
    auto share = cache.share.reshape(dispatch.slots() - first, 2);
    for_each_constant(dispatch, [&](std::size_t e, Index begin, Index rows) {
      const T* const mix = mix_[e].value.data();
      parallel_rows(rows, 4 * d_in(), [&](Index from, Index to) {
        for (Index s = begin + from; s < begin + to; ++s) {
          // The softmax of two is a sigmoid of their difference.
          const T* const token = &x.coeffRef(dispatch.token(s), 0);
          const T difference =
              loops::dot<T>(d_in(), mix, token) - loops::dot<T>(d_in(), mix + d_in(), token);
          share(s - first, 0) = T(1) / (T(1) + std::exp(-difference));
          share(s - first, 1) = T(1) / (T(1) + std::exp(difference));
        }
      });
    });
    for_each_cheap_slot(dispatch, [&](Index t, Index s) {
      const T weight = dispatch.weight(s);
      if (s < first) {
        loops::add_scaled<T>(d_in(), weight, &x.coeffRef(t, 0), &cache.y(t, 0));
      } else {
        const Parameter<T>& constant = constant_[expert_of(dispatch, s)];
        loops::add_scaled<T>(d_in(), weight * share(s - first, 0), &x.coeffRef(t, 0),
                             &cache.y(t, 0));
        loops::add_scaled<T>(d_in(), weight * share(s - first, 1), constant.value.data(),
                             &cache.y(t, 0));
      }
    });
    return cache.y;
  }

  /// With h = dy . x, c = dy . v, and w the weight of a constant expert:
  ///
  ///     dw = a_1 h + a_2 c,   dz = w a_1 a_2 (h - c),   dx += w a_1 dy + dz (W_c1 - W_c2)
  ///     dW_c1 += dz x,   dW_c2 -= dz x,   dv += w a_2 dy
  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache) {
    copy_rows<T>(bank_.backward(dy, cache.dispatch, d_weight, cache.inner), cache.dx);
    for (Index s = dispatch.begin(bank_.experts()); s < dispatch.begin(first_identity()); ++s) {
      d_weight[static_cast<std::size_t>(dispatch.assignment(s))] = T(0);
    }

    const Index first = dispatch.begin(first_constant());
    const auto share = cache.share.view();
    auto d_logit = cache.d_logit.reshape(dispatch.slots() - first, 1);
    auto d_constant = cache.d_constant.reshape(dispatch.slots() - first, 1);
    for_each_cheap_slot(dispatch, [&](Index t, Index s) {
      const T* const d = &dy.coeffRef(t, 0);
      const T weight = dispatch.weight(s);
      T& dw = d_weight[static_cast<std::size_t>(dispatch.assignment(s))];
      const T along_x = loops::dot<T>(d_in(), d, &cache.x(t, 0));
      if (s < first) {
        dw = along_x;
        loops::add_scaled<T>(d_in(), weight, d, &cache.dx(t, 0));
        return;
      }
      const Index i = s - first;
      const std::size_t e = expert_of(dispatch, s);
      const T along_constant = loops::dot<T>(d_in(), d, constant_[e].value.data());
      dw = share(i, 0) * along_x + share(i, 1) * along_constant;
      d_logit(i, 0) = weight * share(i, 0) * share(i, 1) * (along_x - along_constant);
      d_constant(i, 0) = weight * share(i, 1);
      loops::add_scaled<T>(d_in(), weight * share(i, 0), d, &cache.dx(t, 0));
      loops::add_scaled<T>(d_in(), d_logit(i, 0), mix_[e].value.data(), &cache.dx(t, 0));
      loops::add_scaled<T>(d_in(), -d_logit(i, 0), mix_[e].value.data() + d_in(), &cache.dx(t, 0));
    });
    for_each_constant(dispatch, [&](std::size_t e, Index begin, Index rows) {
      const auto of_x = [&](T sign) {
        return [&, sign](Index r, Index col, Index count) -> Lanes<T> {
          const T factor = sign * d_logit(begin + r - first, 0);
          return factor * load_lanes<T>(&cache.x(dispatch.token(begin + r), col), count);
        };
      };
      T* const d_mix = mix_[e].gradient().data();
      add_over_rows<T>(rows, d_in(), d_mix, of_x(T(1)));
      add_over_rows<T>(rows, d_in(), d_mix + d_in(), of_x(T(-1)));
      add_over_rows<T>(rows, d_in(), constant_[e].gradient().data(),
                       [&](Index r, Index col, Index count) -> Lanes<T> {
                         const T factor = d_constant(begin + r - first, 0);
                         const T* const d = &dy.coeffRef(dispatch.token(begin + r), col);
                         return factor * load_lanes<T>(d, count);
                       });
    });
    return cache.dx;
  }

  /// The members of the bank under its names, and `e.mix` and `e.constant` of constant experts.
  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.bank());
    for (std::size_t e = 0; e < self.mix_.size(); ++e) {
      const std::string name = std::to_string(self.first_constant() + static_cast<Index>(e));
      visit(name + ".mix", self.mix_[e]);
      visit(name + ".constant", self.constant_[e]);
    }
  }

  /// The number of all experts, of the bank and behind it.
  Index experts() const { return first_constant() + config_.constant; }

  const WithZeroExpertsConfig& config() const { return config_; }

 private:
  using BankWrapper<Bank>::bank_;

  void check() const {
    expect_at_least<Index>("WithZeroExperts", "zero", config_.zero, 0);
    expect_at_least<Index>("WithZeroExperts", "identity", config_.identity, 0);
    expect_at_least<Index>("WithZeroExperts", "constant", config_.constant, 0);
    if (config_.identity + config_.constant > 0 && d_in() != d_out()) {
      throw_error<ConfigError>("WithZeroExperts: the bank yields ", d_out(), " features, expected ",
                               d_in(), " beside identity and constant experts");
    }
  }

  Index first_identity() const { return bank_.experts() + config_.zero; }
  Index first_constant() const { return first_identity() + config_.identity; }

  /// Calls `body(e, first slot, slots)` for each constant expert that has any, counted from 0.
  template <class Body>
  void for_each_constant(const Dispatch<T>& dispatch, Body&& body) const {
    for (Index e = 0; e < config_.constant; ++e) {
      const Index expert = first_constant() + e;
      if (dispatch.rows(expert) == 0) continue;
      body(static_cast<std::size_t>(e), dispatch.begin(expert), dispatch.rows(expert));
    }
  }

  /// Calls `body(token, slot)` for each slot of identity and constant experts, the tokens divided
  /// among threads.
  template <class Body>
  void for_each_cheap_slot(const Dispatch<T>& dispatch, Body&& body) const {
    const Index first = dispatch.begin(first_identity());
    parallel_rows(dispatch.tokens(), 8 * d_in(), [&](Index begin, Index end) {
      for (Index t = begin; t < end; ++t) {
        for (const Index s : dispatch.slots_of(t)) {
          if (s >= first) body(t, s);
        }
      }
    });
  }

  /// Which constant expert, counted from 0, has the slot.
  std::size_t expert_of(const Dispatch<T>& dispatch, Index slot) const {
    Index e = first_constant();
    while (slot >= dispatch.end(e)) ++e;
    return static_cast<std::size_t>(e - first_constant());
  }

  WithZeroExpertsConfig config_;
  std::vector<Parameter<T>> mix_, constant_;
};

}  // namespace weir
