// SPDX-License-Identifier: MIT
// Runs the test cases on every rank of an MPI job; one that fails ends the job.
#ifdef WEIR_CATCH2_V2
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#else
#include <catch2/catch_session.hpp>
#endif

#include <weir/parallel/mpi/job.hpp>

#include "parallel/mpi/ranks.hpp"

namespace weir::test {

const Communicator*& ranks_of_job() {
  static const Communicator* ranks = nullptr;
  return ranks;
}

}  // namespace weir::test

int main(int argc, char** argv) {
  return weir::run_job(argc, argv, {.timeout_seconds = 20.0}, [&](const weir::Communicator& ranks) {
    weir::test::ranks_of_job() = &ranks;
    return Catch::Session().run(argc, argv);
  });
}
