# SPDX-License-Identifier: MIT
# Runs of 2, 3 and 4 ranks are measured into one file; `cluster` fits its model to some of them and
# checks it on the others. How well it fits is not looked at: the sizes are too small for that. A
# file with a line that is none is refused.
#
#     cmake "-DMPIEXEC=mpiexec;-n" -DMEASURE=program -DCLUSTER=program -DWORK_DIR=folder
#           -P cluster.cmake
cmake_minimum_required(VERSION 3.25)

set(runs "${WORK_DIR}/cluster_runs.csv")
file(REMOVE "${runs}")
foreach(ranks 2 3 4)
  execute_process(
    COMMAND ${MPIEXEC} ${ranks} "${MEASURE}" --out "${runs}" --tokens 8 16 32
            --d-model 16 --repeats 1 RESULT_VARIABLE code OUTPUT_QUIET ERROR_VARIABLE said)
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "cluster_measure on ${ranks} ranks: ${code}\n${said}")
  endif()
endforeach()
file(STRINGS "${runs}" lines)
list(LENGTH lines count)
if(NOT count EQUAL 10)
  message(FATAL_ERROR "expected a line for each of 9 runs and one above: ${lines}")
endif()

execute_process(COMMAND "${CLUSTER}" --runs "${runs}" --devices 64 --drawn 1024
                RESULT_VARIABLE code OUTPUT_VARIABLE said)
foreach(expected "Fitted to 8 passes on 2 and 4 ranks" "Within 20 %: [0-9]+ of 10" "PREDICTION"
                 "\n +64 ")
  if(NOT code EQUAL 0 OR NOT said MATCHES "${expected}")
    message(FATAL_ERROR "cluster ended with ${code}, expected '${expected}' in what it says:\n${said}")
  endif()
endforeach()

file(APPEND "${runs}" "2,8,16,32,0.1\n")
execute_process(COMMAND "${CLUSTER}" --runs "${runs}" RESULT_VARIABLE code OUTPUT_QUIET
                ERROR_VARIABLE said)
if(code EQUAL 0 OR NOT said MATCHES "line 11 is '2,8,16,32,0.1', expected ranks,tokens")
  message(FATAL_ERROR "cluster ended with ${code} after a broken line: ${said}")
endif()
