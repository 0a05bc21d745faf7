// SPDX-License-Identifier: MIT
/// \file
/// The weights of experts that are gated networks, in any storage.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/init.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/random.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/thread_space.hpp>
#include <weir/core/types.hpp>
#include <weir/kernels/product.hpp>
#include <weir/moe/experts/expert_source.hpp>
#include <weir/moe/experts/expert_travel.hpp>
#include <weir/nn/adapted.hpp>
#include <weir/nn/packed_glu.hpp>

namespace weir {

/// Wg_e, Wu_e [d_hidden, d_in] and Wd_e [d_out, d_hidden] of each expert e of a GluBank, which says
/// more of its members.
template <class T>
class GluWeights {
 public:
  GluWeights(Index d_model, Index experts, Index d_hidden, Rng& rng, double init_scale);
  GluWeights(std::vector<Matrix<T>> gate, std::vector<Matrix<T>> up, std::vector<Matrix<T>> down);

  /// \throws StateError   if the weights are fetched from a source, which stores them otherwise.
  void expect_storable(Storage storage) const {
    if (storage == storage_ || source_ == nullptr) return;
    throw_error<StateError>(
        "GluBank::set_storage: the weights are fetched from a source, expected weights in memory");
  }

  void set_storage(Storage storage);
  void set_source(std::shared_ptr<ExpertSource<T>> source, Storage storage);
  void set_travel(std::shared_ptr<ExpertTravel<T>> travel);
  void remap_experts(const ExpertMap& map);

  Storage storage() const { return storage_; }
  /// Null unless the weights are fetched.
  ExpertSource<T>* source() const { return source_.get(); }
  /// Null unless the experts are spread; then the weights here are those of its `own`.
  ExpertTravel<T>* travel() const { return travel_.get(); }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    for (std::size_t e = 0; e < self.gate_.size(); ++e) {
      const std::string expert = std::to_string(self.number_of(e));
      visit(expert + ".gate", self.gate_[e]);
      visit(expert + ".up", self.up_[e]);
      visit(expert + ".down", self.down_[e]);
    }
  }

  Index experts() const {
    return travel_ == nullptr ? static_cast<Index>(gate_.size()) : travel_->experts();
  }
  Index d_in() const { return d_in_; }
  Index d_hidden() const { return d_hidden_; }
  Index d_out() const { return d_out_; }

  /// Without values where they are stored for inference.
  LinearParameter<T>& gate(std::size_t e) { return gate_[e]; }
  const LinearParameter<T>& gate(std::size_t e) const { return gate_[e]; }
  LinearParameter<T>& up(std::size_t e) { return up_[e]; }
  const LinearParameter<T>& up(std::size_t e) const { return up_[e]; }
  LinearParameter<T>& down(std::size_t e) { return down_[e]; }
  const LinearParameter<T>& down(std::size_t e) const { return down_[e]; }

  /// The weights of expert e where they are stored for inference.
  const PackedGlu<T>& packed(std::size_t e) const { return packed_[e]; }

  /// The weights of expert e. Where they are stored for inference, gate and up or down are unpacked
  /// to places of this thread, where they stay until it asks for those of another expert.
  std::pair<WeightValue<T>, WeightValue<T>> gate_up_of(std::size_t e) const {
    if (storage_ == Storage::kTrainable) return parameters_of(e);
    const auto places = unpacked_gate_up();
    packed_[e].gate_up.unpack(places.first, places.second);
    return gate_up_again(e);
  }
  /// The same of the expert that this thread asked for last.
  std::pair<WeightValue<T>, WeightValue<T>> gate_up_again(std::size_t e) const {
    if (storage_ == Storage::kTrainable) return parameters_of(e);
    const auto places = unpacked_gate_up();
    return {{{places.first, d_hidden_, d_in_}}, {{places.second, d_hidden_, d_in_}}};
  }
  WeightValue<T> down_of(std::size_t e) const {
    if (storage_ == Storage::kTrainable) return WeightValue<T>::of(down_[e]);
    struct Down {};
    auto& space = ThreadSpace<T, Down>::of_this_thread();
    space.reserve(d_out_ * d_hidden_);
    T* const unpacked = space.take(d_out_ * d_hidden_);
    packed_[e].down.unpack(unpacked, nullptr);
    return {{unpacked, d_out_, d_hidden_}};
  }

