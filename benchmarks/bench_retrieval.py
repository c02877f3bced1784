"""Search over 10,000 to 1,000,000 passages: latency, memory, disk, build time, recall of the approximate methods.

python benchmarks/bench_retrieval.py --data DATA [--rows 10000 100000 1000000] [--out FILE.md]

No corpus of a million passages is at hand, so both kinds of input are made: vectors from a seeded mixture of n / 50
directions with noise (unit rows of 384 numbers; queries from the same mixture), passages from the real corpora in DATA,
repeated with a quarter of the words exchanged against a stretch of another passage. Vector rows are timed without
encoder and without reading the passages found. Each row is measured in a process of its own: ``own`` is memory that
opening and searching added and that cannot be given back, ``mapped`` what was added of memory-mapped files.
"""

import argparse
import gzip
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure

from hiexp.agent.bm25 import build_bm25_index
from hiexp.agent.dense import build_dense_index
from hiexp.agent.dense_index import ShardedVectors
from hiexp.agent.dense_search import ExactSearcher
from hiexp.agent.search_tools import open_index
from hiexp.experience.encoder import HashingEncoder

DIM, TOP_K, BATCH, SHARD_ROWS = 384, 10, 64, 100_000
ROWS_PER_DIRECTION, NOISE = 50, 0.8  # noise: length of the random part relative to the direction
HNSW_MOST_ROWS = 100_000  # beyond, two cores link for more than the five minutes this table may take
SECONDS, MOST_QUERIES = 3.0, 300


