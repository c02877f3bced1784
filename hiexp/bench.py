"""``hiexp bench``: exact clustering on this machine against whichever peers are installed.

Same work for everyone: the full dendrogram of the same float32 rows, from vectors to SciPy's Z. Providers are
interleaved, the median is reported. Peak memory is the growth of the resident set of a fresh process. "product +
fastcluster" gets its distances from a float64 matrix product, so that a ratio does not only say that pdist is slow.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hiexp
from hiexp.io import atomic_write
from hiexp.progress import track

Provider = Callable[[np.ndarray, str, str], object]
CASES = (("ward", "euclidean"), ("average", "cosine"), ("complete", "euclidean"), ("single", "euclidean"))


def ours(X: np.ndarray, method: str, metric: str) -> object:
    """hiexp.linkage with every core."""
    return hiexp.linkage(X, method, metric)


def scikit_learn(X: np.ndarray, method: str, metric: str) -> object:
    """AgglomerativeClustering, full tree with distances."""
    from sklearn.cluster import AgglomerativeClustering

    model = AgglomerativeClustering(n_clusters=None, distance_threshold=0.0, linkage=method, metric=metric)
    return model.fit(X)


def scipy(X: np.ndarray, method: str, metric: str) -> object:
    """scipy.cluster.hierarchy.linkage from vectors."""
    from scipy.cluster.hierarchy import linkage

    return linkage(X, method, metric)


def fastcluster(X: np.ndarray, method: str, metric: str) -> object:
    """fastcluster.linkage from vectors."""
    import fastcluster as package

    return package.linkage(X, method, metric)


def product_fastcluster(X: np.ndarray, method: str, metric: str) -> object:
    """Condensed distances by a float64 matrix product, then fastcluster."""
    import fastcluster as package

    rows = X.astype(np.float64)
    if metric == "cosine":
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        square = 1.0 - rows @ rows.T
    else:
        norms = np.einsum("ij,ij->i", rows, rows)
        square = np.sqrt(np.maximum(norms[:, None] + norms - 2.0 * (rows @ rows.T), 0.0))
    condensed = square[np.triu_indices(len(rows), 1)]
    del square
    return package.linkage(condensed, method, preserve_input=False)


PROVIDERS: Mapping[str, tuple[Provider, str | None]] = {
    "hiexp": (ours, None),
    "scikit-learn": (scikit_learn, "sklearn"),
    "SciPy": (scipy, "scipy"),
    "fastcluster": (fastcluster, "fastcluster"),
    "product + fastcluster": (product_fastcluster, "fastcluster"),
}


def available() -> dict[str, Provider]:
    """The providers whose package is installed."""
    return {
        name: run for name, (run, module) in PROVIDERS.items() if module is None or importlib.util.find_spec(module)
    }


def make_rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    """(n, d) float32 unit rows in loose clusters, as sentence embeddings are: n / 20 centres, noise as long as they."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, n // 20), d))
    rows = centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, d))
    unit: np.ndarray = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    return unit


