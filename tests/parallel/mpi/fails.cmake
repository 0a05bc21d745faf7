# SPDX-License-Identifier: MIT
# Runs a job in which rank 1 fails in the way HOW names. It has to end on all ranks within seconds,
# not well, and with a message that names rank 1.
#
#     cmake "-DMPIEXEC=mpirun;--oversubscribe;-n" -DJOB=failing_job -DHOW=stalled -P fails.cmake
cmake_minimum_required(VERSION 3.25)

set(killed "process rank 1|rank 1 .*signal 9|EXIT CODE: 9")
set(stalled "rank [02] of 3: .*: rank 1 of 3 sent nothing for 2 s, expected a message")
set(stopped "${stalled}")
set(throws "rank 1 of 3: std::bad_alloc")
# A rank that is out of step is named, whoever gives up first.
function(out_of_step how what instead_of)
  set(${how} "rank [012] of 3: .*: rank 1 began '${what}' as exchange [0-9]+ of the job, \
expected '${instead_of}' as rank 0, rank 2" PARENT_SCOPE)
endfunction()
out_of_step(ends "the end of the job" "counts of tokens")
out_of_step(no_backward "sum of gradients" "dispatch")
out_of_step(one_forward_more "counts of tokens" "dispatch")
out_of_step(no_reduce "counts of tokens" "sum of gradients")
set(other_settings "rank 1 of 3 has chunks = 3, expected 2 as rank [02]")
set(wrong_counts "rank 1 of 3 has version = -1, expected 1 as rank [02]")
set(fewer_rows "dispatch: rank 1 of 3 sent a message of 1?[0-9][0-9] bytes, expected (64|128)")

string(TIMESTAMP start "%s" UTC)
execute_process(COMMAND ${MPIEXEC} 3 "${JOB}" "${HOW}" TIMEOUT 60 RESULT_VARIABLE result
                OUTPUT_VARIABLE output ERROR_VARIABLE output)
string(TIMESTAMP end "%s" UTC)
math(EXPR seconds "${end} - ${start}")
if(result EQUAL 0)
  message(FATAL_ERROR "the job ended well: ${output}")
endif()
if(seconds GREATER 30) # 2 s until it is noticed; the machine may be busy.
  message(FATAL_ERROR "the job took ${seconds} s to end: ${output}")
endif()
if(NOT output MATCHES "${${HOW}}")
  message(FATAL_ERROR "the job should have said '${${HOW}}', but: ${output}")
endif()
message(STATUS "${HOW}: ended after ${seconds} s: ${CMAKE_MATCH_0}")
