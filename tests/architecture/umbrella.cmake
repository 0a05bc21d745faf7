# SPDX-License-Identifier: MIT
# Fails unless <weir/weir.hpp> includes every other header exactly once, except those of io and of
# parallel, which need a JSON library and MPI or cost compile time that few programs have a use for.
# With -DWRITE=ON, writes it:
#
#     cmake -DINCLUDE_DIR=include -DWRITE=ON -P tests/architecture/umbrella.cmake
cmake_minimum_required(VERSION 3.25)
include("${CMAKE_CURRENT_LIST_DIR}/layers.cmake")
file(REAL_PATH "${INCLUDE_DIR}" INCLUDE_DIR)

set(umbrella "${INCLUDE_DIR}/weir/weir.hpp")
file(GLOB_RECURSE found RELATIVE "${INCLUDE_DIR}" "${INCLUDE_DIR}/weir/*.hpp")
list(REMOVE_ITEM found weir/weir.hpp)
list(FILTER found EXCLUDE REGEX "^weir/(io|parallel)/")
list(SORT found)
set(headers)
foreach(layer IN LISTS layers)
  set(members ${found})
  list(FILTER members INCLUDE REGEX "^weir/${layer}/")
  list(APPEND headers ${members})
endforeach()
list(REMOVE_ITEM found ${headers})
list(APPEND headers ${found})

if(WRITE)
  set(text "// SPDX-License-Identifier: MIT
/// \\file
/// All of weir, lowest layer first. A program compiles faster with the headers it uses.
#pragma once

// clang-format off
")
  set(last "")
  foreach(header IN LISTS headers)
    string(REGEX MATCH "^weir/[^/]+/" layer "${header}")
    if(last AND NOT layer STREQUAL last)
      string(APPEND text "\n")
    endif()
    set(last "${layer}")
    string(APPEND text "#include <${header}>\n")
  endforeach()
  string(APPEND text "// clang-format on\n")
  file(WRITE "${umbrella}" "${text}")
  return()
endif()

if(NOT EXISTS "${umbrella}")
  message(FATAL_ERROR "${umbrella} is missing")
endif()
file(STRINGS "${umbrella}" lines REGEX "^[ \t]*#[ \t]*include")
foreach(line IN LISTS lines)
  string(REGEX REPLACE "^[ \t]*#[ \t]*include[ \t]*[<\"](.*)[>\"].*" "\\1" included "${line}")
  if(NOT included IN_LIST headers)
    message(SEND_ERROR "weir/weir.hpp includes ${included} twice, or there is no such header")
  endif()
  list(REMOVE_ITEM headers "${included}")
endforeach()
foreach(header IN LISTS headers)
  message(SEND_ERROR "weir/weir.hpp does not include ${header}")
endforeach()
