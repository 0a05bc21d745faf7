// SPDX-License-Identifier: MIT
/// \file
/// Catch2, whichever major version is installed.
#pragma once

#ifdef WEIR_CATCH2_V2
#include <catch2/catch.hpp>
#else
#include <catch2/catch_approx.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_adapters.hpp>
using Catch::Approx;  // v2 already does this
#endif
