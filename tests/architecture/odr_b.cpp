// SPDX-License-Identifier: MIT
#include <weir/weir.hpp>

#include "odr.hpp"

const void* address_in_b() {
  return &weir::detail::ThreadPool::instance();
}

void set_threads_in_b(int count) {
  weir::set_threads(count);
}

int threads_in_b() {
  return weir::threads();
}
