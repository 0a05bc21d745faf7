// SPDX-License-Identifier: MIT
// What links weir::mpi may include the headers of parallel/mpi.
#include <weir/moe/experts/glu_bank.hpp>
#include <weir/parallel/mpi/expert_parallel.hpp>
#include <weir/parallel/mpi/job.hpp>

static_assert(weir::ExpertBank<weir::ExpertParallel<weir::GluBank<float>>>);
