// SPDX-License-Identifier: MIT
/// \file
/// Models whose experts are spread over the ranks of an MPI job, for inference.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <utility>

#include <weir/core/types.hpp>
#include <weir/core/walk.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/moe/experts/expert_travel.hpp>
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/ops/activation.hpp>
#include <weir/parallel/mpi/token_travel.hpp>
#include <weir/parallel/placement.hpp>
#include <weir/parallel/rank_nodes.hpp>

namespace weir {

/// The way to the experts of other ranks, see TokenTravel. The banks of a model compute one after
/// the other, and share a cache.
template <class T>
class RankTravel final : public ExpertTravel<T> {
 public:
  using Cache = typename TokenTravel<T>::Cache;

  /// \throws ConfigError  as TokenTravel.
  RankTravel(Placement placement, std::shared_ptr<ExpertChannels> channels,
             ExpertParallelConfig config, std::shared_ptr<Cache> cache)
      : travel_(std::move(placement), std::move(channels), config), cache_(std::move(cache)) {}

  Index experts() const override { return travel_.placement().experts(); }
  std::span<const Index> own() const override { return travel_.own(); }

  void run(MatrixIn<T> x, const Dispatch<T>& dispatch, typename ExpertTravel<T>::Compute compute,
           MatrixOut<T> out) override {
    const auto row = [&](Index slot) { return &x.coeffRef(dispatch.token(slot), 0); };
    const auto compute_chunk = [&](Index /*c*/, MatrixIn<T> rows,
                                   const Dispatch<T>& here) -> const Matrix<T>& {
      return compute(rows, here);
    };
    travel_.begin(dispatch, x.cols(), out.cols(), false, *cache_);
    travel_.run(dispatch, x.cols(), row, true, compute_chunk, *cache_, out);
  }

 private:
  TokenTravel<T> travel_;
  std::shared_ptr<Cache> cache_;
};

/// Where a bank of so many experts has them.
using ChoosePlacement = std::function<Placement(Index experts)>;

namespace detail {

template <class T>
class SpreadBanks final : public Walk<T> {
 public:
  SpreadBanks(std::shared_ptr<ExpertChannels> channels, const ExpertParallelConfig& config,
              ChoosePlacement choose)
      : channels_(std::move(channels)), config_(config), choose_(std::move(choose)) {}

  Index spread = 0;

 private:
  bool at_node(const Node& node) override {
    if (auto* const silu = node.get<GluBank<T, Silu>>()) set_travel(*silu);
    if (auto* const gelu = node.get<GluBank<T, GeluTanh>>()) set_travel(*gelu);
    return true;
  }

  template <class Bank>
  void set_travel(Bank& bank) {
    bank.set_travel(
        std::make_shared<RankTravel<T>>(choose_(bank.experts()), channels_, config_, cache_));
    ++spread;
  }

  std::shared_ptr<ExpertChannels> channels_;
  ExpertParallelConfig config_;
  ChoosePlacement choose_;
  std::shared_ptr<typename RankTravel<T>::Cache> cache_ =
      std::make_shared<typename RankTravel<T>::Cache>();
};

}  // namespace detail

/// Spreads the experts of each GluBank of a model over the ranks of `channels`, for inference: this
/// rank forgets those of others, and from then on all ranks run their passes together, each with
/// any tokens of its own, also none; see ExpertParallel for what they compute. Outputs are those of
/// the whole model, as said there. Experts of other kinds of banks stay on all ranks, each of which
/// computes them for its own tokens. The names of parameters do not change.
///
/// A rank reads only its own experts of a model from disk if this is done before:
///
///     auto channels = std::make_shared<ExpertChannels>(ranks);
///     auto loaded = io::load_pretrained("OLMoE-1B-7B", {.storage = Storage::kBfloat16},
///                                       [&](auto& model) { spread_experts(model, channels); });
///
/// For `generate` on many ranks, see rank_generate.hpp.
/// \param choose   By default, contiguous experts: see Placement::contiguous.
/// \return         How many banks were spread.
/// \throws ConfigError  as ExpertParallel.
/// \throws StateError   if experts are spread already or fetched from a source. Banks before that
///                      one are spread by then.
template <class Model>
Index spread_experts(Model& model, const std::shared_ptr<ExpertChannels>& channels,
                     const ExpertParallelConfig& config = {}, const ChoosePlacement& choose = {}) {
  const ChoosePlacement contiguous = [&](Index experts) {
    return Placement::contiguous(experts, RankNodes::single(channels->counts.size()));
  };
  detail::SpreadBanks<typename Model::Scalar> walk(channels, config, choose ? choose : contiguous);
  walk("", model);
  return walk.spread;
}

}  // namespace weir
