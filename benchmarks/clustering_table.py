"""The table of benchmarks/results/clustering_cpu.md: exact clustering against its peers at many sizes.

Run: python benchmarks/clustering_table.py [--part sizes text …] [--texts FILE …]. Every row is saved as soon as it is
measured; a run that was stopped goes on where it was. Figures are medians of interleaved rounds of whole calls, from
float32 vectors to SciPy's Z. Peers that would take many minutes run fewer rounds (the column says how many) or not at
all.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hiexp
from hiexp import bench
from hiexp.agent.corpus import read_corpus
from hiexp.io import atomic_write
from hiexp.progress import track

RESULTS = Path(__file__).parent / "results"
WARD, AVERAGE, COMPLETE, SINGLE = bench.CASES
OURS, SKLEARN, PRODUCT, VECTOR = "hiexp", "scikit-learn", "product + fastcluster", "fastcluster, O(n d) memory"


def linkage_vector(X: np.ndarray, method: str, metric: str) -> object:
    """fastcluster.linkage_vector: ward and single without a distance matrix."""
    import fastcluster as package

    return package.linkage_vector(X, method, metric)


PROVIDERS = {**bench.available(), **({VECTOR: linkage_vector} if importlib.util.find_spec("fastcluster") else {})}


@dataclass(frozen=True)
class Row:
    """One line of the table: ``peers`` gives the rounds of each peer, ``options`` go to hiexp.linkage."""

    part: str
    n: int
    d: int
    case: tuple[str, str]
    peers: Mapping[str, int]
    rounds: int = 3
    quantile: float | None = None
    n_threads: int | None = None

    @property
    def key(self) -> str:
        extra = f" threshold {self.quantile}" if self.quantile is not None else ""
        extra += f" threads {self.n_threads}" if self.n_threads is not None else ""
        return f"{self.part}: {self.n} x {self.d} {'-'.join(self.case)}{extra}"


def plan() -> Iterator[Row]:
    """All rows, cheap ones first within a part."""
    everyone = {SKLEARN: 3, "SciPy": 3, "fastcluster": 3, PRODUCT: 3}
    for n in (1000, 2000, 5000):
        for case in bench.CASES:
            slow = {VECTOR: 1} if n == 5000 and case in (WARD, SINGLE) else {}
            yield Row("sizes", n, 384, case, {**everyone, **slow}, rounds=5)
    for case in bench.CASES:
        yield Row("sizes", 10_000, 384, case, {SKLEARN: 2, "SciPy": 1, "fastcluster": 1, PRODUCT: 2})
    for case in (WARD, AVERAGE, SINGLE):
        yield Row("sizes", 20_000, 384, case, {SKLEARN: 1})
    for d in (64, 768):
        for case in bench.CASES:
            yield Row("dimensions", 5000, d, case, {SKLEARN: 2, PRODUCT: 2})
    for case in bench.CASES:
        for quantile in (0.25, 0.5):
            yield Row("thresholds", 10_000, 384, case, {}, quantile=quantile)
    for case in bench.CASES:
        for threads in (1, 2):
            yield Row("threads", 10_000, 384, case, {}, n_threads=threads)
    for case in bench.CASES:
        yield Row("text", 10_000, 384, case, {SKLEARN: 1, PRODUCT: 1})
    for case in (WARD, AVERAGE, SINGLE):
        yield Row("large", 50_000, 384, case, {}, rounds=1)
    yield Row("large", 100_000, 384, WARD, {}, rounds=1)


def measure(row: Row, texts: list[str]) -> dict[str, Any]:
    """Seconds by provider, growth of resident memory of ours (MB), statistics of ours."""
    X = _text_rows(tuple(texts), row.n) if row.part == "text" else bench.make_rows(row.n, row.d)
    threshold = None
    if row.quantile is not None:
        threshold = float(np.quantile(hiexp.linkage(X, *row.case)[:, 2], row.quantile))
    stats: dict[str, Any] = {}

    def own(rows: np.ndarray, method: str, metric: str) -> None:
        _, found = hiexp.linkage(rows, method, metric, threshold=threshold, n_threads=row.n_threads, return_stats=True)
        stats.update(found)

    providers = {OURS: (own, row.rounds)}
    providers |= {name: (run, row.peers[name]) for name, run in PROVIDERS.items() if name in row.peers}
    seconds = bench.measure(providers, X, *row.case)
    own_memory = bench.peak_megabytes(OURS, row.n, row.d, *row.case) if row.part in ("sizes", "large") else None
    return {"seconds": seconds, "peers": dict(row.peers), "peak_mb": own_memory, "threshold": threshold, "stats": stats}


@functools.cache
def _text_rows(files: tuple[str, ...], n: int) -> np.ndarray:
    """MiniLM vectors (n, 384) of the first sentences of real passages; kept next to the run for the next time."""
    from hiexp.experience.encoder import make_encoder

    store = Path("runs/clustering_table") / f"minilm_{n}.npy"
    if store.exists():
        return np.load(store)
    passages = [passage for file in files for passage in read_corpus(file)]
    texts = list(dict.fromkeys(f"{passage.title} {passage.text}".split(". ")[0] for passage in passages))[:n]
    if len(texts) < n:
        raise ValueError(f"--texts: expected files with {n} different passages, got {len(texts)} from {list(files)}")
    encoder = make_encoder(os.environ.get("HIEXP_MINILM", "st:sentence-transformers/all-MiniLM-L6-v2"))
    rows = np.concatenate([encoder.encode(texts[i : i + 256]) for i in track(range(0, n, 256), "encoding passages")])
    store.parent.mkdir(parents=True, exist_ok=True)
    np.save(store, rows.astype(np.float32))
    return np.load(store)


def markdown(result: Mapping[str, Any]) -> str:
    """All measured rows as Markdown, one table a part."""
    lines = [f"{result['machine']}; " + ", ".join(f"{name} {version}" for name, version in result["versions"].items())]
    rows: dict[str, dict[str, Any]] = result["rows"]
    for part in dict.fromkeys(key.split(":")[0] for key in rows):
        mine = {key.split(": ")[1]: row for key, row in rows.items() if key.split(":")[0] == part}
        names = [name for name in PROVIDERS if any(name in row["seconds"] for row in mine.values())]
        lines += ["", f"**{part}**", "", "| rows | " + " | ".join(names) + " | passes | rescans |"]
        lines.append("| --- |" + " ---: |" * (len(names) + 2))
        for key, row in mine.items():
            cells = [_cell(row, name) for name in names]
            stats = row["stats"]
            cells += [f"{stats['passes']:.2f}", f"{stats['rescans']:,}"] if stats else ["–", "–"]
            lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Mapping[str, Any], name: str) -> str:
    if name not in row["seconds"]:
        return "–"
    seconds, own = row["seconds"][name], row["seconds"][OURS]
    if name == OURS:
        return f"{seconds:.3g} s" + ("" if row["peak_mb"] is None else f", {row['peak_mb']:.0f} MB")
    return f"{seconds:.3g} s ({seconds / own:.1f}x)" + (" once" if row["peers"][name] == 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = list(dict.fromkeys(row.part for row in plan()))
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--texts", nargs="+", default=[], help="passage files for the part 'text' (jsonl, jsonl.gz)")
    parser.add_argument("--out", type=Path, default=RESULTS / "clustering_cpu.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": bench.describe_machine(), "versions": bench.versions(), "rows": {}}
    if arguments.out.exists() and "rows" in (before := json.loads(arguments.out.read_text(encoding="utf-8"))):
        result["rows"] = before["rows"]
    rows = [row for row in plan() if row.part in arguments.part and row.key not in result["rows"]]
    if not arguments.texts:
        rows = [row for row in rows if row.part != "text"]
    for row in track(rows, "clustering"):
        result["rows"][row.key] = measure(row, arguments.texts)
        atomic_write(arguments.out, json.dumps(result, indent=1) + "\n")
        atomic_write(arguments.out.with_suffix(".md"), markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
