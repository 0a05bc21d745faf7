# SPDX-License-Identifier: MIT
# Fails unless PROGRAM (train_lm) mixes texts by weights that change, goes on with the same windows
# when it is resumed, trains on a text larger than its memory, and refuses what it cannot do.
#
#     cmake -DPROGRAM=... -DARGUMENTS=... -DWORK_DIR=... -P mixes.cmake
cmake_minimum_required(VERSION 3.25)

file(REMOVE_RECURSE "${WORK_DIR}")
file(MAKE_DIRECTORY "${WORK_DIR}")
set(lines "")
foreach(i RANGE 300)
  string(APPEND lines "line ${i} of the first text\n")
endforeach()
file(WRITE "${WORK_DIR}/A" "${lines}")
string(REPLACE "first text" "OTHER TEXT, which is longer" lines "${lines}")
file(WRITE "${WORK_DIR}/B" "${lines}")
file(WRITE "${WORK_DIR}/C=1" "${lines}")
file(WRITE "${WORK_DIR}/empty" "")
file(WRITE "${WORK_DIR}/one" "x")

function(train)
  set(seed --seed 7)
  if(--seed IN_LIST ARGN)
    set(seed "")
  endif()
  execute_process(COMMAND "${PROGRAM}" ${ARGUMENTS} --quiet ${seed} --batch 4 --context 16 ${ARGN}
                  WORKING_DIRECTORY "${WORK_DIR}" RESULT_VARIABLE code OUTPUT_VARIABLE said
                  ERROR_VARIABLE complained)
  set(code "${code}" PARENT_SCOPE)
  set(said "${said}" PARENT_SCOPE)
  set(complained "${complained}" PARENT_SCOPE)
endfunction()

function(expect_success)
  train(${ARGN})
  if(NOT code EQUAL 0)
    message(FATAL_ERROR "${ARGN}: ${code}: ${complained}")
  endif()
  set(said "${said}" PARENT_SCOPE)
endfunction()

# expect_refusal("message" argument...)
function(expect_refusal message)
  train(${ARGN})
  string(FIND "${complained}" "${message}" place)
  string(LENGTH "${complained}" length)
  if(code EQUAL 0 OR place EQUAL -1 OR length GREATER 400)
    message(SEND_ERROR "${ARGN}: expected '${message}', got ${code}:\n${complained}")
  endif()
endfunction()

set(mix --text A=0.75 --text B=0.25 --mix-at 0.5:A=0.25,B=0.75)

# Ten steps of four windows: 5 * 3 + 5 * 1 of A, 5 * 1 + 5 * 3 of B.
expect_success(${mix} --steps 10)
foreach(row "75 % 25 % +20 +[0-9.]+ +[0-9.]+ +[0-9.]+  A\n" "25 % 75 % +20 +[0-9.]+ +[0-9.]+ +[0-9.]+  B\n")
  if(NOT said MATCHES "${row}")
    message(SEND_ERROR "expected '${row}' in:\n${said}")
  endif()
endforeach()

# The windows of a run that is resumed before and after the weights change are those of one that is
# not: so is everything else.
expect_success(${mix} --steps 6 --save whole)
foreach(stop 2 4)
  expect_success(${mix} --steps 6 --save parts-${stop} --save-every 2)
  foreach(later RANGE ${stop} 5)
    math(EXPR later "${later} + 1")
    file(REMOVE_RECURSE "${WORK_DIR}/parts-${stop}/step-00000000${later}")
  endforeach()
  expect_success(${mix} --steps 6 --save parts-${stop} --resume parts-${stop})
  foreach(file model.safetensors optimizer.safetensors state.json)
    execute_process(
      COMMAND ${CMAKE_COMMAND} -E compare_files "${WORK_DIR}/whole/step-000000006/${file}"
              "${WORK_DIR}/parts-${stop}/step-000000006/${file}" RESULT_VARIABLE result)
    if(NOT result EQUAL 0)
      message(SEND_ERROR "resumed at ${stop}: ${file} differs")
    endif()
  endforeach()
endforeach()

# What would read other windows is no resumption.
expect_refusal("--text: A=0.7,B=0.3, but " --text A=0.7 B=0.3 --mix-at 0.5:A=0.25,B=0.75 --steps 6
               --resume whole)
