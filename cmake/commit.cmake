# Run at every build: writes OUTPUT, a header that says which commit of SOURCE is being built, if that
# has changed.
execute_process(
  COMMAND git -C ${SOURCE} describe --always --dirty --abbrev=12
  OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
if(NOT commit)
  set(commit unknown)
endif()
file(CONFIGURE OUTPUT ${OUTPUT} CONTENT "#define TERNION_COMMIT \"${commit}\"\n" @ONLY)
