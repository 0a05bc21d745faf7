# SPDX-License-Identifier: MIT
# Fails unless PLOT draws and tabulates moe.json and peers.json of this folder as worked out by hand,
# and turns away what is not Google Benchmark's.
cmake_minimum_required(VERSION 3.25)

set(here "${CMAKE_CURRENT_LIST_DIR}")

function(expect what text part)
  string(FIND "${text}" "${part}" place)
  if(place EQUAL -1)
    message(SEND_ERROR "${what} lacks ${part}\n${text}")
  endif()
endfunction()

function(expect_refusal message)
  execute_process(COMMAND "${PLOT}" ${ARGN} RESULT_VARIABLE result ERROR_VARIABLE printed
                  OUTPUT_QUIET)
  if(NOT result EQUAL 1)
    message(SEND_ERROR "plot ${ARGN} ended with ${result}, expected 1")
  endif()
  expect("what plot ${ARGN} says" "${printed}" "${message}")
endfunction()

function(plot output)
  execute_process(COMMAND "${PLOT}" "${here}/moe.json" "${here}/peers.json" ${ARGN}
                  OUTPUT_VARIABLE printed RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "plot ${ARGN} ended with ${result}")
  endif()
  set(${output} "${printed}" PARENT_SCOPE)
endfunction()

# With the most threads and uniform load alone; of rows that are there twice, the last.
plot(tables --markdown)
if(NOT tables STREQUAL "| shape | tokens | fp32 | bf16 |
| --- | ---: | ---: | ---: |
| A | 1 | 15 GFLOP/s, 50 % of memory | 30 GFLOP/s, 100 % of memory |
| A | 2048, training | 390 GFLOP/s, 80 % of arithmetic |  |

| shape | tokens | Eigen fp32 | oneDNN fp32 | oneDNN bf16 |
| --- | ---: | ---: | ---: | ---: |
| A | 1 | 4.00× | 0.50× | 1.50× |

")
  message(SEND_ERROR "not the expected tables:\n${tables}")
endif()

plot(picture)
expect("the picture" "${picture}"
       "Processor &lt;1> &amp; \"Sons\" · 2 threads · fp32 400 GFLOP/s · oneDNN 9.9.9 · 2026-03-05<")
foreach(meaning "A, 1, fp32: 15 GFLOP/s, 50 % of memory" "A, 1, bf16: 30 GFLOP/s, 100 % of memory"
        "A, 2048, training, fp32: 390 GFLOP/s, 80 % of arithmetic"
        "A, 1, oneDNN fp32: 0.50×" "A, 1, Eigen fp32: 4.00×" "A, 1, oneDNN bf16: 1.50×")
  expect("the picture" "${picture}" "<title>${meaning}</title>")
endforeach()
string(REGEX MATCHALL "class='bar " bars "${picture}")
list(LENGTH bars count)
if(NOT count EQUAL 6)
  message(SEND_ERROR "the picture has ${count} bars, expected 6")
endif()

# Half of the limit is half as long; on the logarithmic scale 4 is twice as far from 1 as 0.5 is.
function(width_of meaning result)
  string(REGEX MATCH "width='([0-9]+)\\.[0-9]'[^\n]*<title>[^\n]*${meaning}" found "${picture}")
  set(${result} "${CMAKE_MATCH_1}" PARENT_SCOPE)
endfunction()
function(expect_twice half whole)
  width_of("${half}" short)
  width_of("${whole}" long)
  math(EXPR difference "${long} - 2 * ${short}")
  if(difference LESS -1 OR difference GREATER 1 OR short EQUAL 0)
    message(SEND_ERROR "the bar of ${half} is ${short} wide, that of ${whole} ${long}, expected twice that")
  endif()
endfunction()
expect_twice(" 50 % of memory" " 100 % of memory")
expect_twice("fp32: 0.50×" "fp32: 4.00×")

expect_refusal("plot.cmake: is not the JSON of Google Benchmark" "${here}/plot.cmake")
file(WRITE "${WORK_DIR}/other.json" "{\"context\": {}, \"benchmarks\": 3}")
expect_refusal("other.json: is not the JSON of Google Benchmark" "${WORK_DIR}/other.json")
file(WRITE "${WORK_DIR}/other.json" "{\"context\": {}, \"benchmarks\": []}")
expect_refusal("no rows of moe_bench or peers_bench" "${WORK_DIR}/other.json")
expect_refusal("nowhere.json: cannot be read" "${WORK_DIR}/nowhere.json")
