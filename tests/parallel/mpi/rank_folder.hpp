// SPDX-License-Identifier: MIT
/// \file
/// A folder that all ranks use.
#pragma once

#include <filesystem>
#include <string>
#include <system_error>
#include <unistd.h>

#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/exchange.hpp>

#include "parallel/mpi/ranks.hpp"

namespace weir::test {

inline void wait_for_ranks() {
  MPI_Barrier(ranks().get());
}

/// A folder of this job, not there at first, that all ranks have the name of.
class RankFolder {
 public:
  RankFolder() {
    Channel channel(ranks());
    Exchange exchange;
    const std::string mine =
        (std::filesystem::temp_directory_path() / ("weir-ranks-" + std::to_string(::getpid())))
            .string();
    path_ = all_gather_texts(channel, exchange, "folder", mine).front();
  }
  RankFolder(const RankFolder&) = delete;
  RankFolder& operator=(const RankFolder&) = delete;
  ~RankFolder() {
    wait_for_ranks();
    std::error_code ignored;
    if (ranks().rank() == 0) std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace weir::test
