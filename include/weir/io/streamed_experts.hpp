// SPDX-License-Identifier: MIT
/// \file
/// Experts that stay in the files of a checkpoint until a token comes to them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/error.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/storage_rules.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/core/walk.hpp>
#include <weir/io/expert_store.hpp>
#include <weir/io/published_tensors.hpp>
#include <weir/moe/experts/expert_source.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/nn/packed_glu.hpp>
#include <weir/ops/activation.hpp>
#include <weir/ops/top_k.hpp>

namespace weir::io {

/// The experts of one layer, read from a checkpoint when they are wanted and kept in a store that
/// all layers share.
///
/// While a layer computes, the system is told to read the experts which the next layer probably
/// chooses: those that its router would choose for the tokens of this layer, which differ little
/// from the next layer's. (Eliseev & Mazur 2023, arXiv:2312.17238, section 3.2.)
template <class T>
class StreamedExperts final : public ExpertSource<T> {
 public:
  /// The numbers of an expert's matrices in the reader.
  struct Matrices {
    std::size_t gate = 0, up = 0, down = 0;
  };

  /// \param keep     Keeps alive what the reader reads from.
  StreamedExperts(std::shared_ptr<const void> keep, std::shared_ptr<PublishedReader<T>> reader,
                  std::shared_ptr<ExpertStore<T>> store, Index layer, std::vector<Matrices> experts,
                  Index d_model, Index d_hidden, Storage storage)
      : keep_(std::move(keep)),
        reader_(std::move(reader)),
        store_(std::move(store)),
        layer_(layer),
        experts_(std::move(experts)),
        storage_(storage) {
    gate_.value.resize(d_hidden, d_model);
    up_.value.resize(d_hidden, d_model);
    down_.value.resize(d_model, d_hidden);
  }

  void fetch(std::span<const Index> wanted, std::vector<PackedGlu<T>>& to) override;
  void announce(MatrixIn<T> x) override;

  /// The layer that comes behind this one, and its router [experts, d_model].
  void set_next(std::shared_ptr<StreamedExperts> next, Matrix<T> router, Index k) {
    next_ = std::move(next);
    next_router_ = std::move(router);
    next_k_ = k;
  }

 private:
  /// How many tokens are looked at: with more, most experts are wanted anyway.
  static constexpr Index kMostAnnounced = 8;

  std::size_t bytes() const {
    return PackedGlu<T>::bytes(gate_.value.cols(), gate_.value.rows(), down_.value.rows(),
                               storage_);
  }
  const Matrices& matrices(Index expert) const {
    return experts_[static_cast<std::size_t>(expert)];
  }
  PackedGlu<T> read(Index expert);
  void read(std::size_t matrix, Parameter<T>& to);
  void predict(Index expert);
  void confirm(std::span<const Index> wanted);

  std::shared_ptr<const void> keep_;
  std::shared_ptr<PublishedReader<T>> reader_;
  std::shared_ptr<ExpertStore<T>> store_;
  Index layer_;
  std::vector<Matrices> experts_;

  // Where an expert is read to, under the lock of the store. Rows that lie one by one in the files
  // go straight from there to their storage, and the memory here is never touched.
  Parameter<T> gate_, up_, down_;
  Storage storage_;

  std::shared_ptr<StreamedExperts> next_;  // Layers point forwards only.
  Matrix<T> next_router_;
  Index next_k_ = 0;
  std::mutex mutex_;
  std::set<Index> predicted_;  // For the next fetch of this layer.
};

template <class T>
void StreamedExperts<T>::fetch(std::span<const Index> wanted, std::vector<PackedGlu<T>>& to) {
  confirm(wanted);
  const std::size_t at_once = std::max<std::size_t>(1, store_->capacity() / bytes());
  for (const Index expert : wanted.first(std::min(wanted.size(), at_once))) {
    to.push_back(store_->get({layer_, expert}, bytes(), [&] { return read(expert); }));
  }
}

template <class T>
PackedGlu<T> StreamedExperts<T>::read(Index expert) {
  const Matrices& m = matrices(expert);
  read(m.gate, gate_);
  read(m.up, up_);
  read(m.down, down_);
  SharedMemory memory = store_->memory(bytes());
  return {gate_, up_, down_, storage_, memory};
}

template <class T>
void StreamedExperts<T>::read(std::size_t matrix, Parameter<T>& to) {
  to.rows = reader_->rows_of(matrix);
  if (to.rows == nullptr) reader_->read_deferred(matrix, to.value);
}

template <class T>
void StreamedExperts<T>::announce(MatrixIn<T> x) {
  if (next_ == nullptr || x.rows() > kMostAnnounced) return;
  const Matrix<T> logits = x * next_router_.transpose();
  std::vector<Index> best(static_cast<std::size_t>(next_k_));
  for (Index t = 0; t < x.rows(); ++t) {
    const auto row = span_of(&logits(t, 0), logits.cols());
    if (!std::all_of(row.begin(), row.end(), [](T z) { return std::isfinite(z); })) continue;
    top_k<T>(row, best);
    for (const Index expert : best) next_->predict(expert);
  }
}

template <class T>
void StreamedExperts<T>::predict(Index expert) {
  if (store_->holds({layer_, expert})) return;
  {
    const std::scoped_lock lock(mutex_);
    if (!predicted_.insert(expert).second) return;
  }
  const Matrices& m = matrices(expert);
  for (const std::size_t matrix : {m.gate, m.up, m.down}) reader_->prefetch(matrix);
}

template <class T>
void StreamedExperts<T>::confirm(std::span<const Index> wanted) {
  const std::scoped_lock lock(mutex_);
  if (predicted_.empty()) return;
  Index confirmed = 0;
  for (const Index expert : wanted) confirmed += static_cast<Index>(predicted_.count(expert));
  store_->count_predictions(static_cast<Index>(predicted_.size()), confirmed);
  predicted_.clear();
}

namespace detail {

/// Finds the banks of a model whose experts can be streamed, and lets them fetch those from a
/// reader, which no longer reads them into the model.
template <class T>
class StreamBanks final : public Walk<T> {
 public:
  StreamBanks(std::shared_ptr<const void> keep, std::shared_ptr<PublishedReader<T>> reader,
              std::shared_ptr<ExpertStore<T>> store, StorageRules rules)
      : keep_(std::move(keep)),
        reader_(std::move(reader)),
        store_(std::move(store)),
        rules_(std::move(rules)) {}

  /// Tells each layer which one comes behind it, once the routers have been read.
  template <class Model>
  void link(Model& model, Index k);

 private:
  struct Streamed {
    std::string router;  // Its name in the model.
    std::shared_ptr<StreamedExperts<T>> experts;
  };

  bool at_node(const Node& node) override {
    if (auto* const silu = node.get<GluBank<T, Silu>>()) stream(*silu);
    if (auto* const gelu = node.get<GluBank<T, GeluTanh>>()) stream(*gelu);
    return true;
  }

  template <class Bank>
  void stream(Bank& bank);

  std::shared_ptr<const void> keep_;
  std::shared_ptr<PublishedReader<T>> reader_;
  std::shared_ptr<ExpertStore<T>> store_;
  StorageRules rules_;  // Of which one matches each part.
  std::vector<Streamed> streamed_;
};

template <class T>
template <class Bank>
void StreamBanks<T>::stream(Bank& bank) {
  const std::string path(this->path());
  std::vector<typename StreamedExperts<T>::Matrices> matrices;
  for (Index e = 0; e < bank.experts(); ++e) {
    const std::string expert = path + std::to_string(e);
    const auto gate = reader_->find(expert + ".gate");
    const auto up = reader_->find(expert + ".up");
    const auto down = reader_->find(expert + ".down");
    if (!gate || !up || !down) return;  // Of another kind of checkpoint: it stays in memory.
    matrices.push_back({*gate, *up, *down});
  }
  const Storage storage = *storage_of(rules_, std::string_view(path).substr(0, path.size() - 1));
  if (storage == Storage::kTrainable) {
    throw_error<ConfigError>("load_pretrained: expert_bytes = ", store_->capacity(),
                             " with storage = kTrainable, expected a storage for inference");
  }
  for (const auto& m : matrices) {
    for (const std::size_t matrix : {m.gate, m.up, m.down}) reader_->defer(matrix);
  }
  auto experts = std::make_shared<StreamedExperts<T>>(
      keep_, reader_, store_, static_cast<Index>(streamed_.size()), std::move(matrices),
      bank.d_in(), bank.d_hidden(), storage);
  bank.set_source(experts, storage);
  constexpr std::string_view kBank = "experts.";
  const std::string layer =
      path.ends_with(kBank) ? path.substr(0, path.size() - kBank.size()) : path;
  streamed_.push_back({layer + "router.weight", std::move(experts)});
}

template <class T>
template <class Model>
void StreamBanks<T>::link(Model& model, Index k) {
  std::map<std::string, const Matrix<T>*> routers;
  for (const auto& [name, parameter] : parameters(model)) routers[name] = &parameter->value;
  for (std::size_t i = 1; i < streamed_.size(); ++i) {
    const auto router = routers.find(streamed_[i].router);
    if (router == routers.end() || k > router->second->rows()) continue;
    streamed_[i - 1].experts->set_next(streamed_[i].experts, *router->second, k);
  }
}

}  // namespace detail

}  // namespace weir::io
