// SPDX-License-Identifier: MIT
/// \file
/// A bank whose experts are spread over the ranks of an MPI job.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/list.hpp>
#include <weir/core/pass.hpp>
#include <weir/core/scratch.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/moe/concepts.hpp>
#include <weir/moe/dispatch.hpp>
#include <weir/parallel/mpi/expert_moves.hpp>
#include <weir/parallel/mpi/expert_names.hpp>
#include <weir/parallel/mpi/token_travel.hpp>
#include <weir/parallel/placement.hpp>

namespace weir {

/// A bank whose experts are on the ranks of a communicator, as a Placement says: each rank has a
/// `Bank` of its own experts and computes them for the tokens of all ranks, which travel by two
/// all-to-alls, out (dispatch) and back (combine); `backward` mirrors both. Around it, on each
/// rank, is a MoELayer of that rank's tokens, with the same router on all of them. (Expert
/// parallelism: Lepikhin et al. 2020, arXiv:2006.16668, section 3; formats of the way: DeepSeek-V3,
/// arXiv:2412.19437, section 3.3.3.)
///
///     auto channels = std::make_shared<ExpertChannels>(ranks);
///     const Placement placement = Placement::contiguous(8, RankNodes::single(ranks.size()));
///     MoELayer moe(LinearRouter<float>(64, 8, rng), TopKSoftmax<float>({.k = 2}), Dropless(),
///                  ExpertParallel(GluBank<float>(64, 8, 128, rng), placement, channels));
///
/// All ranks call `forward` and `backward` together, with any numbers of tokens, also none. Results
/// are those of one process that has the tokens of all ranks one after the other: an expert gets
/// its rows in that order and all at once, and the home of a token adds the outputs up in the order
/// of the token's choices. So outputs and gradients of tokens and of experts without replicas have
/// the bits of one process, where a format does not round and the products of the bank do not
/// depend on where in the batch a row is. With replicas, the gradient of an expert is the sum over
/// its ranks (see DataParallel), in another order. Rows that stay on their rank are rounded by the
/// format as well, so that numbers do not depend on the placement.
///
/// Names are those of the whole mixture: expert 5 is "5.*" on whatever rank. A rank shows only its
/// own experts.
///
/// The experts' pass has no sequences, padding or token ids. An expert that draws, as for dropout,
/// draws from its rank's generator.
template <ExpertBank Bank>
class ExpertParallel {
 public:
  using Scalar = typename Bank::Scalar;
  using T = Scalar;

  struct Cache {
    typename TokenTravel<T>::Cache travel;
    std::vector<typename Bank::Cache> banks;  ///< One for each chunk.
    Scratch<T> packed;    ///< [slots, d_out], what the experts gave for this rank's tokens.
    Scratch<T> d_packed;  ///< [slots, .]
    List<T> d_weight;     ///< That the experts have, whose weights are all 1.
    Matrix<T> y, dx;
  };

  /// \param whole    All experts, the same on all ranks. Those of other ranks are forgotten.
  /// \throws ConfigError  if the placement is one of other numbers of experts or ranks, there are
  ///                      no channels, or a setting is out of range.
  ExpertParallel(Bank whole, Placement placement, std::shared_ptr<ExpertChannels> channels,
                 ExpertParallelConfig config = {})
      : ExpertParallel(whole.d_in(), whole.d_out(), std::move(placement), std::move(channels),
                       config) {
    travel_.placement().expect_experts("ExpertParallel", whole.experts());
    const std::span<const Index> own = travel_.own();
    if (own.empty()) {
      whole.remap_experts(ExpertMap{.source = {0}});
      any_.emplace(std::move(whole));
      return;
    }
    if (static_cast<Index>(own.size()) < whole.experts()) {
      whole.remap_experts(ExpertMap{.source = {own.begin(), own.end()}});
    }
    set_bank(std::move(whole));
  }

  /// \param local    This rank's experts, in the order of the placement; nothing where it has none.
  /// \throws ConfigError  as above.
  static ExpertParallel from_local(std::optional<Bank> local, Index d_in, Index d_out,
                                   Placement placement, std::shared_ptr<ExpertChannels> channels,
                                   ExpertParallelConfig config = {}) {
    ExpertParallel bank(d_in, d_out, std::move(placement), std::move(channels), config);
    const Index experts = local ? local->experts() : 0;
    const auto own = static_cast<Index>(bank.travel_.own().size());
    if (experts != own) {
      throw_error<ConfigError>("ExpertParallel: the bank has ", experts, " experts, expected ", own,
                               ", those that the placement gives to rank ", bank.rank());
    }
    if (local) bank.set_bank(std::move(*local));
    return bank;
  }

  const Matrix<T>& forward(MatrixIn<T> x, const Dispatch<T>& dispatch, const Pass& pass,
                           Cache& cache) const;

  const Matrix<T>& backward(MatrixIn<T> dy, const Dispatch<T>& dispatch, std::span<T> d_weight,
                            Cache& cache);

