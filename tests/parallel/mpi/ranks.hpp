// SPDX-License-Identifier: MIT
/// \file
/// The ranks on which the test cases of parallel/mpi run, all of them on each.
#pragma once

#include <weir/core/types.hpp>
#include <weir/parallel/mpi/communicator.hpp>

namespace weir::test {

const Communicator*& ranks_of_job();

inline const Communicator& ranks() {
  return *ranks_of_job();
}

/// The rows of `all` that are this rank's, where rank r has those from `share(r)` to `share(r +
/// 1)`.
inline Index share(Index rank, Index count) {
  return rank * count / ranks().size();
}
template <class T>
Matrix<T> own_rows(const Matrix<T>& all) {
  const Index first = share(ranks().rank(), all.rows());
  return all.middleRows(first, share(ranks().rank() + 1, all.rows()) - first);
}

}  // namespace weir::test
