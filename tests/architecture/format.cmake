# SPDX-License-Identifier: MIT
# Fails unless clang-format would leave every C++ file as it is.
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

execute_process(COMMAND "${CLANG_FORMAT}" --dry-run ${files} WORKING_DIRECTORY "${SOURCE_DIR}"
                RESULT_VARIABLE result ERROR_VARIABLE findings)
string(REGEX MATCHALL "[^\n]+:[0-9]+:[0-9]+: warning" findings "${findings}")
list(TRANSFORM findings REPLACE ":.*" "")
list(REMOVE_DUPLICATES findings)
if(findings OR NOT result EQUAL 0)
  list(JOIN findings " " findings)
  message(FATAL_ERROR "clang-format has something to change: clang-format -i ${findings}")
endif()
