// SPDX-License-Identifier: MIT
// A program may have no standard input, as services do: the next file then has the number 0.
#include <exception>
#include <filesystem>
#include <iterator>
#include <string>
#include <string_view>
#include <unistd.h>
#include <vector>

#include <weir/io/atomic_file.hpp>
#include <weir/io/mapped_file.hpp>
#include <weir/io/text_files.hpp>

#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/child.hpp"

namespace weir::io::closed_input_test {

TEST_CASE("Files are written and read where standard input is closed", "[io][files]") {
  const test::Folder folder;
  const std::filesystem::path path = folder.path() / "a";
  const auto files = [&] {
    return std::distance(std::filesystem::directory_iterator(folder.path()),
                         std::filesystem::directory_iterator());
  };
  const int steps = test::exit_code_of_child([&]() -> int {
    int done = 0;
    ::close(0);
    try {
      AtomicFile file(path);
      file.write(std::string_view("text"));
      file.commit();
      done += files() == 1 ? 1 : 0;
      {
        AtomicFile without_commit(folder.path() / "b");
        without_commit.write(std::string_view("more"));
        done += files() == 2 ? 1 : 0;
      }
      done += files() == 1 ? 1 : 0;
      done += MappedFile(path.string()).bytes().size() == 4 ? 1 : 0;
      const std::vector<std::filesystem::path> paths = {path};
      done += TextFiles(paths).size() == 4 ? 1 : 0;
    } catch (const std::exception&) {
      done = 100;
    }
    ::_exit(done);
  });
  CHECK(steps == 5);
}

}  // namespace weir::io::closed_input_test
