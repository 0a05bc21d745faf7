# SPDX-License-Identifier: MIT
# Fails unless PLOT draws and tabulates moe.json and peers.json of this folder as worked out by hand,
# and turns away what is not Google Benchmark's.
cmake_minimum_required(VERSION 3.25)

set(here "${CMAKE_CURRENT_LIST_DIR}")
set(svg "${WORK_DIR}/plot.svg")

function(expect what text part)
  string(FIND "${text}" "${part}" place)
  if(place EQUAL -1)
    message(SEND_ERROR "${what} lacks ${part}\n${text}")
  endif()
endfunction()

function(expect_refusal message)
  execute_process(COMMAND "${PLOT}" ${ARGN} --svg "${svg}" RESULT_VARIABLE result
                  ERROR_VARIABLE printed OUTPUT_QUIET)
  if(NOT result EQUAL 1)
    message(SEND_ERROR "plot ${ARGN} ended with ${result}, expected 1")
  endif()
  expect("what plot ${ARGN} says" "${printed}" "${message}")
endfunction()

execute_process(COMMAND "${PLOT}" "${here}/moe.json" "${here}/peers.json" --markdown --svg "${svg}"
                OUTPUT_VARIABLE tables RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "plot ended with ${result}")
endif()

# With the most threads and uniform load alone; of rows that are there twice, the median.
expect("the table of limits" "${tables}" "| shape | tokens | precision | ms | GFLOP/s | % of limit | bound by |
| --- | ---: | --- | ---: | ---: | ---: | --- |
| A | 1 | fp32 | 2.00 | 15 | 50 | memory |
| A | 1 | bf16 | 1.00 | 30 | 100 | memory |
| A | 2048 | fp32, training | 700.00 | 390 | 80 | arithmetic |

")
expect("the table of peers" "${tables}" "| shape | tokens | precision | oneDNN 9.9.9 | Eigen |
| --- | ---: | --- | ---: | ---: |
| A | 1 | fp32 | 0.50× | 4.00× |
| A | 1 | bf16 | 1.50× |  |
")

file(READ "${svg}" picture)
expect("the picture" "${picture}" "Processor &lt;1&gt; &amp; &quot;Sons&quot; · 2 threads · fp32 400 GFLOP/s · 5 Mar 2026")
foreach(meaning "A, 1 token, fp32: 50.0 % of the limit, which is memory"
        "A, 1 token, bf16: 100.0 % of the limit, which is memory"
        "A, 2048 tokens, training, fp32: 80.0 % of the limit, which is arithmetic"
        "A, 1 token, fp32: 0.50 times as fast as oneDNN"
        "A, 1 token, fp32: 4.00 times as fast as Eigen"
        "A, 1 token, bf16: 1.50 times as fast as oneDNN")
  expect("the picture" "${picture}" "<title>${meaning}</title>")
endforeach()
string(REGEX MATCHALL "class=\"bar\"" bars "${picture}")
list(LENGTH bars count)
if(NOT count EQUAL 6)
  message(SEND_ERROR "the picture has ${count} bars, expected 6")
endif()

# Half of the limit is half as long; on the logarithmic scale 4 is twice as far from 1 as 0.5 is.
function(width_of meaning result)
  string(REGEX MATCH "width=\"([0-9]+)\\.[0-9]\"[^\n]*<title>[^\n]*${meaning}" found "${picture}")
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
expect_twice("fp32: 50.0 %" "bf16: 100.0 %")
expect_twice("fp32: 0.50 times" "fp32: 4.00 times")

expect_refusal("plot.cmake: is not the JSON of Google Benchmark" "${here}/plot.cmake")
file(WRITE "${WORK_DIR}/other.json" "{\"context\": {}, \"benchmarks\": 3}")
expect_refusal("other.json: is not the JSON of Google Benchmark" "${WORK_DIR}/other.json")
file(WRITE "${WORK_DIR}/other.json" "{\"context\": {}, \"benchmarks\": []}")
expect_refusal("no rows of moe_bench or peers_bench" "${WORK_DIR}/other.json")
expect_refusal("nowhere.json: cannot be read" "${WORK_DIR}/nowhere.json")
