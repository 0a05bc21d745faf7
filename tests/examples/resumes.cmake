# SPDX-License-Identifier: MIT
# Fails unless PROGRAM (train_lm), stopped after two steps and resumed, ends with the checkpoint of
# the run that was not stopped, byte for byte.
#
#     cmake -DPROGRAM=... -DARGUMENTS=... -DWORK_DIR=... -P resumes.cmake
cmake_minimum_required(VERSION 3.25)

set(folder "${WORK_DIR}/resumed_runs")
file(REMOVE_RECURSE "${folder}")

function(train)
  execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS} --quiet --seed 7 ${ARGN} RESULT_VARIABLE result
                  OUTPUT_QUIET)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "train_lm ${ARGN}: exit code ${result}")
  endif()
endfunction()

# The learning rate depends on --steps, so that both runs are told the same number.
train(--steps 4 --save "${folder}/whole")
train(--steps 4 --save "${folder}/parts" --save-every 2)
file(REMOVE_RECURSE "${folder}/parts/step-000000004")
train(--steps 4 --save "${folder}/parts" --resume "${folder}/parts")
foreach(file model.safetensors optimizer.safetensors state.json)
  execute_process(COMMAND ${CMAKE_COMMAND} -E compare_files "${folder}/whole/step-000000004/${file}"
                          "${folder}/parts/step-000000004/${file}" RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(SEND_ERROR "${file} differs")
  endif()
endforeach()
