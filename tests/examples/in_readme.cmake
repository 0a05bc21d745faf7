# SPDX-License-Identifier: MIT
# Runs PROGRAM, whose output has to be a block of README, apart from the numbers: those depend a
# little on the compiler and its flags.
cmake_minimum_required(VERSION 3.25)

execute_process(COMMAND "${PROGRAM}" RESULT_VARIABLE code OUTPUT_VARIABLE said)
if(NOT code EQUAL 0)
  message(FATAL_ERROR "${PROGRAM}: ${code}\n${said}")
endif()

function(without_numbers text result)
  string(REGEX REPLACE "[0-9]+(\\.[0-9]+)?(e[-+][0-9]+)?" "#" text "${text}")
  set(${result} "${text}" PARENT_SCOPE)
endfunction()

file(READ "${README}" readme)
without_numbers("${readme}" readme)
without_numbers("${said}" shown)
string(FIND "${readme}" "\n```\n${shown}```\n" place)
if(shown STREQUAL "" OR place EQUAL -1)
  message(FATAL_ERROR "${README} does not show what ${PROGRAM} writes:\n${said}")
endif()
