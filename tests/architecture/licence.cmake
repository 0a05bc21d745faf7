# SPDX-License-Identifier: MIT
# Fails unless every C++ file begins with its licence, and every header goes on with what it is for.
cmake_minimum_required(VERSION 3.25)

set(files)
foreach(folder include tests examples benchmarks)
  file(GLOB_RECURSE more RELATIVE "${SOURCE_DIR}" "${SOURCE_DIR}/${folder}/*.hpp"
       "${SOURCE_DIR}/${folder}/*.cpp")
  list(APPEND files ${more})
endforeach()
if(NOT files)
  message(FATAL_ERROR "no C++ files in ${SOURCE_DIR}")
endif()

foreach(name IN LISTS files)
  file(READ "${SOURCE_DIR}/${name}" text LIMIT 4000)
  if(NOT text MATCHES "^// SPDX-License-Identifier: MIT\n")
    message(SEND_ERROR "${name}: the first line should be // SPDX-License-Identifier: MIT")
  elseif(name MATCHES "\\.hpp$" AND NOT text MATCHES "^[^\n]*\n/// .file\n(///[^\n]*\n)+#pragma once\n")
    message(SEND_ERROR "${name}: should go on with /// \\file, what it is for, and #pragma once")
  endif()
endforeach()
