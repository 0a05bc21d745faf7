# SPDX-License-Identifier: MIT
# generate on several ranks writes what it writes alone, one prompt or several: models of train_lm
# that one process or two ranks have saved, and a published family's.
cmake_minimum_required(VERSION 3.25)

file(REMOVE_RECURSE "${WORK_DIR}")
file(MAKE_DIRECTORY "${WORK_DIR}")
set(toy --layers 2 --d-model 32 --batch 4 --eval-tokens 512 --generate 8 --threads 1 --steps 1
        --learning-rate 0 --quiet --experts 5 --selector sigmoid-top-k --shared 1)
set(ENV{OMP_NUM_THREADS} 1)

function(run out)
  execute_process(COMMAND ${ARGN} OUTPUT_VARIABLE output ERROR_VARIABLE error
                  RESULT_VARIABLE result TIMEOUT 120 WORKING_DIRECTORY "${WORK_DIR}")
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${ARGN}: ${result}: ${output}${error}")
  endif()
  string(REGEX REPLACE ", [0-9.]+ tokens/s" "" output "${output}")
  # Open MPI gives ranks a terminal, on which progress is shown.
  string(REPLACE "\r\n" "\n" output "${output}")
  string(REGEX REPLACE "\r?[0-9]+ texts, [^-]*---- 1" "---- 1" output "${output}")
  set(${out} "${output}" PARENT_SCOPE)
endfunction()

# Fails unless the arguments have the same output on 1, 2 and 3 ranks as alone.
function(check_same)
  run(alone "${GENERATE}" --threads 1 --tokens 12 ${ARGN})
  if(NOT alone MATCHES "----\n[0-9]+ tokens, cache of [0-9]+ bytes a token\n$")
    message(FATAL_ERROR "no text: ${alone}")
  endif()
  foreach(ranks RANGE 1 3)
    run(together ${MPIEXEC} ${ranks} "${GENERATE}" --threads 1 --tokens 12 ${ARGN})
    if(NOT together STREQUAL alone)
      message(SEND_ERROR "${ARGN}: on ${ranks} ranks\n${together}\nalone\n${alone}")
    endif()
  endforeach()
endfunction()

run(ignored "${TRAIN}" ${toy} --save "${WORK_DIR}/by_one")
run(ignored ${MPIEXEC} 2 "${TRAIN}" ${toy} --save "${WORK_DIR}/by_two")
foreach(folder by_one by_two)
  check_same("${WORK_DIR}/${folder}" --prompt "int main(" --seed 3)
  check_same("${WORK_DIR}/${folder}" --prompt "int" --prompt "// The" --prompt "#include"
             --prompt "x" --seed 4)
endforeach()
check_same("${WORK_DIR}/by_two" --prompt "int" --storage plain)

run(ignored "${PRETRAINED}") # Saves small-olmoe.
check_same("${WORK_DIR}/small-olmoe" --ids "1 2 3" --storage bf16)
check_same("${WORK_DIR}/small-olmoe" --ids "1 2 3" --ids "7" --ids "5 9" --storage packed)

# What cannot be done on ranks is refused by all.
function(expect_refusal text)
  execute_process(COMMAND ${MPIEXEC} 2 "${GENERATE}" "${WORK_DIR}/by_one" ${ARGN}
                  OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result TIMEOUT 120)
  if(result EQUAL 0 OR NOT output MATCHES "${text}")
    message(SEND_ERROR "${ARGN}: expected '${text}', but: ${output}")
  endif()
endfunction()
expect_refusal("--chat: expected --prompt or --ids on several ranks" --chat)
expect_refusal("--expert-memory: expected 0 on several ranks" --prompt x --expert-memory 8
               --storage bf16)
