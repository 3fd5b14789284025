#!/usr/bin/env bash
# Everything that only a CUDA device can show, in at most nine minutes: build, tests, sanitizers, kernels, Fishers,
# decomposition, profiles.
#
#     bash benchmarks/on_device.sh OUT [PART ...]
#
# Writes a log of each part, tables (*.md) and summary.txt into the folder OUT while it runs. A part that fails
# or exceeds its time limit does not stop those after it. Parts: build tests kernels memcheck racecheck fishers
# language decomposition profiles. Environment: PYTHON (python3); SCALE (1), share of the full sizes; LIMITS (100), per cent of
# the time limits; MAXFAIL (20), tests that fail before the others are left out.
#
# It needs a CUDA build of torch, nvcc, CuPy, scikit-build-core, pybind11, pytest, hypothesis, transformers; and for
# the sanitizers and profiles compute-sanitizer and ncu.
set -uo pipefail
out=$(mkdir -p "${1:?usage: on_device.sh OUT [PART ...]}" && cd "$1" && pwd)
shift
parts=${*:-build tests kernels memcheck racecheck fishers language decomposition profiles}
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} scale=${SCALE:-1}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1

# part NAME SECONDS COMMAND...: run the command within its limit, with a log.
part() {
  local name=$1 limit=$(($2 * ${LIMITS:-100} / 100)) began=$SECONDS status
  shift 2
  [[ " $parts " == *" $name "* ]] || return 0
  echo "== $name"
  timeout -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  tail -n "${TAIL:-25}" "$out/$name.log"
  printf '%-14s %-8s %4d s of %d\n' "$name" \
    "$(case $status in 0) echo passed ;; 124 | 137) echo too long ;; *) echo "failed $status" ;; esac)" \
    "$((SECONDS - began))" "$limit" | tee -a "$out/summary.txt"
}

build() {
  set -e
  "$python" -m pip install --no-build-isolation --no-deps --force-reinstall -C cmake.define.NPEFF_CUDA=ON .
  cd "$out"  # not where python/npeff lies without its modules
  "$python" -m npeff doctor
}

gpu_tests() {
  local files several=()
  mapfile -t files < <(grep -rlE 'mark\.gpu' tests --include='test_*.py' | sort)
  "$python" -c 'import xdist' 2>/dev/null && several=(-n 8)
  "$python" -m pytest -q -rfE -m gpu --tb=short -p no:cacheprovider "${several[@]}" --maxfail="${MAXFAIL:-20}" "${files[@]}"
}

# sanitizer TOOL: a small selection of the tests, kernels of npeff only; torch's allocator gives every tensor its own memory.
sanitizer() {
  local select='test_topk and (4097 or 17) or test_streaming_topk or test_nnls and (127 or 129) or test_sparse_products and (33 or 257) or test_sparse_gram_and_norms and (65 or 200) or test_sums_over_examples or test_two_sided_sketch and 1024 or test_sketch'
  local file ours=()
  file=$(grep -rlE 'mark\.gpu' tests --include='test_cuda.py' | head -1)
  compute-sanitizer --help | grep -q -- --kernel-name && ours=(--kernel-name kernel_substring=run_block)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" "${ours[@]}" \
    --error-exitcode 9 --print-limit 20 "$python" -m pytest -q -x -m gpu --tb=line -p no:cacheprovider "$file" -k "$select"
}

# profile FAMILY KERNELS: counters of a few launches.
profile() {
  ncu --target-processes all --clock-control none --kernel-name "regex:$2" --launch-skip 6 --launch-count 4 \
    --section SpeedOfLight --section Occupancy --section MemoryWorkloadAnalysis --section LaunchStats --section WarpStateStats \
    "$python" benchmarks/cuda_kernels.py --parts kernels --families "$1" --rounds 1 --scale 0.3 --out "$out/unused.md"
}

profiles() {
  profile selection run_block
  profile sketches run_block
  rm -f "$out/unused.md"
}

export -f build gpu_tests sanitizer profile profiles
export python out scale
echo "$(date -u +%FT%TZ) $parts" >"$out/summary.txt"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader >>"$out/summary.txt" 2>&1
# figures NAME ARGUMENTS...: a command of cuda_kernels.py that writes NAME.md.
figures() { "$python" benchmarks/cuda_kernels.py --scale "$scale" --out "$out/$1.md" "${@:2}"; }
export -f figures
part build 50 bash -c build
part tests 100 bash -c gpu_tests
part kernels 60 bash -c "figures kernels --parts kernels --rounds 5 --profile"
part memcheck 40 bash -c "sanitizer memcheck"
part racecheck 40 bash -c "sanitizer racecheck"
part fishers 60 bash -c "figures fishers --parts fishers --profile"
part language 75 bash -c "figures language --parts language --profile"
part decomposition 75 bash -c "figures decomposition --parts decomposition --profile"
part profiles 35 bash -c profiles
echo "== summary"
cat "$out/summary.txt"
