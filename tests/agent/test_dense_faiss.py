"""faiss behind dense search: exact order of what is found, recall, files made once, a word where it is missing."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hiexp.agent import dense
from hiexp.agent.dense import DenseTool, build_dense_index
from hiexp.agent.dense_faiss import FaissSearcher, build_faiss
from hiexp.agent.dense_index import ShardedVectors
from hiexp.agent.dense_search import ExactSearcher
from hiexp.experience.encoder import HashingEncoder


def clustered(seed, n, d, centres=40):
    random = np.random.default_rng(seed)
    middle = random.standard_normal((centres, d))
    rows = middle[random.integers(0, centres, n)] + 0.6 * random.standard_normal((n, d))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(params=["float32", "float16"])
def folder(tmp_path, request):
    pytest.importorskip("faiss")
    vectors = clustered(0, 4000, 24).astype(request.param)
    for number, start in enumerate(range(0, 4000, 1500)):
        np.save(tmp_path / f"vectors_{number:05d}.npy", vectors[start : start + 1500])
    return tmp_path


@pytest.mark.parametrize(("kind", "least"), [("flat", 1.0), ("ivf", 0.9), ("hnsw", 0.9)])
def test_found_rows_have_exact_scores_and_order(folder, kind, least):
    vectors, queries = ShardedVectors(folder), clustered(1, 50, 24)
    exact = ExactSearcher(vectors).search(queries, 10)
    found = FaissSearcher(folder, vectors, kind).search(queries, 10)
    hits = sum(len(set(one) & set(want)) for one, want in zip(found, exact, strict=True))  # rows with their scores
    assert hits >= least * 500
    for one in found:
        assert one == sorted(one, key=lambda pair: (-pair[1], pair[0]))


def test_all_lists_searched_is_exact_and_more_effort_never_finds_less(folder):
    vectors, queries = ShardedVectors(folder), clustered(1, 30, 24)
    exact = ExactSearcher(vectors).search(queries, 5)
    assert FaissSearcher(folder, vectors, "ivf", effort=10_000).search(queries, 5) == exact
    recall = [
        sum(
            len(set(a) & set(b))
            for a, b in zip(FaissSearcher(folder, vectors, "ivf", e).search(queries, 5), exact, strict=True)
        )
        for e in (1, 4, 64)
    ]
    assert recall == sorted(recall)
    assert recall[0] < recall[-1]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_the_file_is_made_once_and_a_killed_build_is_finished(folder, kind, monkeypatch):
    import faiss

    vectors = ShardedVectors(folder)
    write = faiss.write_index

    def dies(index, name):
        if "index.faiss" in name:
            raise KeyboardInterrupt
        write(index, name)

    monkeypatch.setattr(faiss, "write_index", dies)
    with pytest.raises(KeyboardInterrupt):
        build_faiss(folder, vectors, kind)
    assert not (folder / f"faiss_{kind}").exists()
    monkeypatch.setattr(faiss, "write_index", write)
    target = build_faiss(folder, vectors, kind)
    monkeypatch.setattr(faiss, "write_index", dies)
    assert build_faiss(folder, vectors, kind) == target
    assert len(FaissSearcher(folder, vectors, kind).search(clustered(1, 3, 24), 4)[0]) == 4


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_a_build_is_announced_and_faiss_says_nothing(folder, kind, capfd):
    print("before")
    FaissSearcher(folder, ShardedVectors(folder), kind)
    first = capfd.readouterr()
    assert first.err == f"{folder / f'faiss_{kind}'}: building it for 4,000 passages; it stays there\n"
    FaissSearcher(folder, ShardedVectors(folder), kind)
    print("after")
    assert (first.out, *capfd.readouterr()) == ("before\n", "after\n", "")


def test_without_faiss_search_is_exact_and_says_so(tmp_path, monkeypatch):
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"word{i}"}) + "\n" for i in range(20)))
    folder = build_dense_index(corpus, HashingEncoder(32), tmp_path / "index")
    monkeypatch.setattr(dense, "find_spec", lambda name: None)
    with pytest.warns(UserWarning, match="no faiss here: dense search by 'ivf' falls back to 'exact'"):
        tool = DenseTool(folder, HashingEncoder(32), method="ivf")
    assert tool.method == "exact"
    assert tool.identity == DenseTool(folder, HashingEncoder(32)).identity
    with pytest.raises(ValueError, match="method: expected one of exact, flat, ivf, hnsw; got 'tree'"):
        DenseTool(folder, HashingEncoder(32), method="tree")


def test_a_gpu_that_is_not_there_is_named(folder):
    import faiss

    if getattr(faiss, "get_num_gpus", lambda: 0)():
        pytest.skip("this faiss has a GPU")
    vectors = ShardedVectors(folder)
    with pytest.raises(ValueError, match=r"tool\.device: expected 'cpu', for this faiss sees no GPU"):
        FaissSearcher(folder, vectors, "flat", device="cuda")
    with pytest.raises(ValueError, match="hnsw"):
        FaissSearcher(folder, vectors, "hnsw", device="cuda")
