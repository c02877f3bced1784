"""Without a GPU the tests of this folder run in the interpreter of Triton, in one child process.

That mode must be chosen before triton is imported, and this process may compile kernels as well.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton: pip install 'hiexp[gpu]'")


@pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1", reason="the kernels run in this process"
)
def test_every_kernel_passes_in_the_interpreter():
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", str(folder)]
    # One thread: the interpreter works on tiny arrays, and the parent's workers may be busy.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout
