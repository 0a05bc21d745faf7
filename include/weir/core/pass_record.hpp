// SPDX-License-Identifier: MIT
/// \file
/// What passes leave behind for callers that ask: auxiliary losses and reports, by name.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/report.hpp>
#include <weir/core/routing_observer.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// Collects what the layers of a model report during forward passes: the value of each auxiliary
/// loss and, if wanted, a report of each layer that routes tokens. A layer adds to the record that
/// its pass points to; nothing is handed from layer to layer.
///
///     PassRecord record;
///     model.forward(x, {.training = true, .record = &record}, cache);
///     const double objective = task_loss + record.aux_loss();
///
/// Names are paths, such as "layers.3.moe.switch". Several passes add up until `clear`, as the
/// micro-batches of a step should. A record whose layers are the same each time allocates nothing
/// after the first pass.
class PassRecord {
 public:
  /// One auxiliary loss of one layer in one pass.
  struct Loss {
    std::string name;    ///< Path and name of the loss, such as "layers.3.moe.switch".
    double value = 0.0;  ///< Scaled by its coefficient and by the pass's `aux_scale`.
  };

  /// The report of one layer in one pass.
  struct NamedReport {
    std::string name;  ///< The layer's path, such as "layers.3.moe".
    LayerReport report;
  };

  /// Which results a record collects.
  enum class Collects { kLosses, kLossesAndReports };

  PassRecord() = default;
  explicit PassRecord(Collects collects) : collects_(collects) {}

  /// Forgets everything but the memory.
  void clear() {
    losses_in_use_ = 0;
    reports_.clear();
  }

  /// The sum of all auxiliary losses: what `backward` differentiates beside the caller's own loss.
  double aux_loss() const {
    double sum = 0.0;
    for (const Loss& loss : losses()) sum += loss.value;
    return sum;
  }

  /// The sum of the losses that are called `name` in any layer, such as "switch".
  double aux_loss(std::string_view name) const {
    double sum = 0.0;
    for (const Loss& loss : losses()) {
      const std::size_t dot = loss.name.rfind('.');
      const std::size_t begin = dot == std::string::npos ? 0 : dot + 1;
      if (std::string_view(loss.name).substr(begin) == name) sum += loss.value;
    }
    return sum;
  }

  /// Every loss, in the order of the layers.
  std::span<const Loss> losses() const { return {losses_.data(), losses_in_use_}; }

  /// Every report, in the order of the layers.
  const std::vector<NamedReport>& reports() const { return reports_; }

  bool wants_reports() const { return collects_ == Collects::kLossesAndReports; }

  /// From now on, `observer` sees the routing of each mixture of experts in passes that point to
  /// this record, until another one does. It is not owned; null for nobody.
  void show_routings_to(RoutingObserver* observer) { observer_ = observer; }

  /// Adds a loss under the current path. Layers call this.
  void add_loss(std::string_view name, double value) {
    if (losses_in_use_ == losses_.size()) losses_.emplace_back();
    Loss& loss = losses_[losses_in_use_++];
    loss.name.assign(path_).append(name);
    loss.value = value;
  }

  /// Adds a report under the current path. Layers call this.
  void add_report(LayerReport report) {
    const std::size_t length = path_.empty() ? 0 : path_.size() - 1;
    reports_.push_back({path_.substr(0, length), std::move(report)});
  }

  /// Shows the routing of the layer at the current path to the observer. Layers call this.
  template <class T>
  void show(const Routing<T>& routing, const Pass& pass) const {
    if (observer_ == nullptr) return;
    const std::string_view path = path_;
    observer_->see(path.substr(0, path.empty() ? 0 : path.size() - 1), routing, pass);
  }

  /// Clears the record and makes it collect what `whole` collects, or losses if `whole` is null.
  void restart(const PassRecord* whole) {
    clear();
    collects_ = whole != nullptr ? whole->collects_ : Collects::kLosses;
  }

  /// Adds the contents of `part` under the current path.
  void add(const PassRecord& part) {
    for (const Loss& loss : part.losses()) add_loss(loss.name, loss.value);
    for (const NamedReport& named : part.reports()) {
      std::string name = path_ + named.name;
      if (named.name.empty() && !name.empty()) name.pop_back();
      reports_.push_back({std::move(name), named.report});
    }
  }

  /// While a scope lives, everything added to the record belongs to the part of that name.
  class Scope {
   public:
    /// \param record   May be null.
    Scope(PassRecord* record, std::string_view name) : record_(record) {
      if (record_ == nullptr) return;
      length_ = record_->path_.size();
      record_->path_.append(name).push_back('.');
    }
    /// The part `name.index`.
    Scope(PassRecord* record, std::string_view name, Index index) : Scope(record, name) {
      if (record_ != nullptr) record_->path_.append(std::to_string(index)).push_back('.');
    }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    ~Scope() {
      if (record_ != nullptr) record_->path_.resize(length_);
    }

   private:
    PassRecord* record_;
    std::size_t length_ = 0;
  };

  /// Returns `body()`, during which everything added to `record` belongs to the part `name`.
  /// \param record   May be null.
  template <class Body>
  static decltype(auto) within(PassRecord* record, std::string_view name, Body&& body) {
    const Scope scope(record, name);
    return body();
  }

 private:
  Collects collects_ = Collects::kLosses;
  RoutingObserver* observer_ = nullptr;
  std::string path_;          // The path of the running layer, with a dot at the end.
  std::vector<Loss> losses_;  // Those in use come first; the others keep their memory.
  std::size_t losses_in_use_ = 0;
  std::vector<NamedReport> reports_;
};

}  // namespace weir
