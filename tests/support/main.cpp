// SPDX-License-Identifier: MIT
#ifdef WEIR_CATCH2_V2
#define CATCH_CONFIG_MAIN
#include <catch2/catch.hpp>
#endif