def vector_rows(n, seed, whole):
    """(n, DIM) float32 unit rows of the mixture for an index of ``whole`` rows."""
    size = (whole // ROWS_PER_DIRECTION, DIM)
    directions = np.random.default_rng(0).standard_normal(size, dtype=np.float32)
    random_ = np.random.default_rng(seed)
    rows = directions[random_.integers(0, len(directions), n)]
    rows += NOISE * random_.standard_normal((n, DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def write_vectors(folder, n, dtype):
    folder.mkdir(parents=True)
    for number, start in enumerate(range(0, n, SHARD_ROWS)):
        rows = vector_rows(min(SHARD_ROWS, n - start), 1 + number, n)
        np.save(folder / f"vectors_{number:05d}.npy", rows.astype(dtype))


def write_corpus(files, path, n):
    """``n`` passages: the real ones, then copies with a quarter of the words exchanged."""
    lines = [line for file in files for line in gzip.decompress(file.read_bytes()).splitlines()]
    passages = [json.loads(line) for line in lines]
    words, random_ = [passage["text"].split() for passage in passages], random.Random(0)
    with open(path, "w", encoding="utf-8") as stream:
        for i in range(n):
            place = i % len(passages)
            text = words[place]
            if i >= len(passages):
                length = max(1, len(text) // 4)
                start, other = random_.randrange(len(text) + 1), words[random_.randrange(len(words))]
                text = text[:start] + other[:length] + text[start + length :]
            row = {"id": str(i), "title": passages[place]["title"], "text": " ".join(text)}
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def latencies(search, queries):
    """Milliseconds per call: single queries (p50, p99) and batches of BATCH (median per query)."""
    search(queries[:1])
    single, started = [], time.perf_counter()
    while len(single) < MOST_QUERIES and (len(single) < 20 or time.perf_counter() - started < SECONDS):
        place = len(single) % len(queries)
        single.append(measure.seconds(lambda place=place: search(queries[place : place + 1])))
    batch = [measure.seconds(lambda: search(queries[:BATCH])) for _ in range(3)]
    return {
        "p50 ms": 1000 * float(np.median(single)),
        "p99 ms": 1000 * float(np.quantile(single, 0.99)),
        f"ms/query in {BATCH}": 1000 * float(np.median(batch)) / BATCH,
    }


def memory_since(before):
    return {f"{kind} MB": size - before[kind] for kind, size in measure.resident_megabytes().items()}


def dense_row(folder, method, in_memory, results):
    """Open, search and measure one method; the child's share of a row."""
    folder, row, usage = Path(folder), {}, measure.Usage()
    before = measure.resident_megabytes()
    vectors = ShardedVectors(folder)
    if in_memory:
        vectors.shards = [np.array(shard) for shard in vectors.shards]
    if method in ("ivf", "hnsw"):
        from hiexp.agent.dense_faiss import build_faiss

        usage.start()
        row["build s"] = measure.seconds(lambda: build_faiss(folder, vectors, method))
        row["build peak MB"] = usage.stop()["peak MB"]
    if method == "exact":
        searcher = ExactSearcher(vectors)
    else:
        from hiexp.agent.dense_faiss import FaissSearcher

        searcher = FaissSearcher(folder, vectors, method)
    queries = vector_rows(100, 10_000, len(vectors))
    row |= latencies(lambda part: searcher.search(part, TOP_K), queries)
    row |= memory_since(before)
    found = [[hit for hit, _ in one] for one in searcher.search(queries, TOP_K)]
    results.put((row, found))


def bm25_build(corpus, folder, results):
    usage = measure.Usage()
    usage.start()
    row = {"build s": measure.seconds(lambda: build_bm25_index(corpus, folder))}
    results.put((row | {"build peak MB": usage.stop()["peak MB"]}, None))


def bm25_row(folder, questions, results):
    before = measure.resident_megabytes()
    tool = open_index(folder)
    row = latencies(lambda part: tool.search(part, TOP_K), questions)
    results.put((row | memory_since(before), None))


def in_child(function, *arguments):
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=function, args=(*map(_plain, arguments), results))
    child.start()
    while child.is_alive() and results.empty():
        child.join(0.1)
    if results.empty():
        raise RuntimeError(f"{function.__name__}{arguments}: the process ended with code {child.exitcode}")
    answer = results.get()
    child.join()
    return answer


def _plain(value):
    return str(value) if isinstance(value, Path) else value


def megabytes(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) / 1e6


def dense_table(work, n):
    single, half = work / f"single_{n}", work / f"half_{n}"
    write_vectors(single, n, np.float32)
    write_vectors(half, n, np.float16)
    cases = [("exact, in memory, float32", single, "exact", True), ("exact, mapped, float32", single, "exact", False),
             ("exact, mapped, float16", half, "exact", False)]  # fmt: skip
    if find_spec("faiss") is not None:
        cases += [("faiss flat, float32", single, "flat", False), ("faiss ivf, float16", half, "ivf", False)]
        cases += [("faiss hnsw, float16", half, "hnsw", False)] if n <= HNSW_MOST_ROWS else []
    truth = None
    for name, folder, method, in_memory in cases:
        row, found = in_child(dense_row, folder, method, in_memory)
        truth = truth or found
        hits = sum(len(set(one) & set(want)) for one, want in zip(found, truth, strict=True))
        own = folder / f"faiss_{method}"
        disk = megabytes(own) if own.exists() else sum(file.stat().st_size for file in folder.glob("*.npy")) / 1e6
        yield {"method": name, "passages": n, **row, "disk MB": disk, "recall@10": hits / sum(map(len, truth))}
    shutil.rmtree(single)
    shutil.rmtree(half)


def bm25_table(work, files, questions, n):
    corpus, folder = work / f"corpus_{n}.jsonl", work / f"bm25_{n}"
    write_corpus(files, corpus, n)
    built, _ = in_child(bm25_build, corpus, folder)
    row, _ = in_child(bm25_row, folder, questions)
    yield {"method": "bm25, mapped", "passages": n, **built, **row, "disk MB": megabytes(folder)}
    if n <= HNSW_MOST_ROWS:  # the whole way of a dense index, with the one encoder that needs no model
        seconds = measure.seconds(lambda: build_dense_index(corpus, HashingEncoder(DIM), work / f"hashing_{n}"))
        yield {"method": "hashing encoder, build only", "passages": n, "build s": seconds,
               "disk MB": megabytes(work / f"hashing_{n}")}  # fmt: skip
    corpus.unlink()


def markdown(rows):
    columns = ["method", "passages", "p50 ms", "p99 ms", f"ms/query in {BATCH}", "recall@10", "own MB", "mapped MB",
               "disk MB", "build s", "build peak MB"]  # fmt: skip
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *cells))


def _cell(value):
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with corpus_*.jsonl.gz and hotpotqa_500.jsonl")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", help="also write the table to this file")
    args = parser.parse_args()
    files = sorted(Path(args.data).glob("corpus_*.jsonl.gz"))
    asked = Path(args.data, "hotpotqa_500.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line)["question"] for line in asked]
    rows = []
    with tempfile.TemporaryDirectory(prefix="hiexp-retrieval-") as work:
        for n in args.rows:
            for table in (bm25_table(Path(work), files, questions, n), dense_table(Path(work), n)):
                for row in table:
                    rows.append(row)
                    print({key: _cell(value) for key, value in row.items()}, flush=True)
    print(markdown(rows))
    if args.out:
        Path(args.out).write_text(f"{__doc__.split(chr(10) * 2)[2]}\n\n{markdown(rows)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
