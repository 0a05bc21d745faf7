// SPDX-License-Identifier: MIT
/// \file
/// What balancing rules of all ranks counted, put together.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/types.hpp>
#include <weir/core/walk.hpp>
#include <weir/moe/balance/bias_balance.hpp>
#include <weir/moe/balance/global_batch_loss.hpp>
#include <weir/moe/balance/quantile_balance.hpp>
#include <weir/parallel/mpi/collectives.hpp>

namespace weir {

/// Lets each BiasBalance of a model count what those of all ranks counted, and each QuantileBalance
/// the tokens of all ranks, in the order of the ranks, so that they do the same on all of them, and
/// what one process would do. (Loads are whole numbers, whose sums have the same bits in any
/// order.) A rank sends 9 bytes for each expert of a BiasBalance, and for a QuantileBalance all its
/// scores.
template <class T>
class RankCounts {
 public:
  /// Collective; the models have the same balancers.
  /// \throws RankError    if a rank has others.
  template <class Model>
  void share(Channel& channel, Exchange& exchange, Model& model) {
    Finder finder(*this);
    biases_.clear();
    quantiles_.clear();
    finder("", model);
    if (biases_.empty() && quantiles_.empty()) return;
    write();
    const std::vector<std::string> texts =
        all_gather_texts(channel, exchange, "counts of balancers", text_);
    for (QuantileBalance<T>* const quantile : quantiles_) quantile->discard_self();
    for (int r = 0; r < channel.size(); ++r) {
      read(RankText("counts of balancers", texts[static_cast<std::size_t>(r)], r),
           r == channel.rank());
    }
  }

 private:
  struct Finder final : Walk<T> {
    explicit Finder(RankCounts& c) : counts(c) {}
    bool at_node(const Node& node) override {
      if (auto* const bias = node.get<BiasBalance<T>>()) counts.biases_.push_back(bias);
      if (auto* const quantile = node.get<QuantileBalance<T>>()) {
        counts.quantiles_.push_back(quantile);
      }
      return true;
    }
    RankCounts& counts;
  };

  void put_allowed(std::span<const std::uint8_t> allowed) {
    RankText::put(text_, static_cast<std::int64_t>(allowed.size()));
    for (const std::uint8_t of_expert : allowed) RankText::put(text_, of_expert);
  }
  void take_allowed(RankText& text) {
    allowed_.clear();
    for (auto left = text.take<std::int64_t>(); left > 0; --left) {
      allowed_.push_back(text.take<std::uint8_t>());
    }
  }

  void write() {
    text_.clear();
    RankText::put(text_, static_cast<std::int64_t>(biases_.size()));
    for (const BiasBalance<T>* const bias : biases_) {
      put_allowed(bias->allowed());
      for (const double of_expert : bias->load()) RankText::put(text_, of_expert);
    }
    for (const QuantileBalance<T>* const quantile : quantiles_) {
      put_allowed(quantile->allowed());
      RankText::put(text_, std::int64_t{quantile->assignments()});
      RankText::put(text_, static_cast<std::int64_t>(quantile->scores().size()));
      for (const T score : quantile->scores()) RankText::put(text_, score);
    }
  }

  void read(RankText text, bool is_own) {
    if (text.take<std::int64_t>() != static_cast<std::int64_t>(biases_.size())) text.fail();
    for (BiasBalance<T>* const bias : biases_) {
      take_allowed(text);
      load_.resize(allowed_.count());
      for (double& of_expert : load_) of_expert = text.take<double>();
      if (!is_own && load_.size() > 0) bias->add_load(load_, allowed_);
    }
    for (QuantileBalance<T>* const quantile : quantiles_) {
      take_allowed(text);
      const auto assignments = static_cast<Index>(text.take<std::int64_t>());
      scores_.clear();
      for (auto left = text.take<std::int64_t>(); left > 0; --left) {
        scores_.push_back(text.template take<T>());
      }
      if (!scores_.empty()) quantile->add_scores(scores_, assignments, allowed_);
    }
    if (!text.is_empty()) text.fail();
  }

  std::vector<BiasBalance<T>*> biases_;
  std::vector<QuantileBalance<T>*> quantiles_;
  std::string text_;
  RowVector<double> load_;
  List<T> scores_;
  List<std::uint8_t> allowed_;
};

namespace detail {

/// Finds the first GlobalBatchLoss of a model.
template <class T>
class FindGlobalBatchLoss final : public Walk<T> {
 public:
  std::string found;  ///< Its place in the model.

 private:
  bool at_node(const Node& node) override {
    const auto* const loss = node.get<GlobalBatchLoss<T>>();
    if (found.empty() && loss != nullptr && loss->config().coefficient > 0.0) {
      found = this->path();
      found.pop_back();
    }
    return true;
  }
};

}  // namespace detail

/// Makes sure that no loss over the global batch counts the tokens of one rank alone.
/// \throws ConfigError  if there is a GlobalBatchLoss, and more than one rank.
template <class Model>
void expect_ranks_counted(std::string_view who, Model& model, Index ranks) {
  if (ranks == 1) return;
  detail::FindGlobalBatchLoss<typename Model::Scalar> find;
  find("", model);
  if (find.found.empty()) return;
  throw_error<ConfigError>(who, ": '", find.found, "' is a GlobalBatchLoss, which would count the ",
                           "tokens of each of ", ranks, " ranks alone, expected RankBatchLoss");
}

}  // namespace weir
