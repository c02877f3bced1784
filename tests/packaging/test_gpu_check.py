"""scripts/gpu_check.sh without a GPU: it says what is missing, and one failure loses nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
pytestmark = pytest.mark.skipif(
    shutil.which("bash") is None or not SCRIPT.exists(), reason="needs bash and the checkout"
)

# Answers as the real Python would, as far as the script asks; one benchmark fails before it writes anything, one after.
FAKE_PYTHON = """#!/bin/bash
for word in "$@"; do last=$word; done
case "$*" in
  *"-m venv"*) mkdir -p "$last/bin" && cp "$0" "$last/bin/python" ;;
  *get_path*) echo "$(dirname "$0")" ;;
  *-c*"import ${MISSING:-nothing}"*) exit 1 ;;
  *bench_token_logprobs*) exit 1 ;;
  *bench_*) for word in "$@"; do [[ $word == --benchmark-json=* ]] && echo '{}' >"${word#*=}"; done
    [[ $* != *bench_policy_loss* ]] ;;
  *-m\\ pytest*-m\\ gpu*) exit 0 ;;
  *-m\\ pytest*) exit ${TESTS:-0} ;;
  *versions.py*) echo "some versions" ;;
  *summary.py*) echo "| a table |" ;;
esac
"""


def install(folder, name, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text, encoding="utf-8")
    (folder / name).chmod(0o755)
    return folder / name


def run(script, python, tools, **environment):
    path = f"{tools}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", str(script), str(python)], env={**os.environ, "PATH": path, **environment}, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture
def tools(tmp_path):
    """A folder with stand-ins for nvcc, nvidia-smi and compute-sanitizer."""
    install(tmp_path / "tools", "nvcc", "#!/bin/bash\n")
    install(tmp_path / "tools", "nvidia-smi", "#!/bin/bash\necho 'Some GPU, 1.2'\n")
    install(tmp_path / "tools", "compute-sanitizer", '#!/bin/bash\nshift 2; shift 2\necho "sanitized"\n')
    return tmp_path / "tools"


@pytest.fixture
def checkout(tmp_path):
    """The script in a tree of its own, so that tables do not land in ours."""
    operations = ("group_advantage", "token_logprobs", "policy_loss", "clustering")
    for operation in operations:
        install(tmp_path / "tree" / "benchmarks", f"bench_{operation}.py", "")
    return install(tmp_path / "tree" / "scripts", "gpu_check.sh", SCRIPT.read_text(encoding="utf-8"))


def test_no_compiler(tmp_path):
    if any(Path(folder, "nvcc").exists() for folder in ("/usr/bin", "/bin")):
        pytest.skip("nvcc is in a system folder")
    result = run(SCRIPT, sys.executable, tmp_path)
    assert result.returncode == 1
    assert "gpu-check: no CUDA compiler: nvcc is not on the PATH" in result.stderr


def test_no_gpu(tools):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run(SCRIPT, sys.executable, tools)
    assert result.returncode == 1
    assert "gpu-check: no usable GPU: torch.cuda.is_available() is false" in result.stderr


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MISSING": "hypothesis"}, "lacks the package hypothesis"),
        ({"RIVALS_WHEELS": "/no/such/folder"}, "RIVALS_WHEELS: expected a folder, got '/no/such/folder'"),
        ({"ONLY": "tests speed"}, "ONLY: expected tests, sanitizer or benchmarks, got 'speed'"),
    ],
)
def test_what_is_missing_is_named(tmp_path, tools, checkout, environment, message):
    result = run(checkout, install(tmp_path, "python", FAKE_PYTHON), tools, **environment)
    assert result.returncode == 1
    assert message in result.stderr


def test_failures_lose_nothing_else(tmp_path, tools, checkout):
    result = run(checkout, install(tmp_path, "python", FAKE_PYTHON), tools, TESTS="1")
    assert result.returncode == 1
    tail = result.stderr[result.stderr.index("gpu-check: 4 failed") :].split("\n")
    assert [line.strip() for line in tail[1:] if line] == [
        "tests", "benchmark: token_logprobs", "benchmark: policy_loss", "benchmark: score_group",
    ]  # fmt: skip
    results = checkout.parents[1] / "benchmarks" / "results"
    assert sorted(path.name for path in results.iterdir()) == [
        "gpu_clustering.md", "gpu_group_advantage.md", "gpu_policy_loss.md",
    ]  # fmt: skip
    table = (results / "gpu_group_advantage.md").read_text(encoding="utf-8")
    assert table == "group_advantage on Some GPU, 1.2\nsome versions\n\n| a table |\n"
    assert "Some cases failed" in (results / "gpu_policy_loss.md").read_text(encoding="utf-8")


def test_one_stage_that_passes(tmp_path, tools, checkout):
    result = run(checkout, install(tmp_path, "python", FAKE_PYTHON), tools, ONLY="sanitizer")
    assert result.returncode == 0, result.stderr
    assert "passed" in result.stdout
    assert "GPU benchmark" not in result.stdout
