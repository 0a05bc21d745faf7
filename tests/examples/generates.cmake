# SPDX-License-Identifier: MIT
# Fails unless GENERATE lets a model write that TRAIN (train_lm) has saved: one prompt, several and
# a conversation, the same text each time.
#
#     cmake -DTRAIN=... -DARGUMENTS=... -DGENERATE=... -DWORK_DIR=... -P generates.cmake
cmake_minimum_required(VERSION 3.25)

set(folder "${WORK_DIR}/generated_from")
file(REMOVE_RECURSE "${folder}")
# Weights stay as they began: after a few steps, the model would write the most frequent byte alone,
# whatever it has read.
execute_process(COMMAND "${TRAIN}" ${ARGUMENTS} --learning-rate 0 --quiet --save "${folder}"
                RESULT_VARIABLE result OUTPUT_QUIET)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "train_lm: exit code ${result}")
endif()

# Sets `out` to what GENERATE prints, without its speed; INPUT is typed.
function(generate out)
  cmake_parse_arguments(ARG "" "INPUT" "" ${ARGN})
  file(WRITE "${folder}/input.txt" "${ARG_INPUT}")
  execute_process(COMMAND "${GENERATE}" "${folder}" --tokens 12 ${ARG_UNPARSED_ARGUMENTS}
                  INPUT_FILE "${folder}/input.txt" OUTPUT_VARIABLE text ERROR_VARIABLE errors
                  RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "generate ${ARGN}: exit code ${result}: ${errors}")
  endif()
  string(REGEX REPLACE ", [0-9.]+ tokens/s" "" text "${text}")
  set(${out} "${text}" PARENT_SCOPE)
endfunction()

function(expect_match text regex)
  if(NOT text MATCHES "${regex}")
    message(SEND_ERROR "expected '${regex}' in:\n${text}")
  endif()
endfunction()

generate(one --prompt "int main(")
generate(again --prompt "int main(" --threads 1)
expect_match("${one}" "^int main\\(")
expect_match("${one}" "----\n12 tokens, cache of [0-9]+ bytes a token\n$")
if(NOT one STREQUAL again)
  message(SEND_ERROR "one thread writes another text:\n${one}\n${again}")
endif()
generate(greedy --prompt "int" --temperature 0 --storage bf16)
expect_match("${greedy}" "^int")

# Narrower caches are smaller, and the widest is what there is without --cache.
generate(plain --prompt "int main(" --temperature 0)
set(last 1000000)
foreach(cache full bf16 int8 int6)
  generate(narrow --prompt "int main(" --temperature 0 --cache ${cache})
  expect_match("${narrow}" "^int main\\(.*----\n12 tokens, cache of [0-9]+ bytes a token\n$")
  if(cache STREQUAL full AND NOT narrow STREQUAL plain)
    message(SEND_ERROR "--cache full differs from no --cache:\n${narrow}\n${plain}")
  endif()
  string(REGEX MATCH "cache of ([0-9]+) bytes" bytes "${narrow}")
  set(bytes ${CMAKE_MATCH_1})
  if(NOT bytes LESS last OR bytes LESS 1)
    message(SEND_ERROR "--cache ${cache} takes ${bytes} bytes a token, expected less than ${last}")
  endif()
  set(last ${bytes})
endforeach()

generate(many --prompt "int main(" --prompt "#include")
expect_match("${many}" "---- 1\nint main\\(.*---- 2\n#include.*----\n24 tokens, cache of [0-9]+ bytes a token\n$")

# A line that is typed again behind /new has the same answer. Without, the model has read what came
# before, and at least one of its answers is another one.
generate(once --chat --temperature 0 INPUT "int\n/quit\n")
expect_match("${once}" "^Type a line")
string(FIND "${once}" "> " begin)
string(LENGTH "${once}" end)
math(EXPR length "${end} - ${begin} - 3") # Without the last "> " and its line feed.
string(SUBSTRING "${once}" 0 ${begin} head)
string(SUBSTRING "${once}" ${begin} ${length} answer)
generate(forgotten --chat --temperature 0 INPUT "int\n/new\nint\n/new\nint\n/quit\n")
if(NOT forgotten STREQUAL "${head}${answer}> ${answer}> ${answer}> \n")
  message(SEND_ERROR "expected the answer of\n${once}\nthree times in:\n${forgotten}")
endif()
generate(remembered --chat --temperature 0 INPUT "int\nint\nint\n/quit\n")
if(remembered STREQUAL "${head}${answer}${answer}${answer}> \n")
  message(SEND_ERROR "what was said does not matter:\n${remembered}")
endif()
generate(ended --chat INPUT "int")
expect_match("${ended}" "> ")

execute_process(COMMAND "${GENERATE}" "${folder}" RESULT_VARIABLE result ERROR_VARIABLE errors)
expect_match("${errors}" "^generate: nothing to do, expected --prompt, --ids or --chat\n$")
execute_process(COMMAND "${GENERATE}" "${folder}/none" --prompt a RESULT_VARIABLE result
                ERROR_VARIABLE errors)
expect_match("${errors}" "none: there is neither config.json nor a checkpoint\n$")
