"""What is compiled, which devices and extras are there, what would run where, what is wrong and how to mend it."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hiexp

# Extras whose packages are probed; the lists themselves live in pyproject.toml only.
_EXTRAS = ("quickstart", "train", "gpu", "vllm", "dev")


def build_info() -> dict[str, Any]:
    """What this installation is: version, compiled backends, CUDA architectures, compiler, BLAS, threads.

    Returns:
        dict with the keys ``version``, ``python``, ``backends`` (``["cpu"]`` or ``["cpu", "cuda"]``), ``compiler``,
        ``blas`` (None: the native code links no BLAS), ``cuda_architectures``, ``cuda_toolkit``, ``cuda_devices`` and
        ``threads`` (logical processors this process may use).
    """
    from hiexp import _core

    info: dict[str, Any] = {
        "version": hiexp.__version__,
        "python": platform.python_version(),
        "backends": ["cpu"],
        "compiler": _core.compiler,
        "blas": None,
        "cuda_architectures": [],
        "cuda_toolkit": None,
        "cuda_devices": 0,
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if importlib.util.find_spec("hiexp._cuda") is not None:
        from hiexp import _cuda

        info["backends"].append("cuda")
        info["cuda_architectures"] = list(_cuda.architectures)
        info["cuda_toolkit"] = _cuda.toolkit
        info["cuda_devices"] = _cuda.device_count()
    return info


@dataclass
class Finding:
    """One thing that is wrong, and how to mend it."""

    problem: str
    mend: str


@dataclass
class Diagnosis:
    """Everything ``hiexp doctor`` prints: sections of ``(name, text)`` rows, and the findings."""

    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def __str__(self) -> str:
        lines = []
        for title, rows in self.sections.items():
            lines.append(title)
            width = max(len(name) for name, _ in rows)
            lines += [f"  {name:<{width}}  {text}" for name, text in rows]
            lines.append("")
        if not self.findings:
            lines.append("Nothing is wrong.")
        for number, finding in enumerate(self.findings, start=1):
            lines.append(f"Problem {number}: {finding.problem}")
            lines.append(f"  mend: {finding.mend}")
        return "\n".join(lines)


def diagnose() -> Diagnosis:
    """Look at this installation; see :class:`Diagnosis`."""
    result = Diagnosis()
    try:
        info = build_info()
    except ImportError as error:
        result.sections["Package"] = [("hiexp", hiexp.__version__), ("location", str(Path(hiexp.__file__).parent))]
        result.findings.append(Finding(f"the compiled module hiexp._core does not load: {error}", _REINSTALL))
        return result
    result.sections["Package"] = [
        ("hiexp", info["version"]),
        ("python", f"{info['python']} ({sys.executable})"),
        ("location", str(Path(hiexp.__file__).parent)),
    ]
    result.sections["Native code"] = [
        ("hiexp._core", f"compiled with {info['compiler']}; {info['threads']} threads available"),
        ("hiexp._cuda", _describe_cuda(info)),
    ]
    missing = {extra: _missing_packages(extra) for extra in _EXTRAS}
    result.sections["Extras"] = [(extra, _describe_extra(extra, names)) for extra, names in missing.items()]
    torch_rows, gpu_usable = _describe_torch(info, result.findings)
    result.sections["Devices"] = torch_rows
    result.sections["What would run where"] = _routes(info, gpu_usable)
    _check_source_shadowing(result.findings)
    return result


_REINSTALL = "reinstall from the repository: pip install . (needs a C++17 compiler)"


def _describe_cuda(info: dict[str, Any]) -> str:
    if "cuda" not in info["backends"]:
        return "not built (no CUDA compiler was found, or HIEXP_CUDA=OFF)"
    architectures = ", ".join(info["cuda_architectures"])
    return f"built with CUDA {info['cuda_toolkit']} for {architectures}; {info['cuda_devices']} device(s) visible"


def _missing_packages(extra: str) -> list[str]:
    """Names of the extra's packages that are not installed, from the installed metadata."""
    missing = []
    for requirement in importlib.metadata.requires("hiexp") or []:
        if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", requirement):
            name = re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0]
            try:
                importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                missing.append(name)
    return missing


def _describe_extra(extra: str, missing: list[str]) -> str:
    if not missing:
        return "complete"
    return f"missing {', '.join(missing)}; pip install 'hiexp[{extra}]'"


