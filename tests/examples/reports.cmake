# SPDX-License-Identifier: MIT
# Fails unless TRAIN (train_lm) keeps a page up to date, and REPORT (routing_report) writes pages,
# tables and traces of what TRAIN has saved, and refuses what it cannot do.
#
#     cmake -DTRAIN=... -DREPORT=... -DWORK_DIR=... -DSOURCE_DIR=... -P reports.cmake
cmake_minimum_required(VERSION 3.25)

file(REMOVE_RECURSE "${WORK_DIR}")
file(MAKE_DIRECTORY "${WORK_DIR}")

function(run out)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY "${WORK_DIR}" OUTPUT_VARIABLE said
                  ERROR_VARIABLE errors RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${ARGN}: exit code ${result}: ${errors}")
  endif()
  set(${out} "${said}" PARENT_SCOPE)
endfunction()

function(expect_match text regex)
  if(NOT text MATCHES "${regex}")
    string(SUBSTRING "${text}" 0 3000 text)
    message(SEND_ERROR "expected '${regex}' in:\n${text}")
  endif()
endfunction()

run(trained "${TRAIN}" --steps 4 --layers 4 --d-model 32 --d-hidden 32 --batch 4 --context 64
    --capacity-factor 1 --selector sigmoid-top-k --eval-tokens 512 --eval-every 2 --generate 0 --quiet
    --save run --save-every 2 --report live)
file(READ "${WORK_DIR}/live/report.json" live)
string(JSON steps LENGTH "${live}" training step)
string(JSON running GET "${live}" training running)
string(JSON losses GET "${live}" training losses)
string(JSON bias GET "${live}" training layers 1 bias 3)
string(JSON logit GET "${live}" training layers 1 logit 3)
string(JSON validation GET "${live}" training validation 3)
if(NOT steps EQUAL 4 OR running OR NOT losses MATCHES "switch" OR NOT validation GREATER 1)
  message(SEND_ERROR "report.json has ${steps} steps, ${running}, ${losses}, ${validation}")
endif()
if(NOT bias GREATER 0 OR NOT logit GREATER 0)
  message(SEND_ERROR "report.json has the bias ${bias} and the logit ${logit}")
endif()

file(WRITE "${WORK_DIR}/words.txt" "")
foreach(i RANGE 60)
  file(APPEND "${WORK_DIR}/words.txt" "Die Würde des Menschen ist unantastbar.\n")
endforeach()
set(texts "C++=${SOURCE_DIR}/examples" words.txt)
run(said "${REPORT}" run ${texts} --tokens 1024 --context 64 --out one --trace one.trace
    --replicates 20)
expect_match("${said}" "wrote one.html \\([0-9]+ KB\\), one.json and one.csv")
expect_match("${said}" "neighbouring tokens choose the same first expert")
file(READ "${WORK_DIR}/one.html" page)
expect_match("${page}" "^<!doctype html>")
foreach(outside "src=" "http://[^w]" "https://" "@import" "url\\(")
  if(page MATCHES "${outside}")
    message(SEND_ERROR "the page has '${CMAKE_MATCH_0}', expected nothing from outside")
  endif()
endforeach()
file(STRINGS "${WORK_DIR}/one.csv" lines)
list(GET lines 0 head)
list(LENGTH lines count)
expect_match("${head}" "^model,statistic,layer,group,expert,value,low,high,chance$")
if(count LESS 300)
  message(SEND_ERROR "one.csv has ${count} lines")
endif()
expect_match("${lines}" "run,repeat_first,layers.1.moe,words,,[01][.0-9]*,[01][.0-9]*,[01][.0-9]*,0.125")
file(READ "${WORK_DIR}/one.json" json)
string(JSON domain GET "${json}" domains 1)
string(JSON layer GET "${json}" models 0 layers 1 name)
string(JSON chance GET "${json}" models 0 repeat 1 any 0 3)
if(NOT domain STREQUAL "words" OR NOT layer STREQUAL "layers.3.moe")
  message(SEND_ERROR "one.json has the text '${domain}' and the layer '${layer}'")
endif()
expect_match("${chance}" "^0.464[23]")
file(STRINGS "${WORK_DIR}/one.trace.csv" records)
list(LENGTH records count)
string(JSON tokens LENGTH "${json}" text ids)
math(EXPR expected "2 * ${tokens} + 1")
if(NOT count EQUAL expected)
  message(SEND_ERROR "one.trace.csv has ${count} lines, expected ${expected}")
endif()

run(said "${REPORT}" run/step-000000002 ${texts} --against run/step-000000004 --tokens 512 --context 64 --out two
    --replicates 10)
expect_match("${said}" "The two models choose the same first expert for [0-9]+ % of the tokens")
run(said "${REPORT}" run ${texts} --tokens 512 --context 64 --text --layer 1 --replicates 10)
expect_match("${said}" "layers.1.moe  load .*max/mean")
expect_match("${said}" "same first expert as the token before: [0-9.]+ % \\([0-9.]+ to [0-9.]+, by chance 12.5\\)")
expect_match("${said}" "first experts in layers.3.moe:.*---- words.*{[0-7]}")

function(expect_refusal message)
  execute_process(COMMAND "${REPORT}" ${ARGN} WORKING_DIRECTORY "${WORK_DIR}" OUTPUT_QUIET
                  ERROR_VARIABLE errors RESULT_VARIABLE result)
  string(FIND "${errors}" "${message}" place)
  if(result EQUAL 0 OR place EQUAL -1)
    message(SEND_ERROR "${ARGN}: expected '${message}', got ${result}: ${errors}")
  endif()
endfunction()

run(dense "${TRAIN}" --steps 2 --layers 1 --dense --d-model 32 --batch 4 --context 64 --eval-tokens 512
    --generate 0 --quiet --save dense --report live_dense)
run(other "${TRAIN}" --steps 2 --layers 2 --d-model 32 --batch 4 --context 64 --eval-tokens 512
    --generate 0 --quiet --save other)
expect_refusal("no layer of the model has experts" dense words.txt)
expect_refusal("they cannot stand side by side" run words.txt --against other --tokens 64)
expect_refusal("no such file or folder: nothing" run nothing)
expect_refusal("there is neither config.json nor a checkpoint" words words.txt)
expect_refusal("--layer: 7, expected less than 2" run words.txt --text --layer 7 --tokens 64)