  /// Whether experts are computed without their hidden numbers being kept: where weights are stored
  /// for inference, have no adapters in this pass, and it is not to be differentiated.
  bool is_fused(const Pass& pass) const;

 private:
  /// The number in the whole bank of the expert whose weights are the e-th here.
  Index number_of(std::size_t e) const {
    return travel_ == nullptr ? static_cast<Index>(e) : travel_->own()[e];
  }

  std::pair<WeightValue<T>, WeightValue<T>> parameters_of(std::size_t e) const {
    return {WeightValue<T>::of(gate_[e]), WeightValue<T>::of(up_[e])};
  }

  /// Where this thread has them.
  std::pair<T*, T*> unpacked_gate_up() const {
    auto& space = ThreadSpace<T, GluWeights>::of_this_thread();
    space.reserve(2 * d_hidden_ * d_in_);
    T* const gate = space.take(d_hidden_ * d_in_);
    return {gate, space.take(d_hidden_ * d_in_)};
  }

  std::vector<LinearParameter<T>> gate_, up_, down_;
  std::vector<PackedGlu<T>> packed_;         // One per expert, or none.
  std::shared_ptr<ExpertSource<T>> source_;  // Null unless they are fetched.
  std::shared_ptr<ExpertTravel<T>> travel_;  // Null unless they are spread.
  Storage storage_ = Storage::kTrainable;
  Index d_in_ = 0, d_hidden_ = 0, d_out_ = 0;
};

template <class T>
GluWeights<T>::GluWeights(Index d_model, Index experts, Index d_hidden, Rng& rng, double init_scale)
    : d_in_(d_model), d_hidden_(d_hidden), d_out_(d_model) {
  expect_at_least<Index>("GluBank", "d_model", d_model, 1);
  expect_at_least<Index>("GluBank", "experts", experts, 1);
  expect_at_least<Index>("GluBank", "d_hidden", d_hidden, 1);
  for (Index e = 0; e < experts; ++e) {
    gate_.push_back({switch_init<T>(d_hidden, d_model, rng, init_scale)});
    up_.push_back({switch_init<T>(d_hidden, d_model, rng, init_scale)});
    down_.push_back({switch_init<T>(d_model, d_hidden, rng, init_scale)});
  }
}

template <class T>
GluWeights<T>::GluWeights(std::vector<Matrix<T>> gate, std::vector<Matrix<T>> up,
                          std::vector<Matrix<T>> down) {
  if (gate.empty() || gate.size() != up.size() || gate.size() != down.size()) {
    throw_error<ConfigError>("GluBank: ", gate.size(), " gate, ", up.size(), " up and ",
                             down.size(), " down weights, expected one of each per expert");
  }
  for (std::size_t e = 0; e < gate.size(); ++e) {
    const std::string which = "[" + std::to_string(e) + "]";
    expect_shape("GluBank", "gate" + which, gate[e], gate[0].rows(), gate[0].cols());
    expect_shape("GluBank", "up" + which, up[e], gate[0].rows(), gate[0].cols());
    expect_shape("GluBank", "down" + which, down[e], down[0].rows(), gate[0].rows());
  }
  d_in_ = gate[0].cols();
  d_hidden_ = gate[0].rows();
  d_out_ = down[0].rows();
  for (std::size_t e = 0; e < gate.size(); ++e) {
    gate_.push_back({std::move(gate[e])});
    up_.push_back({std::move(up[e])});
    down_.push_back({std::move(down[e])});
  }
}

template <class T>
bool GluWeights<T>::is_fused(const Pass& pass) const {
  if (storage_ == Storage::kTrainable) return false;
  bool fused = !(pass.training && pass.through_stored);
  for (const auto* weights : {&gate_, &up_, &down_}) {
    for (const LinearParameter<T>& weight : *weights) fused = fused && !is_adapted(weight, pass);
  }
  if (fused || source_ == nullptr) return fused;
  throw_error<StateError>(
      "GluBank::forward: the weights are fetched from a source, expected weights in memory where "
      "they have adapters or gradients pass through them");
}

