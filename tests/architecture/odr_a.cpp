// SPDX-License-Identifier: MIT
// Includes all of weir, as odr_b.cpp does: the two link only if every definition is inline, and
// share the library's one setting.
#include <weir/weir.hpp>

#include "odr.hpp"

int main() {
  if (address_in_b() != &weir::detail::ThreadPool::instance()) return 1;
  set_threads_in_b(weir::hardware_threads());
  if (weir::threads() != weir::hardware_threads()) return 2;
  weir::set_threads(1);
  return threads_in_b() == 1 ? 0 : 3;
}