def measure(providers: Mapping[str, tuple[Provider, int]], X: np.ndarray, method: str, metric: str) -> dict[str, float]:
    """Median seconds of each provider over its number of rounds, interleaved, after one warm-up of each on 200 rows."""
    for run, _ in providers.values():
        run(X[:200], method, metric)
    seconds: dict[str, list[float]] = {name: [] for name in providers}
    for done in range(max(rounds for _, rounds in providers.values())):
        for name, (run, rounds) in providers.items():
            if done < rounds:
                begin = time.perf_counter()
                run(X, method, metric)
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_megabytes(name: str, n: int, d: int, method: str, metric: str) -> float | None:
    """Growth of the resident set by one run in a fresh process, MB; None where the system does not tell (no /proc)."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return float(pool.apply(_resident_growth, (name, n, d, method, metric)))


def _resident_growth(name: str, n: int, d: int, method: str, metric: str) -> float:
    X = make_rows(n, d)
    run = PROVIDERS[name][0]
    run(X[:200], method, metric)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the high-water mark so far
    before = _status_kilobytes("VmRSS")
    run(X, method, metric)
    return (_status_kilobytes("VmHWM") - before) / 1024


def _status_kilobytes(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text(encoding="ascii"))
    return int(match[1]) if match else 0


def clustering(sizes: Sequence[int], d: int, rounds: int, memory: bool) -> dict[str, Any]:
    """Measure every linkage of :data:`CASES` at every size; ``seconds`` and ``peak_mb`` of a case are by provider."""
    providers = available()
    plan = [(n, method, metric) for n in sizes for method, metric in CASES]
    cases = []
    for n, method, metric in track(plan, "clustering"):
        timed = {name: (run, rounds) for name, run in providers.items()}
        seconds = measure(timed, make_rows(n, d), method, metric)
        peaks = {name: peak_megabytes(name, n, d, method, metric) for name in providers} if memory else {}
        cases.append({"method": method, "metric": metric, "n": n, "d": d, "seconds": seconds, "peak_mb": peaks})
    return {"machine": describe_machine(), "versions": versions(), "rounds": rounds, "cases": cases}


def describe_machine() -> str:
    """Processor model and how many logical processors this process may use."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"model name\s*:\s*(.+)", info.read_text(encoding="utf-8")) if info.exists() else None
    name = match[1] if match else platform.processor() or platform.machine()
    return f"{name}, {hiexp.build_info()['threads']} logical processors"


def versions() -> dict[str, str]:
    """Versions of hiexp, its peers and numpy."""
    found = {"hiexp": hiexp.__version__, "Python": platform.python_version()}
    for package in ("numpy", "scikit-learn", "scipy", "fastcluster"):
        if importlib.util.find_spec(package.replace("scikit-learn", "sklearn")):
            found[package] = importlib.metadata.version(package)
    return found


def markdown(result: Mapping[str, Any]) -> str:
    """The measurement as a Markdown table: seconds (peak MB), and how many times faster than each peer hiexp is."""
    names = list(result["cases"][0]["seconds"])
    lines = [
        f"{result['machine']}; median of {result['rounds']}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        "",
        "| n x d | linkage | " + " | ".join(names) + " |",
        "| --- | --- |" + " ---: |" * len(names),
    ]
    for case in result["cases"]:
        cells = [_cell(case, name) for name in names]
        lines.append(f"| {case['n']} x {case['d']} | {case['method']}, {case['metric']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(case: Mapping[str, Any], name: str) -> str:
    seconds, own = case["seconds"][name], case["seconds"]["hiexp"]
    peak = case["peak_mb"].get(name)
    memory = "" if peak is None else f", {peak:.0f} MB"
    ratio = "" if name == "hiexp" else f" ({seconds / own:.1f}x)"
    return f"{seconds:.3g} s{ratio}{memory}"


def register(subparsers: Any) -> None:
    """Add ``hiexp bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="measure exact clustering on this machine against the installed peers",
        description="Full dendrograms of clustered unit rows; peers take part if installed.",
        epilog="example: hiexp bench --n 2000 10000 --d 384 --memory --json clustering.json",
    )
    parser.add_argument("--n", type=int, nargs="+", default=[1000, 4000], help="numbers of rows (default 1000 4000)")
    parser.add_argument("--d", type=int, default=384, help="dimension (default 384)")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds (default 3)")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory, each in a fresh process")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE as JSON")
    parser.set_defaults(func=_run)


def _run(arguments: argparse.Namespace) -> int:
    for name, values in (("--n", arguments.n), ("--d", [arguments.d]), ("--rounds", [arguments.rounds])):
        if min(values) < 1:
            raise ValueError(f"{name}: expected at least 1, got {min(values)}")
    if arguments.json is not None and not os.path.isdir(os.path.dirname(arguments.json) or "."):
        raise ValueError(f"--json: no such folder: {os.path.dirname(arguments.json)}")
    result = clustering(arguments.n, arguments.d, arguments.rounds, arguments.memory)
    print(markdown(result))
    if arguments.json is not None:
        atomic_write(arguments.json, json.dumps(result, indent=1) + "\n")
    return 0
