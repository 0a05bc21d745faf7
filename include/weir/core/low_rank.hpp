// SPDX-License-Identifier: MIT
/// \file
/// Low-rank adapters, and the weights of linear maps, which may have them.
#pragma once

#include <cmath>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// A low-rank adapter of a weight W [out, in], which stays as it is beside it:
///
///     y = x W^T + scale drop(x) A^T B^T,    A [rank, in],  B [out, rank]
///     scale = alpha / rank, or alpha / sqrt(rank) if rank-stabilised
///
/// drop multiplies each number of x by 0 with probability `dropout`, else by 1 / (1 - dropout), in
/// training. (LoRA: Hu et al. 2021, arXiv:2106.09685, section 4.1; the rank-stabilised scale:
/// Kalajdzievski 2023, arXiv:2312.03732, eq. 3.)
template <class T>
struct LowRank {
  std::string name;   ///< Which adapter of the model this is a part of; see Pass::adapters.
  Parameter<T> a, b;  ///< A and B.
  double alpha = 1.0;
  bool rank_stabilised = false;
  double dropout = 0.0;
  Buffer<T> merged = {};  ///< [1, 1], not 0 while W has it in itself.

  Index rank() const { return a.value.rows(); }
  double scale() const {
    const auto rank_of_a = static_cast<double>(rank());
    return alpha / (rank_stabilised ? std::sqrt(rank_of_a) : rank_of_a);
  }
  bool is_merged() const { return merged.value.size() > 0 && merged.value(0, 0) != T(0); }
};

/// \throws ConfigError  if an adapter cannot have that name: it is part of names of parameters, and
///                      matched by patterns.
inline void check_adapter_name(std::string_view where, std::string_view name) {
  if (!name.empty() && name.find_first_of(".*/") == std::string::npos) return;
  throw_error<ConfigError>(where, ": name = '", name,
                           "', expected a name without '.', '*' and '/'");
}

/// The weight of a linear map [out, in], whose layer computes its adapters too. Which of them take
/// part in a pass says Pass::adapters.
///
/// A frozen one gets no gradient, so that what is not trained costs no more than the gradient of
/// its input. Where the layer stores it for inference, the value is empty.
template <class T>
struct LinearParameter : Parameter<T> {
  std::vector<LowRank<T>> adapters = {};
  Index stored_rows = 0, stored_cols = 0;  ///< The shape of a value that is stored for inference.

  LinearParameter() = default;
  LinearParameter(Matrix<T> v) {  // NOLINT(google-explicit-constructor): as Parameter is made.
    this->value = std::move(v);
  }

  Index d_out() const { return has_value() ? this->value.rows() : stored_rows; }
  Index d_in() const { return has_value() ? this->value.cols() : stored_cols; }
  bool has_value() const { return this->value.size() > 0; }
  bool takes_gradient() const { return has_value() && !this->frozen; }

  /// The adapter of that name; null if there is none.
  LowRank<T>* find(std::string_view name) {
    for (LowRank<T>& adapter : adapters) {
      if (adapter.name == name) return &adapter;
    }
    return nullptr;
  }

  /// Forgets value and gradient, which are stored for inference from now on; keeps the adapters.
  void forget_value() {
    const Index rows_before = d_out();
    const Index cols_before = d_in();
    static_cast<Parameter<T>&>(*this) = {};
    stored_rows = rows_before;
    stored_cols = cols_before;
  }
};

/// The weight of a linear map under its checkpoint name.
template <class T>
struct NamedLinear {
  std::string name;
  LinearParameter<T>* weight;
};

}  // namespace weir
