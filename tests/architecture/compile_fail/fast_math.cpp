// SPDX-License-Identifier: MIT
// expects: weir does not compile with -ffast-math
// flags: -ffast-math
#include <weir/core/types.hpp>
