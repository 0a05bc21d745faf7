// SPDX-License-Identifier: MIT
/// \file
/// Training on the tokens of many ranks at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/ops/vector_loops.hpp>
#include <weir/parallel/mpi/bucket_sum.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/exchange.hpp>
#include <weir/parallel/mpi/rank_counts.hpp>
#include <weir/parallel/mpi/shared_parameters.hpp>
#include <weir/parallel/mpi/state_moves.hpp>
#include <weir/parallel/timeline.hpp>

namespace weir {

/// Settings of DataParallel; the same on all ranks.
struct DataParallelConfig {
  /// How many numbers of gradients travel together. The sums of one bucket are formed while the
  /// next ones travel.
  Index bucket_size = Index{1} << 20;
  /// Whether each parameter's optimizer state is on one rank only, its owner (ZeRO, stage 1:
  /// Rajbhandari et al. 2019, arXiv:1910.02054, section 5.1). It takes the steps; the others get
  /// the new values instead of the summed gradient, which is as many bytes.
  bool shards_states = true;
};

/// Training of a model whose ranks each see their own part of the batch. Dense parameters are on
/// all ranks, experts on those that hold them (see ExpertParallel); a gradient is summed over the
/// ranks that have the parameter, so that an expert without replicas needs nothing. A step:
///
///     DataParallel<float> ranks_together(ranks);
///     ranks_together.agree(model);                  // once, and after a change of the model
///
///     loss = ...;                                   // this rank's share of the batch's loss
///     model.backward(...);
///     ranks_together.reduce(model);
///     ranks_together.clip_global_norm(model, 1.0);  // the norm over all ranks
///     ranks_together.step(optimizer, model);
///
/// Gradients are summed, not averaged: with the mean over all tokens as the loss, a rank divides
/// the losses of its tokens by the number of all ranks' tokens, and sets `Pass::aux_scale` to its
/// share of them. All ranks call the members together.
///
/// What sums differ in from one process: each rank adds up its own tokens first. In float, that is
/// a relative difference of about 1e-6 of a gradient's norm.
template <class T>
class DataParallel {
 public:
  /// \throws ConfigError  if bucket_size is below 1.
  explicit DataParallel(const Communicator& ranks, DataParallelConfig config = {})
      : config_(config), small_(ranks), sums_(ranks), shares_(ranks) {
    expect_at_least<Index>("DataParallel", "bucket_size", config.bucket_size, 1);
  }

  /// Lets all ranks know which parameters this one has. After each change of the model's parameters
  /// or of what is frozen.
  /// \throws RankError    if ranks have a parameter in different shapes, or frozen in part.
  /// \throws ConfigError  if the model has a GlobalBatchLoss, which knows nothing of other ranks,
  ///                      instead of RankBatchLoss.
  template <class Model>
  void agree(Model& model) {
    expect_ranks_counted("DataParallel::agree", model, size());
    shared_.agree(small_, exchange_, model);
    make_buckets();
  }

  /// The same after experts have moved, see ExpertParallel::move_experts: what `optimizer`
  /// remembers of a parameter goes to the ranks that need it now, and is forgotten by the others.
  template <class Model, class Optimizer>
  void agree(Model& model, Optimizer& optimizer) {
    const List<Entry> before = shared_.all();
    agree(model);
    detail::move_states<T>(small_, exchange_, config_.shards_states, before, shared_.all(),
                           optimizer);
  }

  /// Makes the values of all parameters those of their owners, as at the start of a training.
  template <class Model>
  void share_values(Model& model) {
    shared_.find("DataParallel::share_values", model);
    send_values();
  }

  /// Starts to sum the gradients of the parameters whose names begin with `prefix`, while the
  /// program goes on: those of a layer whose backward pass is over, and in which no other
  /// micro-batch of the step follows. Whatever else of them `reduce` finds not begun, it begins.
  ///
  ///     cache.layers.layer_done = [&](std::size_t l) {
  ///       ranks_together.begin(model, "layers." + std::to_string(l) + ".");
  ///     };
  template <class Model>
  void begin(Model& model, std::string_view prefix) {
    if (!found_) shared_.find("DataParallel::begin", model);
    found_ = true;
    for (Bucket& bucket : buckets_) {
      if (bucket.sum.has_begun() || bucket.prefix != prefix) continue;
      bucket.sum.begin(sums_, shares_, !config_.shards_states, shared_.all());
      begun_.push_back(&bucket.sum);
    }
    advance();
  }