def _describe_torch(info: dict[str, Any], findings: list[Finding]) -> tuple[list[tuple[str, str]], bool]:
    """Rows about torch and its devices, and whether a GPU is usable."""
    rows = [("cpu", f"{platform.machine()}, {info['threads']} threads")]
    if importlib.util.find_spec("torch") is None:
        return [*rows, ("torch", "not installed (clustering and the HEK work without it)")], False
    import torch

    rows.append(("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"))
    usable = torch.cuda.is_available()
    rows += [(f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count() if usable else 0)]
    if usable and "cuda" not in info["backends"]:
        findings.append(
            Finding(
                "torch sees a GPU but hiexp._cuda was not built",
                "install nvcc and run: pip install --force-reinstall --no-deps . -C cmake.define.HIEXP_CUDA=ON",
            )
        )
    if info["cuda_devices"] and not usable:
        findings.append(
            Finding(
                f"hiexp sees {info['cuda_devices']} GPU(s) but this torch build cannot use them",
                "install a CUDA build of torch: pip uninstall torch && pip install torch (without constraints/cpu.txt)",
            )
        )
    return rows, usable


def _routes(info: dict[str, Any], gpu_usable: bool) -> list[tuple[str, str]]:
    """What runs for each operation; those that need torch follow the device of the tensors they are given."""
    cuda = gpu_usable and "cuda" in info["backends"]
    threads = f"C++ on the CPU, {info['threads']} threads"
    on_gpu = "CUDA (ward, average, weighted)" if cuda else None
    rows = [
        ("linkage, clustering", _by_device(on_gpu, threads)),
        ("group_advantage", _by_device("CUDA" if cuda else None, threads)),
    ]
    gpu = gpu_usable and importlib.util.find_spec("triton") is not None
    for name, on_gpu, on_cpu in (
        ("token_logprobs", "torch products + Triton row kernels", "torch products + C++ row kernels"),
        ("paired_logprobs", "torch products + Triton row kernels", "torch, tile by tile"),
        ("policy_loss", "one Triton kernel each way", "torch"),
        ("linear_policy_loss", "torch products + Triton row kernels", "torch, row chunks"),
    ):
        missing = gpu_usable and not gpu
        note = "; on a GPU unavailable: pip install 'hiexp[gpu]'" if missing else ""
        rows.append((name, _needs("torch", _by_device(on_gpu if gpu else None, on_cpu) + note)))
    attention = _by_device("flash attention in parts" if gpu_usable else None, "flash attention of torch in parts")
    rows.append(("score_group", _needs("torch", _needs("transformers", attention))))
    rows.append(("training", _needs("torch", "GPU" if gpu_usable else "CPU")))
    return rows


def _by_device(on_gpu: str | None, on_cpu: str) -> str:
    return on_cpu if on_gpu is None else f"{on_gpu} for tensors on a GPU; otherwise {on_cpu}"


def _needs(package: str, route: str) -> str:
    found = importlib.util.find_spec(package) is not None
    return route if found else f"unavailable without {package}: pip install 'hiexp[train]'"


def _check_source_shadowing(findings: list[Finding]) -> None:
    """From a source checkout ``python -m`` imports the sources instead of an installed wheel; they lack ``_core``."""
    package = Path(hiexp.__file__).parent
    if (package.parent / "CMakeLists.txt").exists() and not _is_editable():
        findings.append(
            Finding(
                f"the source folder {package} shadows the installed package",
                "run from another folder, or install editable: pip install -e .",
            )
        )


def _is_editable() -> bool:
    direct_url = importlib.metadata.distribution("hiexp").read_text("direct_url.json") or ""
    return '"editable": true' in direct_url


def register(subparsers: Any) -> None:
    """Add ``hiexp doctor``."""
    parser = subparsers.add_parser(
        "doctor",
        help="say what is installed, what runs where, what is wrong and how to mend it; or check one config",
        description="Without CONFIG: look at this installation. With it: check memory, lengths, data, leaks, search, "
        "server and directory of that run before it costs anything; exit code 1 on errors.",
    )
    parser.add_argument("config", nargs="?", help="YAML file as for hiexp train")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting, e.g. run.dir=runs/b"
    )
    parser.add_argument(
        "--memory", type=float, metavar="GIB", help="memory of the device that will run it (default: of this machine)"
    )
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="processes that share one model (FSDP2); default 1"
    )
    parser.add_argument("--json", action="store_true", help="print the checks as JSON")
    parser.set_defaults(func=_run)


def _run(args: argparse.Namespace) -> int:
    if args.shards < 1:
        raise ValueError(f"--shards: expected at least 1, got {args.shards}")
    if args.config is not None:
        from hiexp.preflight.command import doctor_config

        return doctor_config(args)
    unused = [flag for flag in ("set", "memory", "json") if getattr(args, flag)]
    if unused:
        raise ValueError(f"--{unused[0]}: expected a CONFIG beside it")
    result = diagnose()
    print(result)
    return 1 if result.findings else 0
