# SPDX-License-Identifier: MIT
# train_lm on two ranks learns what it learns alone, with one display of results, and goes on from a
# checkpoint bit for bit.
cmake_minimum_required(VERSION 3.25)

file(REMOVE_RECURSE "${WORK_DIR}")
file(MAKE_DIRECTORY "${WORK_DIR}/b")
set(toy --layers 2 --d-model 32 --balance 0 --batch 4 --eval-tokens 1024 --generate 8 --threads 1
        --learning-rate 0.01 --selector sigmoid-top-k --shared 1 --steps 8)

# Sets `bits_${name}` to the validation result of a run, and `output_${name}`.
function(train name)
  execute_process(COMMAND ${ARGN} OUTPUT_VARIABLE output ERROR_VARIABLE error RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${name}: ${output}${error}")
  endif()
  string(REGEX MATCHALL "validation bits/byte: model [0-9.]+" found "${output}")
  list(LENGTH found count)
  if(NOT count EQUAL 1) # The first rank speaks for all.
    message(FATAL_ERROR "${name}: ${count} results, expected one: ${output}")
  endif()
  set(bits_${name} "${found}" PARENT_SCOPE)
  set(output_${name} "${output}${error}" PARENT_SCOPE)
endfunction()

train(alone "${PROGRAM}" ${toy})
train(together ${MPIEXEC} 2 "${PROGRAM}" ${toy} --save "${WORK_DIR}/a" --save-every 5)
if(NOT bits_alone STREQUAL bits_together)
  message(FATAL_ERROR "alone ${bits_alone}, on two ranks ${bits_together}")
endif()
string(REGEX MATCH "parameters: [^\n]*" parameters "${output_alone}")
foreach(what IN ITEMS "threads: 1 on each of 2 ranks" "${parameters}")
  string(FIND "${output_together}" "${what}" at)
  if(at EQUAL -1)
    message(FATAL_ERROR "no '${what}': ${output_together}")
  endif()
endforeach()

file(COPY "${WORK_DIR}/a/step-000000005" DESTINATION "${WORK_DIR}/b")
train(resumed ${MPIEXEC} 2 "${PROGRAM}" ${toy} --save "${WORK_DIR}/b" --resume "${WORK_DIR}/b")
file(GLOB_RECURSE files RELATIVE "${WORK_DIR}/a" "${WORK_DIR}/a/step-000000008/*")
list(LENGTH files count)
if(NOT count EQUAL 7) # Two files and an index of model and optimizer each, and the state.
  message(FATAL_ERROR "the checkpoint has ${count} files, expected 7: ${files}")
endif()
foreach(file IN LISTS files)
  execute_process(COMMAND "${CMAKE_COMMAND}" -E compare_files "${WORK_DIR}/a/${file}"
                          "${WORK_DIR}/b/${file}" RESULT_VARIABLE differs)
  if(differs)
    message(FATAL_ERROR "${file} differs between a run and the same, resumed")
  endif()
endforeach()

# One rank goes on from what two saved.
file(MAKE_DIRECTORY "${WORK_DIR}/c")
file(COPY "${WORK_DIR}/a/step-000000005" DESTINATION "${WORK_DIR}/c")
train(one ${MPIEXEC} 1 "${PROGRAM}" ${toy} --resume "${WORK_DIR}/c")
if(NOT bits_one STREQUAL bits_together)
  message(FATAL_ERROR "on two ranks ${bits_together}, on one from there ${bits_one}")
endif()
