# SPDX-License-Identifier: MIT
# Fails unless PROGRAM, whose training PART has lost its last checkpoint, goes on to the checkpoints
# and the table of a run that was not stopped, and refuses to go on with another SETTING.
#
#     cmake -DPROGRAM=... -DARGUMENTS=... -DPART=... -DSETTING="--steps;9" -DWORK_DIR=... -P continues.cmake
cmake_minimum_required(VERSION 3.25)

file(REMOVE_RECURSE "${WORK_DIR}")

function(run out)
  execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS} --quiet ${ARGN} OUTPUT_VARIABLE said
                  ERROR_VARIABLE complained RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${PROGRAM} ${ARGN}: exit code ${result}: ${complained}")
  endif()
  # Apart from seconds and bytes in a second.
  string(REGEX REPLACE " +[0-9]+[.][0-9]\n" "\n" said "${said}")
  string(REGEX REPLACE " +[0-9,]+ +" " " said "${said}")
  set(${out} "${said}" PARENT_SCOPE)
endfunction()

run(whole --save "${WORK_DIR}/whole" --threads 1)
run(parts --save "${WORK_DIR}/parts" --save-every 1 --threads 2)
file(GLOB checkpoints "${WORK_DIR}/parts/${PART}/step-*")
list(LENGTH checkpoints count)
if(count LESS 2)
  message(FATAL_ERROR "${PART} has ${count} checkpoints, expected 2")
endif()
list(GET checkpoints -1 last)
file(REMOVE_RECURSE "${last}")
run(again --save "${WORK_DIR}/parts")
if(NOT EXISTS "${last}")
  message(FATAL_ERROR "${last} was not made again")
endif()

file(GLOB_RECURSE files RELATIVE "${WORK_DIR}/whole" "${WORK_DIR}/whole/*")
list(LENGTH files count)
if(count LESS 9)
  message(FATAL_ERROR "there are ${count} files, expected at least three checkpoints of three")
endif()
foreach(file IN LISTS files)
  execute_process(COMMAND ${CMAKE_COMMAND} -E compare_files "${WORK_DIR}/whole/${file}"
                          "${WORK_DIR}/parts/${file}" RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(SEND_ERROR "${file} differs")
  endif()
endforeach()
foreach(other parts again)
  if(NOT whole STREQUAL ${other})
    message(SEND_ERROR "the whole run says\n${whole}\nthe other one\n${${other}}")
  endif()
endforeach()

execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS} --quiet --save "${WORK_DIR}/parts" ${SETTING}
                ERROR_VARIABLE complained OUTPUT_QUIET RESULT_VARIABLE result)
list(GET SETTING 0 name)
string(FIND "${complained}" "${name}: " place)
if(result EQUAL 0 OR place EQUAL -1)
  message(SEND_ERROR "${SETTING}: ${result}, ${complained}")
endif()
