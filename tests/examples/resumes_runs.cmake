# SPDX-License-Identifier: MIT
# Fails unless PROGRAM, whose trainings are stopped after two steps and go on, ends with the
# checkpoints and the figures of trainings that are not stopped, and refuses to go on with other
# settings.
#
#     cmake -DPROGRAM=... -DARGUMENTS=... -DWORK_DIR=... -P resumes_runs.cmake
cmake_minimum_required(VERSION 3.25)

file(REMOVE_RECURSE "${WORK_DIR}")

function(run out)
  execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS} --threads 2 ${ARGN} RESULT_VARIABLE code
                  OUTPUT_VARIABLE said ERROR_VARIABLE complained)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${ARGN}: exit code ${code}: ${complained}")
  endif()
  string(REGEX REPLACE " +[0-9]+\\.[0-9]\n" "\n" said "${said}") # Seconds have one digit.
  set(${out} "${said}" PARENT_SCOPE)
endfunction()

run(whole --steps 4 --save "${WORK_DIR}/whole")
run(ignored --steps 4 --save "${WORK_DIR}/parts" --save-every 1 --stop-after 2)
run(parts --steps 4 --save "${WORK_DIR}/parts")
run(alone --steps 4)
if(NOT whole STREQUAL parts OR NOT whole STREQUAL alone)
  message(SEND_ERROR "not stopped:\n${whole}\nstopped:\n${parts}\nwithout checkpoints:\n${alone}")
endif()
file(GLOB_RECURSE files RELATIVE "${WORK_DIR}/whole" "${WORK_DIR}/whole/*/step-000000004/*")
list(LENGTH files count)
if(count LESS 6)
  message(SEND_ERROR "there are ${count} files of checkpoints: ${files}")
endif()
foreach(file IN LISTS files)
  execute_process(COMMAND ${CMAKE_COMMAND} -E compare_files "${WORK_DIR}/whole/${file}"
                          "${WORK_DIR}/parts/${file}" RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(SEND_ERROR "${file} differs")
  endif()
endforeach()

execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS} --steps 5 --save "${WORK_DIR}/whole"
                RESULT_VARIABLE code OUTPUT_QUIET ERROR_VARIABLE complained)
string(FIND "${complained}" "--steps: 5, but " place)
if(code EQUAL 0 OR place EQUAL -1)
  message(SEND_ERROR "another number of steps: ${code}: ${complained}")
endif()