  /// Moves experts to where `next` has them, between two steps of a training: weights, and what
  /// optimizers need to know of their gradients. Then call `DataParallel::agree` with the
  /// optimizer, whose states follow. The caches of earlier passes cannot be used for `backward` any
  /// more. Collective.
  ///
  /// \throws ConfigError  if `next` is of another number of experts or ranks, or gives experts to
  ///                      this rank, which has never had one.
  /// \throws StateError   if weights are stored for inference.
  void move_experts(Placement next) {
    next.expect_experts("ExpertParallel::move_experts", experts());
    expect_trainable("ExpertParallel::move_experts", storage_);
    if (next.ranks() != placement().ranks()) {
      throw_error<ConfigError>("ExpertParallel::move_experts: the placement is one of ",
                               next.ranks(), " ranks, expected ", placement().ranks());
    }
    if (!bank_ && !any_ && next.slots(rank()) > 0) {
      throw_error<ConfigError>("ExpertParallel::move_experts: rank ", rank(),
                               " has never had an expert, expected one from which to make others");
    }
    detail::move_experts(channels().counts, placement(), next, bank_, any_);
    travel_ = TokenTravel<T>(std::move(next), travel_.shared_channels(), config());
  }

  /// \throws StateError   as the bank.
  void expect_storable(Storage storage) const {
    if constexpr (requires { bank_->expect_storable(storage); }) {
      if (bank_) bank_->expect_storable(storage);
    }
  }
  /// See `weir::set_storage`.
  void set_storage(Storage storage) {
    if (bank_) weir::set_storage(*bank_, storage);
    storage_ = storage;
  }
  Storage storage() const { return storage_; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    if (!self.bank_) return;
    WithExpertNumbers<Visit> renamed(visit, self.travel_.own());
    Bank::visit(*self.bank_, renamed);
  }

  Index experts() const { return travel_.placement().experts(); }
  Index d_in() const { return d_in_; }
  Index d_out() const { return d_out_; }

  int rank() const { return travel_.rank(); }
  const Placement& placement() const { return travel_.placement(); }
  const ExpertParallelConfig& config() const { return travel_.config(); }
  ExpertChannels& channels() const { return travel_.channels(); }
  const TokenTravel<T>& travel() const { return travel_; }
  /// This rank's experts; nothing if it has none.
  std::optional<Bank>& local() { return bank_; }
  const std::optional<Bank>& local() const { return bank_; }

 private:
  ExpertParallel(Index d_in, Index d_out, Placement placement,
                 std::shared_ptr<ExpertChannels> channels, ExpertParallelConfig config)
      : travel_(std::move(placement), std::move(channels), config), d_in_(d_in), d_out_(d_out) {}

  void set_bank(Bank bank) {
    bank_.emplace(std::move(bank));
    if constexpr (requires { bank_->storage(); }) storage_ = bank_->storage();
  }

  TokenTravel<T> travel_;
  std::optional<Bank> bank_;
  std::optional<Bank> any_;  // Where there is no bank, an expert of which one can be made.
  Index d_in_ = 0, d_out_ = 0;
  Storage storage_ = Storage::kTrainable;
};

template <ExpertBank Bank>
const Matrix<typename Bank::Scalar>& ExpertParallel<Bank>::forward(MatrixIn<T> x,
                                                                   const Dispatch<T>& dispatch,
                                                                   const Pass& pass,
                                                                   Cache& cache) const {
  travel_.begin(dispatch, d_in_, d_out_, pass.training, cache.travel);
  cache.banks.resize(cache.travel.chunks.size());
  Pass own = pass;
  own.sequences = nullptr;
  own.mask = {};
  own.token_ids = {};
  own.places = {};
  own.allowed = {};
  const auto row = [&](Index slot) { return &x.coeffRef(dispatch.token(slot), 0); };
  const auto compute = [&](Index c, MatrixIn<T> rows, const Dispatch<T>& here) -> const Matrix<T>& {
    return bank_->forward(rows, here, own, cache.banks[static_cast<std::size_t>(c)]);
  };
  travel_.run(dispatch, d_in_, row, true, compute, cache.travel,
              cache.packed.reshape(dispatch.slots(), d_out_));
  set_shape(cache.y, x.rows(), d_out_);
  combine<T>(cache.packed.view(), dispatch, cache.y);
  return cache.y;
}

template <ExpertBank Bank>
const Matrix<typename Bank::Scalar>& ExpertParallel<Bank>::backward(MatrixIn<T> dy,
                                                                    const Dispatch<T>& dispatch,
                                                                    std::span<T> d_weight,
                                                                    Cache& cache) {
  auto d_packed = cache.d_packed.reshape(dispatch.slots(), d_out_);
  combine_backward<T>(dy, cache.packed.view(), dispatch, d_packed, d_weight);
  const auto row = [&](Index slot) { return &d_packed(slot, 0); };
  const auto compute = [&](Index c, MatrixIn<T> rows, const Dispatch<T>& here) -> const Matrix<T>& {
    cache.d_weight.resize(rows.rows());
    return bank_->backward(rows, here, cache.d_weight, cache.banks[static_cast<std::size_t>(c)]);
  };
  auto home = cache.packed.reshape(dispatch.slots(), d_in_);
  travel_.run(dispatch, d_out_, row, false, compute, cache.travel, home);
  set_shape(cache.dx, dy.rows(), d_in_);
  gather_backward<T>(home, dispatch, cache.dx);
  return cache.dx;
}

}  // namespace weir
