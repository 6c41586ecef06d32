# Warnings and sanitizers for our own targets, and the one way to declare a folder's library.

function(ternion_target_options target)
  # A product and a sum are never contracted into an FMA behind our back: float results must not
  # depend on which instruction set, or which device, a file was compiled for.
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:C,CXX>:-Wall -Wextra -Werror -ffp-contract=off>
    "$<$<COMPILE_LANGUAGE:CUDA>:-fmad=false;-Werror=all-warnings;-Xcompiler=-Wall,-Wextra;--expt-relaxed-constexpr>")
  if(TERNION_SANITIZE)
    target_compile_options(${target} PRIVATE -fsanitize=${TERNION_SANITIZE} -fno-omit-frame-pointer
                                             -fno-sanitize-recover=all)
    target_link_options(${target} PRIVATE -fsanitize=${TERNION_SANITIZE})
  endif()
endfunction()

# ternion_library(NAME SOURCES a.cc ... DEPENDS target ...): folder NAME as library ternion_NAME.
function(ternion_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_library(ternion_${name} STATIC ${ARG_SOURCES})
  target_include_directories(ternion_${name} PUBLIC ${PROJECT_SOURCE_DIR})
  target_link_libraries(ternion_${name} PUBLIC ${ARG_DEPENDS})
  ternion_target_options(ternion_${name})
endfunction()
