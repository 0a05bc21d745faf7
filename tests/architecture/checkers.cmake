# SPDX-License-Identifier: MIT
# Tests layering.cmake and umbrella.cmake on small trees made for the purpose in WORK_DIR.
cmake_minimum_required(VERSION 3.25)

function(header path)
  list(TRANSFORM ARGN PREPEND "#include " OUTPUT_VARIABLE lines)
  list(JOIN lines "\n" lines)
  file(WRITE "${WORK_DIR}/weir/${path}" "#pragma once\n${lines}\n")
endfunction()

# Runs a checker on the tree so far, which it must refuse with a message that contains `expected`,
# or accept if that is empty; then empties the tree.
function(expect checker expected)
  execute_process(
    COMMAND ${CMAKE_COMMAND} "-DINCLUDE_DIR=${WORK_DIR}" ${ARGN} -P "${CMAKE_CURRENT_LIST_DIR}/${checker}"
    RESULT_VARIABLE result ERROR_VARIABLE error)
  string(REGEX REPLACE "[ \n]+" " " error "${error}")
  string(FIND "${error}" "${expected}" at)
  if(expected STREQUAL "" AND NOT result EQUAL 0)
    message(SEND_ERROR "${checker} refuses a good tree: ${error}")
  elseif(NOT expected STREQUAL "" AND (result EQUAL 0 OR at EQUAL -1))
    message(SEND_ERROR "${checker} should say '${expected}', but: ${error}")
  endif()
  if(NOT ARGN)
    file(REMOVE_RECURSE "${WORK_DIR}")
  endif()
endfunction()

file(REMOVE_RECURSE "${WORK_DIR}")

header(version.hpp)
header(core/types.hpp <vector> <Eigen/Core> <weir/version.hpp>)
header(moe/balance/loss.hpp <weir/core/types.hpp> <weir/nn/linear.hpp> <weir/moe/routing.hpp>)
header(weir.hpp <weir/moe/balance/loss.hpp>)
expect(layering.cmake "")

header(ops/softmax.hpp <weir/moe/routing.hpp>)
expect(layering.cmake "weir/ops/softmax.hpp: ops must not include moe")

header(moe/layer.hpp "<weir/attention/latent.hpp>")
expect(layering.cmake "weir/moe/layer.hpp: moe must not include attention")

header(version.hpp <weir/core/types.hpp>)
expect(layering.cmake "version.hpp must not include core")

header(core/types.hpp <weir/weir.hpp>)
expect(layering.cmake "weir/core/types.hpp: neither")

header(util/misc.hpp <vector>)
expect(layering.cmake "weir/util/misc.hpp: folder 'util' has no place")

header(misc.hpp <vector>)
expect(layering.cmake "weir/misc.hpp: a header belongs into a folder")

header(core/types.hpp "\"error.hpp\"")
expect(layering.cmake "weir/core/types.hpp: neither")

header(io/json.hpp <nlohmann/json.hpp>)
expect(layering.cmake "")

header(parallel/mpi/ranks.hpp <mpi.h> <weir/core/types.hpp>)
expect(layering.cmake "")

header(parallel/placement.hpp <mpi.h>)
expect(layering.cmake "weir/parallel/placement.hpp: only parallel/mpi may include")

header(parallel/placement.hpp <weir/parallel/mpi/ranks.hpp>)
expect(layering.cmake "weir/parallel/placement.hpp: only parallel/mpi may include")

header(model/json.hpp <nlohmann/json.hpp>)
expect(layering.cmake "weir/model/json.hpp: neither")

expect(layering.cmake "no headers")

header(version.hpp)
header(core/types.hpp)
header(weir.hpp <weir/version.hpp> <weir/core/types.hpp>)
expect(umbrella.cmake "")

header(core/types.hpp)
header(core/error.hpp)
header(weir.hpp <weir/core/types.hpp>)
expect(umbrella.cmake "does not include weir/core/error.hpp")

header(core/types.hpp)
header(weir.hpp <weir/core/types.hpp> <weir/core/types.hpp>)
expect(umbrella.cmake "includes weir/core/types.hpp twice")

header(core/types.hpp)
expect(umbrella.cmake "weir.hpp is missing")

header(version.hpp)
header(ops/softmax.hpp)
header(core/types.hpp)
expect(umbrella.cmake "" -DWRITE=ON)
expect(umbrella.cmake "")
