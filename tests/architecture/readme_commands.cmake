# SPDX-License-Identifier: MIT
# Runs what the section "Installing" of README.md tells users to type, in a copy of the sources in
# WORK_DIR that is also the home directory. Optimised less, so that it takes less time, and with
# GENERATOR, since there may be no make.
cmake_minimum_required(VERSION 3.25)

find_program(GPP g++)
if(NOT GPP OR NOT EXISTS /usr/include/eigen3)
  message("skipped: needs g++ and /usr/include/eigen3")
  return()
endif()

file(READ "${SOURCE_DIR}/README.md" text)
string(REGEX MATCH "\n## Installing\n.*" text "${text}")
string(REGEX REPLACE "\n## How .*" "" text "${text}")
string(REGEX MATCHALL "\n```sh\n[^`]*" blocks "${text}")
list(LENGTH blocks count)
if(NOT count EQUAL 2)
  message(FATAL_ERROR "README.md: 'Installing' has ${count} blocks of commands, expected 2")
endif()

file(REMOVE_RECURSE "${WORK_DIR}")
file(COPY "${SOURCE_DIR}/include" "${SOURCE_DIR}/examples" "${SOURCE_DIR}/CMakeLists.txt"
     DESTINATION "${WORK_DIR}/weir")
foreach(block IN LISTS blocks)
  string(REGEX REPLACE "^\n```sh\n" "" block "${block}")
  string(REPLACE "-O3 -march=native" "-O1" block "${block}")
  execute_process(COMMAND ${CMAKE_COMMAND} -E env "HOME=${WORK_DIR}" "CMAKE_GENERATOR=${GENERATOR}"
                          sh -e -c "${block}"
                  WORKING_DIRECTORY "${WORK_DIR}/weir" RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "README.md: does not work:\n${block}")
  endif()
endforeach()
execute_process(COMMAND "${WORK_DIR}/weir/quickstart" RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "quickstart: ${result}")
endif()
foreach(file include/weir/weir.hpp share/cmake/weir/weirConfig.cmake)
  if(NOT EXISTS "${WORK_DIR}/.local/${file}")
    message(FATAL_ERROR "cmake --install: ${file} is missing")
  endif()
endforeach()
