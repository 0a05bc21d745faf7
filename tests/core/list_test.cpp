// SPDX-License-Identifier: MIT
#include <span>
#include <utility>
#include <vector>

#include <weir/core/list.hpp>

#include "support/catch.hpp"

namespace weir::list_test {

TEST_CASE("A list counts with Index and is a vector else", "[core][list]") {
  List<int> list = {3, 1, 2};
  const Index last = list.count() - 1;
  CHECK(list[last] == 2);
  list[0] = 7;
  CHECK(std::as_const(list)[0] == 7);
  list.resize(Index(5));
  CHECK(list.count() == 5);
  CHECK(list[4] == 0);
  list.assign(Index(2), 9);
  CHECK(list == List<int>{9, 9});
  const std::vector<int> other = {4, 5};
  list.assign(other.begin(), other.end());
  CHECK(list == List<int>(other));
  CHECK(List<int>(Index(3)).count() == 3);
  CHECK(std::span<const int>(list).size() == 2);
  list.reserve(Index(100));
  CHECK(list.capacity() >= 100);
}

}  // namespace weir::list_test