template <class T>
void GluWeights<T>::set_storage(Storage storage) {
  if (storage == storage_) return;
  expect_storable(storage);
  const std::size_t count = gate_.size();
  if (storage == Storage::kTrainable) {
    std::vector<Matrix<T>> gate(count), up(count), down(count);
    for (std::size_t e = 0; e < count; ++e) packed_[e].unpack(gate[e], up[e], down[e]);
    for (std::size_t e = 0; e < count; ++e) {
      gate_[e].value = std::move(gate[e]);
      up_[e].value = std::move(up[e]);
      down_[e].value = std::move(down[e]);
    }
    packed_.clear();
  } else {
    // One memory for all: the weights of a small expert fill no huge page.
    SharedMemory memory(count * PackedGlu<T>::bytes(d_in_, d_hidden_, d_out_, storage));
    std::vector<PackedGlu<T>> packed;
    packed.reserve(count);
    Parameter<T> gate, up, down;
    for (std::size_t e = 0; e < count; ++e) {
      if (storage_ == Storage::kTrainable) {
        packed.emplace_back(gate_[e], up_[e], down_[e], storage, memory);
        for (auto* weights : {&gate_, &up_, &down_}) (*weights)[e].forget_value();
      } else {
        packed_[e].unpack(gate.value, up.value, down.value);
        packed.emplace_back(gate, up, down, storage, memory);
      }
    }
    packed_ = std::move(packed);
  }
  storage_ = storage;
}

template <class T>
void GluWeights<T>::set_source(std::shared_ptr<ExpertSource<T>> source, Storage storage) {
  if (source == nullptr || storage == Storage::kTrainable) {
    throw_error<ConfigError>("GluBank::set_source: source is null or storage kTrainable, expected ",
                             "a source of weights stored for inference");
  }
  if (travel_ != nullptr) {
    throw_error<StateError>(
        "GluBank::set_source: the experts are spread, expected all of them here");
  }
  source_ = std::move(source);
  storage_ = storage;
  packed_.clear();
  for (auto* weights : {&gate_, &up_, &down_}) {
    for (LinearParameter<T>& weight : *weights) weight.forget_value();
  }
}

template <class T>
void GluWeights<T>::set_travel(std::shared_ptr<ExpertTravel<T>> travel) {
  if (travel == nullptr || travel->experts() != experts()) {
    throw_error<ConfigError>("GluBank::set_travel: travel ",
                             travel == nullptr ? "is null" : "has another number of experts",
                             ", expected one for ", experts(), " experts");
  }
  if (source_ != nullptr || travel_ != nullptr) {
    throw_error<StateError>("GluBank::set_travel: the weights are fetched from a source or the ",
                            "experts are spread, expected all of them in memory here");
  }
  const auto keep = [&](auto& items) {
    std::remove_reference_t<decltype(items)> kept;
    for (const Index e : travel->own()) {
      if (!items.empty()) kept.push_back(std::move(items[static_cast<std::size_t>(e)]));
    }
    items = std::move(kept);
  };
  keep(gate_);
  keep(up_);
  keep(down_);
  keep(packed_);
  travel_ = std::move(travel);
}

template <class T>
void GluWeights<T>::remap_experts(const ExpertMap& map) {
  if (travel_ != nullptr) {
    throw_error<StateError>(
        "GluBank::remap_experts: the experts are spread, expected all of them here");
  }
  map.check("GluBank::remap_experts", experts());
  if (map.has_cold()) expect_trainable("GluBank::remap_experts", storage_);
  if (source_ != nullptr) {
    throw_error<StateError>(
        "GluBank::remap_experts: the weights are fetched from a source, expected weights in "
        "memory");
  }
  const auto cold = [&](Matrix<T> value) {
    LinearParameter<T> weight = std::move(value);
    weight.rounded = gate_[0].rounded;  // Trained like the others.
    return weight;
  };
  const auto drawn = [&] { return cold(switch_init<T>(d_hidden_, d_in_, *map.rng, 1.0)); };
  GluWeights next = *this;
  map.rearrange(next.gate_, drawn);
  map.rearrange(next.up_, drawn);
  map.rearrange(next.down_, [&] { return cold(Matrix<T>::Zero(d_out_, d_hidden_)); });
  if (!packed_.empty()) {
    next.packed_.clear();
    for (const Index from : map.source) {
      next.packed_.push_back(packed_[static_cast<std::size_t>(from)]);
    }
  }
  *this = std::move(next);
}

}  // namespace weir

#ifdef WEIR_COMPILED
extern template class weir::GluWeights<float>;
extern template class weir::GluWeights<double>;
#endif
