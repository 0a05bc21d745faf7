# SPDX-License-Identifier: MIT
# Fails when a header includes upwards, includes something that is neither weir, Eigen nor part of
# the system, or lies in a folder that has no place in layers.cmake; or when one that is not in
# parallel/mpi includes MPI or a header of that folder.
#
#     cmake -DINCLUDE_DIR=include -P tests/architecture/layering.cmake
cmake_minimum_required(VERSION 3.25)
include("${CMAKE_CURRENT_LIST_DIR}/layers.cmake")
file(REAL_PATH "${INCLUDE_DIR}" INCLUDE_DIR)

file(GLOB_RECURSE headers RELATIVE "${INCLUDE_DIR}/weir" "${INCLUDE_DIR}/weir/*")
if(NOT headers)
  message(FATAL_ERROR "no headers in ${INCLUDE_DIR}/weir")
endif()

list(REMOVE_ITEM headers README.md) # the catalogue
foreach(header IN LISTS headers)
  if(NOT header MATCHES "\\.hpp$")
    message(SEND_ERROR "weir/${header}: not a .hpp file")
    continue()
  endif()
  if(header STREQUAL "weir.hpp")
    continue() # includes everything: umbrella.cmake looks after it
  endif()
  if(header MATCHES "^([^/]+)/")
    set(folder "${CMAKE_MATCH_1}")
    if(NOT folder IN_LIST layers)
      message(SEND_ERROR "weir/${header}: folder '${folder}' has no place in layers.cmake")
      continue()
    endif()
  elseif(header STREQUAL "version.hpp")
    set(folder "version.hpp")
    set(version.hpp)
  else()
    message(SEND_ERROR "weir/${header}: a header belongs into a folder")
    continue()
  endif()

  file(STRINGS "${INCLUDE_DIR}/weir/${header}" includes REGEX "^[ \t]*#[ \t]*include")
  foreach(line IN LISTS includes)
    if(line MATCHES "<(mpi\\.h|weir/parallel/mpi/.*)>" AND NOT header MATCHES "^parallel/mpi/")
      message(SEND_ERROR "weir/${header}: only parallel/mpi may include ${line}")
    endif()
    if(line MATCHES "<weir/io/" AND header MATCHES "^parallel/" AND NOT header MATCHES "/mpi/")
      message(SEND_ERROR "weir/${header}: only parallel/mpi may include ${line}")
    endif()
    if(line MATCHES "include[ \t]*<weir/([^/>]+)/")
      set(used "${CMAKE_MATCH_1}")
      if(NOT used STREQUAL folder AND NOT used IN_LIST ${folder})
        message(SEND_ERROR "weir/${header}: ${folder} must not include ${used}: ${line}")
      endif()
    elseif(header MATCHES "^(io|parallel/mpi)/" AND line MATCHES "include[ \t]*<nlohmann/json.hpp>")
      # the one that reads JSON
    elseif(line MATCHES "include[ \t]*<weir/version.hpp>|include[ \t]*<(Eigen|sys)/|include[ \t]*<[^/]+>")
      # everybody may
    else()
      message(SEND_ERROR "weir/${header}: neither <weir/...>, <Eigen/...> nor a system header: ${line}")
    endif()
  endforeach()
endforeach()
