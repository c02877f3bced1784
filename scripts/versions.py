"""One line for a benchmark table: Python and the versions of what is compared. Run by scripts/gpu_check.sh."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = (
    "hiexp",
    "torch",
    "triton",
    "trl",
    "verl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
    "cuml-cu13",
)


def versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    print(versions())
