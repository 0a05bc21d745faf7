# SPDX-License-Identifier: MIT
# Read by ctest when it starts: makes a test of each test case in `weir_tests`, with labels from its
# tags, or of each file. (Catch2's catch_discover_tests knows no labels in v2.) The including file sets
#
#     weir_tests    the program
#     list_flags    makes it print the names of its test cases, one a line
#     run_flags     for running one test case
#     no_case_flags for running cases of which there may be none
#     by_file       the names of the files with test cases, if those of a file are to be one test,
#                   but for the slow ones and those of peers: with 2000 of them, starting the program
#                   for each takes as long as running it, and longer with sanitizers
cmake_minimum_required(VERSION 3.25)

function(list_cases spec result)
  execute_process(COMMAND "${weir_tests}" ${spec} ${list_flags} OUTPUT_VARIABLE names ERROR_QUIET)
  # Brackets and semicolons in a name must not be read as the structure of a list.
  string(REPLACE "[" "<open>" names "${names}")
  string(REPLACE "]" "<close>" names "${names}")
  string(REPLACE ";" "<semicolon>" names "${names}")
  string(REGEX REPLACE "[\r\n]+" ";" names "${names}")
  list(REMOVE_ITEM names "")
  set(${result} "${names}" PARENT_SCOPE)
endfunction()

list_cases("*" all)
list_cases("[gradient]" gradient)
list_cases("[golden]" golden)
list_cases("[slow]" slow)
list_cases("[peer]" peer)

if(NOT all)
  add_test(weir_tests_not_built "${weir_tests}" --not-built)
  set_tests_properties(weir_tests_not_built PROPERTIES LABELS unit)
endif()

if(all AND by_file)
  foreach(file IN LISTS by_file)
    add_test("${file}" "${weir_tests}" "-#" "[#${file}]~[slow]~[peer]" ${no_case_flags})
    set_tests_properties("${file}" PROPERTIES LABELS unit)
  endforeach()
  set(all ${slow} ${peer})
endif()

foreach(case IN LISTS all)
  set(labels unit)
  if(case IN_LIST slow)
    set(labels slow)
  elseif(case IN_LIST peer)
    set(labels peer)
  endif()
  foreach(tag gradient golden)
    if(case IN_LIST ${tag})
      list(APPEND labels ${tag})
    endif()
  endforeach()
  string(REPLACE "<open>" "[" name "${case}")
  string(REPLACE "<close>" "]" name "${name}")
  string(REPLACE "<semicolon>" ";" name "${name}")
  string(REGEX REPLACE "([][,\\])" "\\\\\\1" spec "${name}")
  add_test("${name}" "${weir_tests}" "${spec}" ${run_flags})
  set_tests_properties("${name}" PROPERTIES LABELS "${labels}")
  if(case IN_LIST peer) # says "skipped: " and why where the other library is not there
    set_tests_properties("${name}" PROPERTIES SKIP_REGULAR_EXPRESSION "skipped: ")
  endif()
endforeach()
