# SPDX-License-Identifier: MIT
# Fails unless two runs of PROGRAM, on one thread and on two, print and write the same figures, down
# to the last digit; only times may differ.
cmake_minimum_required(VERSION 3.25)

foreach(threads 1 2)
  set(metrics "${WORK_DIR}/metrics-${threads}.jsonl")
  execute_process(
    COMMAND "${PROGRAM}" --threads ${threads} --seed 5 --metrics "${metrics}" ${ARGUMENTS}
    OUTPUT_VARIABLE printed
    RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${PROGRAM} ended with ${result}")
  endif()
  file(READ "${metrics}" written)
  set(figures_${threads} "${printed}\n${written}")
  string(REGEX REPLACE "threads: [0-9]+|trained for [0-9.]+ s|[0-9.]+k tokens/s" ""
                       figures_${threads} "${figures_${threads}}")
  string(REGEX REPLACE "\"(tokens_per_second|seconds)\":[0-9.e+-]+" "" figures_${threads}
                       "${figures_${threads}}")
endforeach()

if(NOT figures_1 MATCHES "validation bits/byte: model [0-9.]+ \\| order-0 [0-9.]+ \\| order-1 ")
  message(FATAL_ERROR "no result line in:\n${figures_1}")
endif()
if(NOT figures_1 STREQUAL figures_2)
  message(FATAL_ERROR "one thread:\n${figures_1}\ntwo threads:\n${figures_2}")
endif()
