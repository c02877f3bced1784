#!/bin/bash
# Builds hiexp._core with address, undefined and thread sanitizers and runs tests/sanitize/exercise.py on each build.
# Usage: scripts/sanitize.sh [python]   (needs numpy, pybind11, cmake and gcc; no network)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
cxx=${CXX:-g++}
version=$("$python" -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["project"]["version"])')

check() { # check <sanitizers> <runtime library> <options variable> <options>
  local build="build/sanitize-${1%%,*}"
  cmake -S . -B "$build" -DCMAKE_BUILD_TYPE=None -DHIEXP_CUDA=OFF -DHIEXP_SANITIZE="$1" -DHIEXP_WERROR=OFF \
    -DCMAKE_CXX_COMPILER="$cxx" -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    -DSKBUILD_PROJECT_VERSION="$version" -DSKBUILD_PROJECT_VERSION_FULL="$version" >"$build.log" 2>&1 || { cat "$build.log"; return 1; }
  cmake --build "$build" --target _core --parallel 2 >"$build.log" 2>&1 || { cat "$build.log"; return 1; }
  echo "sanitizers: $1"
  # The runtime must come first in a process that was not built with it, and find the C++ library it wraps. numpy's BLAS threads are not ours to check.
  env "$3=$4" OPENBLAS_NUM_THREADS=1 LD_PRELOAD="$("$cxx" -print-file-name="$2") $("$cxx" -print-file-name=libstdc++.so)" \
    "$python" tests/sanitize/exercise.py "$(echo "$build"/_core*.so)"
}

mkdir -p build
check address,undefined libasan.so ASAN_OPTIONS detect_leaks=0:abort_on_error=0
check thread libtsan.so TSAN_OPTIONS halt_on_error=1:report_signal_unsafe=0
