#!/usr/bin/env bash
# Builds, tests and sanitises on a machine with a GPU: bash tests/gpu.sh [OUTPUT_FOLDER]. Needs nvcc,
# compute-sanitizer and a C++20 compiler, and an active environment with torch for CUDA, cmake, ninja, pybind11,
# setuptools 77, numpy, pytest, pytest-xdist and hypothesis; no network.
set -uo pipefail
out=$(realpath -m "${1:-$(dirname "$0")/../build/gpu}")
cd "$(dirname "$0")/.."
mkdir -p "$out"
jobs=$(nproc --all) # nproc alone counts no more than OMP_NUM_THREADS

time FAE_CUDA=1 python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
python3 -m flash_attn_ext info

status=0
run() {  # LOG [pytest's arguments]
  local log=$out/$1.log
  shift
  timeout 300 python3 -m pytest -q "$@" > "$log" 2>&1 || status=1
  tail -n 25 "$log"
}
# Softmax and merge of one dtype, and of attention all features of one dtype and all head dims of two. Two tools take
# several times as long for a test: initcheck has the head dims, racecheck a few of them. These see the attention
# kernels for every GPU only: initcheck takes what the tensor memory accelerator has stored for uninitialised, and
# racecheck does not follow an order in which the arrival of one lane at a barrier stands for its warp.
sanitize() {
  local tests="cuda-bf16 and (test_feature or test_head_dim) or cuda-fp32 and test_head_dim" backends=""
  [ "$1" = initcheck ] && tests="test_head_dim and (cuda-bf16 or cuda-fp32-64)"
  [ "$1" = racecheck ] && tests="test_head_dim and (cuda-bf16-64 or cuda-bf16-128 or cuda-bf16-256 or cuda-fp32-64)"
  [[ $1 = racecheck || $1 = initcheck ]] && backends=sm80,cpu
  FAE_BACKENDS=$backends timeout 300 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 \
    python3 -m pytest -q -p no:xdist tests/test_attention.py tests/test_softmax_merge.py -k "$tests or cuda-dtype1" \
    > "$out/$1.log" 2>&1
  local code=$?
  echo "$1: exit $code; $(grep -h "ERROR SUMMARY\|RACECHECK SUMMARY" "$out/$1.log" | tail -n 1)"
  return "$code"
}

# What is measured has the machine for itself. Everything else shares it, some of it with the compiler of C++ programs,
# and computes what it expects on one thread: each process would otherwise have as many as there are cores.
run slow -m "gpu and slow" tests/test_gpu.py
export OMP_NUM_THREADS=1
background=()
timeout 300 python3 -m pytest -q -m "gpu and slow" tests --ignore tests/test_gpu.py > "$out/programs.log" 2>&1 &
background+=($!)

# With the kernels that dispatch chooses, then with those for every GPU (softmax and merge have no others); tools begin
# beside each, which are slow on the host. More processes take longer: their kernels take turns.
parallel=(-n $((jobs < 8 ? jobs : 7)) --dist worksteal)
for tool in memcheck synccheck; do
  sanitize "$tool" &
  background+=($!)
done
run tests -m "gpu and not slow" "${parallel[@]}" tests
for tool in initcheck racecheck; do
  sanitize "$tool" &
  background+=($!)
done
FAE_BACKENDS=sm80,cpu run tests-sm80 -m "gpu and not slow" "${parallel[@]}" tests --ignore tests/test_softmax_merge.py
for process in "${background[@]}"; do
  wait "$process" || status=1
done
tail -n 1 "$out/programs.log"
exit "$status"
