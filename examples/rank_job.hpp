// SPDX-License-Identifier: MIT
/// \file
/// The MPI job that a program may be a rank of. Without MPI (no WEIR_MPI) it is always alone.
#pragma once

#include <memory>
#include <utility>

#include <weir/core/types.hpp>
#include <weir/moe/experts/glu_bank.hpp>

#ifdef WEIR_MPI
#include <weir/parallel/mpi/expert_parallel.hpp>
#endif

struct RankJob {
#ifdef WEIR_MPI
  const weir::Communicator* ranks = nullptr;  ///< Null outside of a job.
  std::shared_ptr<weir::ExpertChannels> channels;

  weir::Index rank() const {
    return ranks == nullptr ? 0 : ranks->rank();
  }
  weir::Index size() const {
    return ranks == nullptr ? 1 : ranks->size();
  }
#else
  weir::Index rank() const {
    return 0;
  }
  weir::Index size() const {
    return 1;
  }
#endif
  bool is_first() const {
    return rank() == 0;
  }

  /// The first of `count` things that are this rank's, or those of the ranks up to `rank`.
  weir::Index begin(weir::Index count) const {
    return rank() * count / size();
  }
  weir::Index end(weir::Index count) const {
    return (rank() + 1) * count / size();
  }
};

inline RankJob& rank_job() {
  static RankJob job;
  return job;
}

/// Hands `use` the experts as a bank: all of them, or those of this rank.
template <class Use>
auto with_experts(weir::GluBank<float> experts, Use&& use) {
#ifdef WEIR_MPI
  if (rank_job().size() > 1) {
    auto placement =
        weir::Placement::contiguous(experts.experts(), weir::RankNodes::single(rank_job().size()));
    return use(weir::ExpertParallel(std::move(experts), std::move(placement), rank_job().channels));
  }
#endif
  return use(std::move(experts));
}
