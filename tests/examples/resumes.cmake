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
foreach(precision fp32 bf16 fp8)
  set(runs "${folder}/${precision}")
  train(--precision ${precision} --steps 4 --save "${runs}/whole")
  train(--precision ${precision} --steps 4 --save "${runs}/parts" --save-every 2)
  file(REMOVE_RECURSE "${runs}/parts/step-000000004")
  train(--precision ${precision} --steps 4 --save "${runs}/parts" --resume "${runs}/parts")
  foreach(file model.safetensors optimizer.safetensors state.json)
    execute_process(COMMAND ${CMAKE_COMMAND} -E compare_files "${runs}/whole/step-000000004/${file}"
                            "${runs}/parts/step-000000004/${file}" RESULT_VARIABLE result)
    if(NOT result EQUAL 0)
      message(SEND_ERROR "${precision}: ${file} differs")
    endif()
  endforeach()
endforeach()

# A run goes on in its own precision.
execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS} --quiet --seed 7 --steps 5 --precision fp8 --resume
                        "${folder}/bf16/whole" RESULT_VARIABLE result ERROR_VARIABLE complained)
string(FIND "${complained}" "--precision: fp8, but " place)
if(result EQUAL 0 OR place EQUAL -1)
  message(SEND_ERROR "another precision: ${result}, ${complained}")
endif()
