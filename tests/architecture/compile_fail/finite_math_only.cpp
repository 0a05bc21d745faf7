// SPDX-License-Identifier: MIT
// expects: weir does not compile with -ffast-math
// flags: -ffinite-math-only
#include <weir/nn/linear.hpp>
