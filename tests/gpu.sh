#!/usr/bin/env bash
# Builds, tests and sanitises on a machine with a GPU: bash tests/gpu.sh [OUTPUT_FOLDER]. Uses the active environment, which
# needs torch with CUDA, cmake, ninja, pybind11, pytest, pytest-xdist and hypothesis; no network.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
mkdir -p "$out"
jobs=$(nproc)

time python3 -m pip install -q --no-build-isolation --no-deps -e . || exit 1
python3 -m flash_attn_ext info

status=0
# What needs the GPU for itself, and C++ programs.
timeout 300 python3 -m pytest -q -m "gpu and slow" tests > "$out/slow.log" 2>&1 || status=1
tail -n 25 "$out/slow.log"

# With the kernels that dispatch chooses, then with those for every GPU. Processes share the GPU; a hang must not take
# the whole run with it.
for backends in "" sm80,cpu; do
  log="$out/tests${backends:+-sm80}.log"
  FAE_BACKENDS=$backends timeout 300 \
    python3 -m pytest -q -m "gpu and not slow" -n "$((jobs < 12 ? jobs : 12))" tests > "$log" 2>&1 || status=1
  tail -n 25 "$log"
done

# What reaches every kernel: all features and head dims of one dtype, for racecheck, which takes twice the time of the
# others, head dims alone. The tools run side by side: they are slow on the host. Two of them see the kernels for every GPU
# only: initcheck takes what the tensor memory accelerator has stored for uninitialised, and racecheck does not follow an
# order in which the arrival of one lane at a barrier stands for its warp.
sanitize() {
  local tests="test_feature or test_head_dim" backends=""
  [ "$1" = racecheck ] && tests=test_head_dim
  [[ $1 = racecheck || $1 = initcheck ]] && backends=sm80,cpu
  FAE_BACKENDS=$backends timeout 300 compute-sanitizer --tool "$1" --error-exitcode 9 --print-limit 5 \
    python3 -m pytest -q -p no:xdist tests/test_attention.py -k "cuda-bf16 and ($tests)" > "$out/$1.log" 2>&1
  local code=$?
  echo "$1: exit $code; $(grep -h "ERROR SUMMARY\|RACECHECK SUMMARY" "$out/$1.log" | tail -n 1)"
  return "$code"
}
tools=()
for tool in memcheck initcheck synccheck racecheck; do
  sanitize "$tool" &
  tools+=($!)
done
for process in "${tools[@]}"; do
  wait "$process" || status=1
done
exit "$status"
