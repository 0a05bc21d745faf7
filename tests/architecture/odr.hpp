// SPDX-License-Identifier: MIT
/// \file
/// What odr_a.cpp asks of odr_b.cpp.
#pragma once

/// Where the other translation unit finds the pool of threads: there is one for the whole program.
const void* address_in_b();

/// Sets, in the other translation unit, the number of threads.
void set_threads_in_b(int count);

/// The number of threads that the other translation unit sees.
int threads_in_b();