  /// Sums all gradients over their ranks. With sharded states, a sum is at the parameter's owner
  /// only, and the gradients of the others are as they were.
  template <class Model>
  void reduce(Model& model) {
    if (!found_) shared_.find("DataParallel::reduce", model);
    for (Bucket& bucket : buckets_) {
      if (bucket.sum.has_begun()) continue;
      bucket.sum.begin(sums_, shares_, !config_.shards_states, shared_.all());
      begun_.push_back(&bucket.sum);
      advance();
    }
    for (BucketSum<T>* const sum : begun_) sum->advance(true, shared_.all());
    for (BucketSum<T>* const sum : begun_) sum->finish(shared_.all());
    add_spans();
    begun_.clear();
    next_ = 0;
    found_ = false;
  }

  /// `weir::clip_global_norm` of all ranks' parameters, each of which counts once, after `reduce`.
  /// \return              The norm before clipping, the same on all ranks.
  /// \throws ConfigError      if max_norm is not above zero.
  /// \throws NonFiniteError   on all ranks, if it is NaN or infinite on one. All give up the step
  ///                          then, by `discard(model)`.
  template <class Model>
  double clip_global_norm(Model& model, double max_norm);

  /// Takes a step with the gradients of `reduce`: balancing rules count what all ranks counted, and
  /// all ranks have the same parameters afterwards. An optimizer has the states of the parameters
  /// that the rank owns, or of all its parameters if states are not sharded.
  template <class Optimizer, class Model>
  void step(Optimizer& optimizer, Model& model);

  /// The sum of `value` over the ranks, in their order; the same bits on all.
  double sum(double value) {
    all_gather<double>(small_, exchange_, "sum", std::span(&value, 1), numbers_);
    double total = 0.0;
    for (const double of_rank : numbers_) total += of_rank;
    return total;
  }

  /// Finds the parameters of `model`, so that `parameters()` points to them.
  /// \throws StateError   if they are not those of the last `agree`.
  template <class Model>
  void find(Model& model) {
    shared_.find("DataParallel::find", model);
  }

  /// Where spans of time go from now on, if anywhere: for each bucket i "gradients i", from the
  /// moment that they set out until those of the other ranks were found to be here. They are looked
  /// for in `begin` and `reduce`.
  /// \param timeline  Lives until another one is set; null for none.
  void set_timeline(Timeline* timeline) { timeline_ = timeline; }

  /// For small things that all ranks tell each other.
  Channel& channel() { return small_; }

  int rank() const { return small_.rank(); }
  int size() const { return small_.size(); }
  const DataParallelConfig& config() const { return config_; }
  const SharedParameters<T>& parameters() const { return shared_; }

 private:
  using Entry = typename SharedParameters<T>::Entry;

  struct Bucket {
    std::string prefix;
    BucketSum<T> sum;
  };

  /// Freezes the parameters that other ranks own, as long as it lives.
  class OwnedOnly {
   public:
    OwnedOnly(List<Entry>& all, Index rank) : all_(all), rank_(rank) { set(true); }
    OwnedOnly(const OwnedOnly&) = delete;
    OwnedOnly& operator=(const OwnedOnly&) = delete;
    ~OwnedOnly() { set(false); }

   private:
    void set(bool frozen) {
      for (Entry& entry : all_) {
        if (entry.parameter == nullptr || entry.owner == rank_ || entry.frozen) continue;
        entry.parameter->frozen = frozen;
      }
    }
    List<Entry>& all_;
    Index rank_;
  };

  /// "layers.3." of a name in a layer of a stack, which `begin` may be told of; else "".
  static std::string_view prefix_of(std::string_view name) {
    constexpr std::string_view kLayers = "layers.";
    if (!name.starts_with(kLayers)) return {};
    return name.substr(0, name.find('.', kLayers.size()) + 1);
  }

