// SPDX-License-Identifier: MIT
/// \file
/// Catch2, whichever major version is installed.
#pragma once

#ifdef WEIR_CATCH2_V2
#include <catch2/catch.hpp>

// GENERATE(variable, Temporary{}) would keep references, one of them to a dead temporary: such a
// list does not compile and has to name its type, GENERATE(as<T>{}, variable, Temporary{}).
namespace Catch::Generators {
template <typename T>
class SingleValueGenerator<T&>;
}  // namespace Catch::Generators
#else
#include <catch2/catch_approx.hpp>
#include <catch2/catch_template_test_macros.hpp>
#include <catch2/catch_test_macros.hpp>
#include <catch2/generators/catch_generators.hpp>
#include <catch2/generators/catch_generators_adapters.hpp>
#include <catch2/generators/catch_generators_range.hpp>
#include <catch2/matchers/catch_matchers.hpp>
using Catch::Approx;  // v2 already does this
#endif
