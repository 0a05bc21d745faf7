# SPDX-License-Identifier: MIT
# Each file of compile_fail/ must not compile, and the compiler must say why: the text after
# "expects: " in its first comments. After "flags: " may stand options that it is compiled with.
# With -DWEIR_CORRECTED and without those options it must compile.
# cmake -DCXX=compiler -DFLAGS="..." -DINCLUDE_DIR=include -DEIGEN_DIRS="folder|..."
#       -P compile_fail.cmake
separate_arguments(options UNIX_COMMAND "${FLAGS} -std=c++20 -fsyntax-only")
string(REPLACE "|" ";" eigen_dirs "${EIGEN_DIRS}")
foreach(folder IN LISTS INCLUDE_DIR eigen_dirs)
  list(APPEND options -isystem "${folder}")
endforeach()
file(GLOB sources "${CMAKE_CURRENT_LIST_DIR}/compile_fail/*.cpp")
if(NOT sources)
  message(FATAL_ERROR "no files in compile_fail/")
endif()
foreach(source IN LISTS sources)
  cmake_path(GET source FILENAME name)
  file(STRINGS "${source}" expects REGEX "^// expects: ")
  string(REGEX REPLACE "^// expects: " "" expects "${expects}")
  file(STRINGS "${source}" flags REGEX "^// flags: ")
  string(REGEX REPLACE "^// flags: " "" flags "${flags}")
  execute_process(COMMAND "${CXX}" ${options} ${flags} "${source}" RESULT_VARIABLE code
                  OUTPUT_QUIET ERROR_VARIABLE said)
  string(FIND "${said}" "${expects}" place)
  if(code EQUAL 0)
    message(SEND_ERROR "${name} compiles, expected: ${expects}")
  elseif(expects STREQUAL "" OR place EQUAL -1)
    message(SEND_ERROR "${name}: the compiler does not say '${expects}', but:\n${said}")
  endif()
  execute_process(COMMAND "${CXX}" ${options} -DWEIR_CORRECTED "${source}" RESULT_VARIABLE code
                  OUTPUT_QUIET ERROR_VARIABLE said)
  if(NOT code EQUAL 0)
    message(SEND_ERROR "${name} does not compile with -DWEIR_CORRECTED:\n${said}")
  endif()
endforeach()