  void make_buckets();
  void advance() {
    while (next_ < begun_.size() && begun_[next_]->advance(false, shared_.all())) ++next_;
  }
  void send_values();
  void add_spans() {
    for (std::size_t i = 0; timeline_ != nullptr && i < buckets_.size(); ++i) {
      const BucketSum<T>& sum = buckets_[i].sum;
      const std::string name = "gradients " + std::to_string(i);
      timeline_->track(name).add(name, sum.began(), sum.arrived(), sum.arriving_bytes());
    }
  }

  DataParallelConfig config_;
  Channel small_, sums_, shares_;
  SharedParameters<T> shared_;
  std::vector<Bucket> buckets_;
  std::vector<BucketSum<T>*> begun_;
  std::size_t next_ = 0;  // The first of them whose sums are not complete.
  bool found_ = false;
  Timeline* timeline_ = nullptr;
  Exchange exchange_;
  RankCounts<T> counts_;
  List<double> numbers_;
};

/// Those of one prefix together, in the reverse of the order of the model, as gradients come.
template <class T>
void DataParallel<T>::make_buckets() {
  buckets_.clear();
  List<Index> places;
  Index size = 0;
  std::string prefix;
  const auto close = [&] {
    if (!places.empty()) buckets_.push_back({prefix, BucketSum<T>(std::move(places), size)});
    places = {};
    size = 0;
  };
  for (Index i = shared_.all().count(); i-- > 0;) {
    const Entry& entry = shared_.all()[i];
    if (!entry.is_shared() || entry.frozen) continue;
    const bool fits = size + entry.size() <= config_.bucket_size && prefix_of(entry.name) == prefix;
    if (!fits) close();
    prefix = prefix_of(entry.name);
    places.push_back(i);
    size += entry.size();
  }
  close();
  begun_.clear();
  begun_.reserve(buckets_.size());
}

template <class T>
template <class Model>
double DataParallel<T>::clip_global_norm(Model& model, double max_norm) {
  expect_positive("clip_global_norm", "max_norm", max_norm);
  shared_.find("DataParallel::clip_global_norm", model);
  double squares = 0.0;
  std::string at_fault;
  for (const Entry& entry : shared_.all()) {
    if (entry.owner != rank() || !entry.parameter->learns()) continue;
    const Matrix<T>& grad = entry.parameter->grad;
    const double of_entry = loops::sum_of_squares_as_double(grad.size(), grad.data());
    if (at_fault.empty() && !std::isfinite(squares + of_entry)) at_fault = entry.name;
    squares += of_entry;
  }
  const double norm = std::sqrt(sum(squares));
  if (!std::isfinite(norm)) {
    discard(model);
    const std::vector<std::string> names =
        all_gather_texts(small_, exchange_, "gradients that are not finite", at_fault);
    for (std::size_t r = 0; r < names.size(); ++r) {
      if (names[r].empty() && r + 1 < names.size()) continue;
      throw_error<NonFiniteError>("clip_global_norm: gradient of ", names[r], " on rank ", r,
                                  " has norm ", std::isnan(norm) ? "nan" : "inf",
                                  ", expected finite");
    }
  }
  if (norm > max_norm) {
    const auto factor = static_cast<T>(max_norm / norm);
    for (const Entry& entry : shared_.all()) {
      if (entry.parameter == nullptr || !entry.parameter->learns()) continue;
      Matrix<T>& grad = entry.parameter->grad;
      loops::scale(grad.size(), factor, grad.data(), grad.data());
    }
  }
  return norm;
}

template <class T>
template <class Optimizer, class Model>
void DataParallel<T>::step(Optimizer& optimizer, Model& model) {
  shared_.find("DataParallel::step", model);
  counts_.share(small_, exchange_, model);
  if (!config_.shards_states) {
    optimizer.step(model);
    return;
  }
  {
    const OwnedOnly owned(shared_.all(), rank());
    optimizer.step(model);
  }
  send_values();
}

/// In the order of the buckets, many at a time on their way.
template <class T>
void DataParallel<T>::send_values() {
  for (Bucket& bucket : buckets_) bucket.sum.begin_values(shares_, shared_.all());
  for (Bucket& bucket : buckets_) bucket.sum.finish_values(shared_.all());
}

}  // namespace weir
