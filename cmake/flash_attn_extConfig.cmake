# find_package(flash_attn_ext): target flash_attn_ext::flash_attn_ext, with the header, the op libraries and LibTorch.
# `python -m flash_attn_ext info --cmake` prints the CMAKE_PREFIX_PATH for this package and the torch that it runs on.
include(CMakeFindDependencyMacro)
find_dependency(Torch)

get_filename_component(_fae_folder "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
if(NOT TARGET flash_attn_ext::flash_attn_ext)
  add_library(flash_attn_ext::flash_attn_ext INTERFACE IMPORTED)
  target_compile_features(flash_attn_ext::flash_attn_ext INTERFACE cxx_std_20)
  target_include_directories(flash_attn_ext::flash_attn_ext INTERFACE "${_fae_folder}/include")
  set(_fae_libraries "${_fae_folder}/libflash_attn_ext.so")
  if(TARGET torch_cuda AND EXISTS "${_fae_folder}/libflash_attn_ext_cuda.so")
    list(APPEND _fae_libraries "${_fae_folder}/libflash_attn_ext_cuda.so")
  endif()
  # A program calls the ops through torch's dispatcher, and none of the libraries' symbols: they are linked all the same.
  target_link_libraries(flash_attn_ext::flash_attn_ext INTERFACE ${TORCH_LIBRARIES} -Wl,--push-state,--no-as-needed
                        ${_fae_libraries} -Wl,--pop-state)
endif()
