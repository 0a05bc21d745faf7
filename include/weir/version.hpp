// SPDX-License-Identifier: MIT
/// \file
/// The version of the headers; CMake reads it from here.
#pragma once

#define WEIR_VERSION_MAJOR 0
#define WEIR_VERSION_MINOR 1
#define WEIR_VERSION_PATCH 0
