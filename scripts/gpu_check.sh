#!/usr/bin/env bash
# On a machine with a GPU: build without network, run the GPU tests, compute-sanitizer on the CUDA operations, and the GPU
# benchmarks, whose tables go to benchmarks/results/. Usage: scripts/gpu_check.sh [PYTHON]
#
# The Python must already have torch (a CUDA build), triton, pytest, pytest-benchmark, hypothesis, scikit-build-core,
# pybind11. Nothing is installed into it: hiexp goes into an environment of this run that sees its packages.
#   RIVALS_WHEELS=DIR   wheels of rivals (trl, verl, liger-kernel, cut-cross-entropy, ...), installed there without their
#                       dependencies; one that does not install is named and left out
#   ONLY="tests ..."    some of the stages: tests sanitizer benchmarks (default: all)
#
# A failed stage or benchmark does not stop the others; the exit status and the last lines say what failed.
set -euo pipefail
python=${1:-${PYTHON:-python3}}
root=$(cd "$(dirname "$0")/.." && pwd)
results=$root/benchmarks/results
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()
stop() { echo "gpu-check: $1" >&2; exit 1; }
step() { printf '\n== %s (%s s)\n' "$1" "$SECONDS"; }
wanted() { [[ " ${ONLY:-tests sanitizer benchmarks} " == *" $1 "* ]]; }
# Usage: attempt NAME COMMAND...
attempt() {
  local name=$1
  shift
  "$@" || { failed+=("$name"); echo "gpu-check: FAILED: $name" >&2; return 1; }
}

[[ -z ${RIVALS_WHEELS:-} || -d $RIVALS_WHEELS ]] || stop "RIVALS_WHEELS: expected a folder, got '$RIVALS_WHEELS'"
for stage in ${ONLY:-}; do
  [[ $stage =~ ^(tests|sanitizer|benchmarks)$ ]] || stop "ONLY: expected tests, sanitizer or benchmarks, got '$stage'"
done
command -v nvcc >/dev/null || stop "no CUDA compiler: nvcc is not on the PATH"
"$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  stop "no usable GPU: torch.cuda.is_available() is false for $python (no torch, a CPU build of it, or no device)"
for module in triton pytest pytest_benchmark hypothesis scikit_build_core pybind11; do
  "$python" -c "import $module" 2>/dev/null || stop "$python lacks the package $module, and this script installs none"
done

step "build, CUDA required, offline"
# Packages of the given Python through a .pth file: it may itself be a virtual environment.
"$python" -m venv --without-pip "$work/env"
run=$work/env/bin/python
site=$("$run" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import site, sys; print("\n".join(p for p in sys.path if p.endswith("-packages")))' >"$site/outer.pth"
"$run" -m pip install -q --no-build-isolation --no-deps --no-index --force-reinstall -C cmake.define.HIEXP_CUDA=ON "$root"
for wheel in ${RIVALS_WHEELS:+"$RIVALS_WHEELS"/*.whl}; do
  "$run" -m pip install -q --no-deps --no-index "$wheel" || echo "left out: $(basename "$wheel")"
done

# From another folder: there the sources cannot shadow the installed package.
cd "$work"
step "doctor"
"$run" -c 'import sys; from hiexp.cli import main; sys.exit(main(["doctor"]))' || stop "hiexp doctor found a problem"

if wanted tests; then
  step "GPU tests"
  folders=("$root/tests/ops" "$root/tests/kernels")
  attempt "tests" "$run" -m pytest -q -p no:cacheprovider "${folders[@]}" || true
fi

# Usage: sanitize TOOL PYTEST-ARGUMENT...; without torch's caching allocator, or an access past a tensor would land in
# another live block and go unseen. compute-sanitizer costs a factor of 10 to 100: small cases, chosen by name.
sanitize() {
  local tool=$1 options=()
  shift
  # Only our kernels: torch copies buffers that it never filled.
  [[ $tool == initcheck ]] && options=(--kernel-regex kns=hiexp)
  attempt "sanitizer: $tool $(basename "$1")" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" \
    --error-exitcode 9 "${options[@]}" "$run" -m pytest -q -p no:cacheprovider -m gpu "$@" || true
}
if wanted sanitizer; then
  step "compute-sanitizer"
  small='not 300001 and not one_launch and not graph'
  for tool in memcheck racecheck initcheck synccheck; do
    sanitize "$tool" "$root/tests/ops/test_group_advantage_cuda.py" -k "$small"
  done
  for tool in memcheck racecheck initcheck synccheck; do
    sanitize "$tool" "$root/tests/ops/test_clustering_cuda.py" -k "not at_size and not too_little_memory and not 700"
  done
fi

# Usage: benchmark OPERATION; benchmarks/bench_OPERATION.py -> results/gpu_OPERATION.md, kept even where a case failed.
benchmark() {
  local operation=$1 status=0 json=$work/$1.json
  [[ -f $root/benchmarks/bench_$operation.py ]] || { echo "no benchmarks/bench_$operation.py"; return 1; }
  "$run" -m pytest -q -p no:cacheprovider "$root/benchmarks/bench_$operation.py" -k cuda --benchmark-json="$json" ||
    status=$?
  [[ -s $json ]] || return 1
  {
    echo "$operation on $(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader | head -1)"
    "$run" "$root/scripts/versions.py"
    echo
    "$run" "$root/benchmarks/summary.py" "$json"
    [[ $status == 0 ]] || printf '\nSome cases failed; they are not in the table.\n'
  } >"$work/table" || return 1
  cat "$work/table"
  mv "$work/table" "$results/gpu_$operation.md"
  return "$status"
}
if wanted benchmarks; then
  mkdir -p "$results"
  for operation in group_advantage token_logprobs policy_loss score_group clustering; do
    step "GPU benchmark: $operation"
    attempt "benchmark: $operation" benchmark "$operation" || true
  done
fi

if ((${#failed[@]})); then
  printf '\ngpu-check: %s failed:\n' "${#failed[@]}" >&2
  printf '  %s\n' "${failed[@]}" >&2
  exit 1
fi
step "passed; tables in benchmarks/results/"
