// SPDX-License-Identifier: MIT
/// \file
/// A linear map for each expert, applied to the packed slots: what banks of experts are made of.
#pragma once

#include <cstddef>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/storage.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>
#include <weir/kernels/weight.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/nn/adapted.hpp>
#include <weir/ops/rows.hpp>

namespace weir {

/// y_s = x_s W_e^T + b_e for each slot s of each expert e, W_e [d_out, d_in] and b_e [1, d_out], or
/// none for all experts.
template <class T>
class ExpertLinear {
 public:
  /// The products of one pass.
  struct Products {
    std::vector<Product<T>> plain;
    std::vector<kernels::PackedTo<T>> packed;
  };

  ExpertLinear() = default;

  /// Adds an expert.
  /// \param weight   [d_out, d_in], the same shape for each expert.
  /// \param bias     [1, d_out], or empty for all experts.
  void add(Matrix<T> weight, Matrix<T> bias = {}) {
    weight_.emplace_back(std::move(weight));
    if (bias.size() != 0) bias_.push_back({std::move(bias)});
  }

  /// \param x        [slots, d_in]
  /// \param y        [slots, d_out]
  /// \param adapted  Of this map alone, for `backward`.
  void forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass, MatrixOut<T> y,
               Products& products, Adapted<T>& adapted) const;

  /// Shows the rows of each expert, see `Pass::show`.
  /// \param x        [slots, d_in]
  void show(const Pass& pass, MatrixIn<T> x, const Dispatch<T>& dispatch) const {
    if (pass.inputs == nullptr) return;
    dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
      pass.show<T>(weight_[e].parameter(), x.middleRows(begin, rows));
    });
  }

  /// dx = dy W, or is increased by it; adds to the gradients of W and b. The gradients of experts
  /// without slots are left alone.
  /// \param dy       [slots, d_out]
  /// \param x        [slots, d_in], as given to `forward`.
  /// \param dx       [slots, d_in]
  void backward(MatrixIn<T> dy, MatrixIn<T> x, const Dispatch<T>& dispatch, MatrixOut<T> dx,
                bool accumulate, Products& products, Adapted<T>& adapted);

  /// Stores the weights of all `linears` of a bank; biases stay parameters. If memory runs out,
  /// nothing has changed.
  static void set_storage(std::initializer_list<ExpertLinear*> linears, Storage storage);

  /// Changes the experts.
  /// \param cold     Makes the weight of a cold expert; its bias is zero.
  template <class Cold>
  void remap_experts(const ExpertMap& map, Cold&& cold) {
    std::vector<kernels::Weight<T>> weights = weight_;
    std::vector<Parameter<T>> biases = bias_;
    map.rearrange(weights, [&] {
      kernels::Weight<T> weight(cold(d_out(), d_in()));
      weight.parameter().rounded = weight_[0].parameter().rounded;  // Trained like the others.
      return weight;
    });
    if (!biases.empty()) {
      map.rearrange(biases, [&] { return Parameter<T>{Matrix<T>::Zero(1, d_out())}; });
    }
    weight_ = std::move(weights);
    bias_ = std::move(biases);
  }

  Storage storage() const { return weight_[0].storage(); }

  /// Members `name` and, if there is one, `name_bias` of expert `e`, under the name of the expert.
  template <class Self, class Visit>
  static void visit(Self& self, std::size_t e, const std::string& name, Visit& visit) {
    const std::string full = std::to_string(e) + "." + name;
    visit(full, self.weight_[e].parameter());
    if (!self.bias_.empty()) visit(full + "_bias", self.bias_[e]);
  }

  Index experts() const { return static_cast<Index>(weight_.size()); }
  Index d_in() const { return weight_[0].cols(); }
  Index d_out() const { return weight_[0].rows(); }

 private:
  /// How much memory the packed weights of all experts take.
  std::size_t packed_bytes(Storage storage) const {
    if (storage == Storage::kTrainable) return 0;
    return weight_.size() * kernels::PackedWeight<T>::bytes(d_out(), d_in(), storage);
  }

  std::vector<kernels::Weight<T>> weight_;
  std::vector<Parameter<T>> bias_;  // One per expert, or none.
};

template <class T>
void ExpertLinear<T>::forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                              MatrixOut<T> y, Products& products, Adapted<T>& adapted) const {
  products.plain.clear();
  products.packed.clear();
  adapted.begin(pass);
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    auto y_e = y.middleRows(begin, rows);
    adapted.add(weight_[e].parameter(), x.middleRows(begin, rows), y_e);
    if (weight_[e].storage() == Storage::kTrainable) {
      products.plain.push_back(
          forward_product<T>(x.middleRows(begin, rows), weight_[e].parameter(), y_e));
    } else {
      products.packed.push_back({&weight_[e].packed(), begin, rows, y_e.data(), y.outerStride()});
    }
  });
  multiply<T>(products.plain);
  kernels::multiply_packed<T>(x, products.packed);
  adapted.forward(pass);
  if (bias_.empty()) return;
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    add_to_each_row<T>(bias_[e].value.data(), y.middleRows(begin, rows));
  });
}

template <class T>
void ExpertLinear<T>::backward(MatrixIn<T> dy, MatrixIn<T> x, const Dispatch<T>& dispatch,
                               MatrixOut<T> dx, bool accumulate, Products& products,
                               Adapted<T>& adapted) {
  products.plain.clear();
  adapted.begin_backward();
  dispatch.for_each_expert([&](std::size_t e, Index begin, Index rows) {
    const auto dy_e = dy.middleRows(begin, rows);
    const auto x_e = x.middleRows(begin, rows);
    auto dx_e = dx.middleRows(begin, rows);
    LinearParameter<T>& weight = weight_[e].parameter();
    products.plain.push_back(input_gradient_product<T>(dy_e, weight_[e].value(), dx_e, accumulate));
    if (weight.takes_gradient()) {
      products.plain.push_back(weight_gradient_product<T>(dy_e, x_e, weight));
    }
    adapted.add_backward(weight, dy_e, x_e, dx_e);
    if (!bias_.empty()) add_rows_to<T>(dy_e, bias_[e].gradient().data());
    if (weight.has_value()) return;
    multiply<T>(products.plain);  // Before another weight takes its value's place.
    products.plain.clear();
  });
  multiply<T>(products.plain);
  adapted.backward();
}

template <class T>
void ExpertLinear<T>::set_storage(std::initializer_list<ExpertLinear*> linears, Storage storage) {
  const Storage before = (*linears.begin())->storage();
  if (storage == before) return;
  // One memory for all: the weights of a small expert fill no huge page.
  std::size_t bytes = 0;
  for (const ExpertLinear* linear : linears) bytes += linear->packed_bytes(storage);
  SharedMemory memory(bytes);
  if (before == Storage::kTrainable) {
    // Takes no further memory, and gives back that of each weight when it is packed.
    for (ExpertLinear* linear : linears) {
      for (kernels::Weight<T>& weight : linear->weight_) weight.set_storage(storage, &memory);
    }
    return;
  }
  // Works on copies, which share what is packed.
  std::vector<std::vector<kernels::Weight<T>>> changed;
  for (const ExpertLinear* linear : linears) changed.push_back(linear->weight_);
  for (auto& weights : changed) {
    for (kernels::Weight<T>& weight : weights) weight.set_storage(storage, &memory);
  }
  auto next = changed.begin();
  for (ExpertLinear* linear : linears) linear->weight_.swap(*next++);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::ExpertLinear<float>;
extern template class weir::ExpertLinear<double>;
#endif
