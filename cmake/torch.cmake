# fae_stable_torch: headers and link flags of torch for code that keeps to LibTorch's stable ABI. torch's own CMake
# package is not used: it brings compiler flags and a search for CUDA that such code does not need.

execute_process(
  COMMAND ${Python_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/../build_backend/environment.py torch
  OUTPUT_VARIABLE FAE_TORCH OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
message(STATUS "torch: ${FAE_TORCH}")

add_library(fae_stable_torch INTERFACE)
target_include_directories(fae_stable_torch SYSTEM INTERFACE ${FAE_TORCH}/include)
# Headers newer than 2.11 then offer nothing that torch 2.11 lacks.
target_compile_definitions(fae_stable_torch INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)
# libtorch itself holds no symbol that we use, but needs whichever of libtorch_cpu and libtorch_cuda there are: naming
# it lets one library run on CPU and CUDA builds of torch. -z defs makes a forgotten source file a link error.
target_link_directories(fae_stable_torch INTERFACE ${FAE_TORCH}/lib)
target_link_options(fae_stable_torch INTERFACE LINKER:--no-as-needed LINKER:-z,defs)
target_link_libraries(fae_stable_torch INTERFACE torch torch_cpu)