expect_refusal("--mix-at: nothing, but " --text A=0.75 B=0.25 --steps 6 --resume whole)
expect_refusal("--steps: 9, but " ${mix} --steps 9 --resume whole)
expect_refusal("--seed: 8, but " ${mix} --steps 6 --seed 8 --resume whole)
expect_refusal("--text: without weights, but " --text A B --steps 6 --resume whole)
expect_success(--text A B --steps 2 --save plain)
expect_refusal("--text: A=0.75,B=0.25, but " ${mix} --steps 6 --resume plain)
file(APPEND "${WORK_DIR}/B" "more")
expect_refusal("--text B: " ${mix} --steps 6 --resume whole)

# A path that exists is one, whatever its name; texts that the program knows have a name.
expect_success(--text C=1 --steps 1)
expect_success(--text headers=0.5 readmes=0.5 --steps 1)

expect_refusal("--text: A=-1, expected a weight >= 0" --text A=-1 B=1)
expect_refusal("--text: A=nan, expected a weight >= 0" --text A=nan B=1)
expect_refusal("--text: B=0, expected a weight above 0" --text A=0 B=0)
expect_refusal("--text: A=2, expected each text once" --text A=1 A=2)
expect_refusal("--text: B, expected a weight, B=WEIGHT, as the other texts have" --text A=1 B)
expect_refusal("no such file or folder: D" --text A=1 D=1)
expect_refusal("no such file or folder: A=x" --text A=x)
expect_refusal("empty is too short: 5 % of it are 0 bytes, less than --context" --text A=1 empty=1)
expect_refusal("one is too short: 5 % of it are 0 bytes, less than --context" --text A=1 one=1)
expect_refusal("the text is too short: 5 % of it are 0 bytes, less than --context" --text one)
expect_refusal("--mix-at: 0.5:A=1, expected texts with weights" --text A --mix-at 0.5:A=1)
set(texts --text A=1 B=1)
set(form "expected SHARE:NAME=WEIGHT,NAME=WEIGHT with a share between 0 and 1")
foreach(bad A=1,B=1 1:A=1,B=1 0:A=1,B=1 x:A=1,B=1 0.5:A,B=1 0.5)
  expect_refusal("--mix-at: ${bad}, ${form}" ${texts} --mix-at ${bad})
endforeach()
expect_refusal("--mix-at: 0.5:A=1, expected a weight for B, too" ${texts} --mix-at 0.5:A=1)
expect_refusal("--mix-at: 0.5:A=1,C=1, expected names as in --text, which has no C" ${texts}
               --mix-at 0.5:A=1,C=1)
expect_refusal("--mix-at: 0.5:A=1,A=1, expected each text once" ${texts} --mix-at 0.5:A=1,A=1)
expect_refusal("--mix-at: 0.5:A=1,B=-1, expected a weight >= 0" ${texts} --mix-at 0.5:A=1,B=-1)
expect_refusal("--mix-at: 0.5:A=0,B=0, expected a weight above 0" ${texts} --mix-at 0.5:A=0,B=0)
expect_refusal("--mix-at: 0.01:A=1,B=2 begins after step 0 of 10, expected a step between" ${texts}
               --steps 10 --mix-at 0.01:A=1,B=2)
expect_refusal("--mix-at: 0.52:A=1,B=2 begins after step 5 of 10, expected a step between" ${texts}
               --steps 10 --mix-at 0.5:A=1,B=2 --mix-at 0.52:A=1,B=2)

# A text of 12 GB, all of it holes, beside one that is not, in 1 GB of address space.
find_program(bash bash)
find_program(truncate truncate)
if(bash AND truncate)
  execute_process(COMMAND "${truncate}" -s 12G "${WORK_DIR}/huge" RESULT_VARIABLE result)
  set(limited "${bash}" -c "ulimit -v 1000000 && exec \"$@\"" limited "${PROGRAM}")
  execute_process(COMMAND ${limited} --version RESULT_VARIABLE runs OUTPUT_QUIET ERROR_QUIET)
  if(result EQUAL 0 AND runs EQUAL 0)  # Sanitizers need more.
    foreach(texts "huge=0.5;A=0.5" "huge")
      execute_process(COMMAND ${limited} ${ARGUMENTS} --quiet --threads 2 --steps 3 --text ${texts}
                      WORKING_DIRECTORY "${WORK_DIR}" RESULT_VARIABLE code OUTPUT_VARIABLE said
                      ERROR_VARIABLE complained)
      if(NOT code EQUAL 0 OR NOT said MATCHES "order-2 [0-9.]+ \\(the first 128 MiB\\)")
        message(SEND_ERROR "12 GB: ${code}: ${said}${complained}")
      endif()
    endforeach()
  endif()
  file(REMOVE "${WORK_DIR}/huge")
endif()
