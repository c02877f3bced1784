"""The report's section on evaluations: every number of the result is on the page, whatever sources are mixed."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hiexp.io import DataError
from hiexp.report.evaluations import is_evaluation, load_evaluations
from hiexp.report.page import report

pytest.importorskip("matplotlib")


def arm(seed, metrics=("em", "f1", "cem", "judge"), samples=1):
    rng = np.random.default_rng(seed)
    scores = {name: float(rng.uniform(0.2, 0.7)) for name in metrics}
    if samples > 1:
        scores |= {f"{metrics[0]}_pass@{k}": min(1.0, scores[metrics[0]] + 0.05 * k) for k in (2, samples)}
    told = {
        **scores, "reward": 0.4, "searches_per_answer": 1.84, "answered": 0.95, "n": 500 * samples,
        "sampled_tokens": 312.4, "tokens": 1833.0, "failed_searches": 3, "seconds": 812.0,
    }  # fmt: skip
    return {**told, "intervals": {name: [value - 0.04, value + 0.04] for name, value in scores.items()}}


def result(seed=0, arms=("without_hek", "with_hek"), sets=("hotpotqa", "2wiki"), samples=1):
    parts, seeds = {}, iter(range(100 * seed, 100 * seed + 100))
    for name in sets:
        maths = name.startswith("aime")
        told = {
            each: arm(next(seeds), ("accuracy",) if maths else ("em", "f1", "cem", "judge"), samples) for each in arms
        }
        metric = "accuracy" if maths else "cem"
        parts[name] = {
            "source": f"hub/{name}", "kind": "maths" if maths else "qa", "metric": metric, "scorer": "hiexp",
            "n_questions": 500, "repeated_questions": 0, "without_hek": None, "with_hek": None, **told,
            "differences": {each: {metric: [0.051, -0.012, 0.114]} for each in arms if each != arms[0]},
        }  # fmt: skip
    mixed = len({part["metric"] for part in parts.values()}) > 1
    macro = {
        "sets": list(sets),
        "differences": {},
        **{each: arm(next(seeds), ("main",) if mixed else ("cem",)) for each in arms},
    }
    return {
        "hiexp": "0.1.0", "model": "Qwen/<b>7B</b>", "server": None, "dialect": "search_r1", "scorer": "hiexp",
        "tool": "http",
        "corpus": "http://127.0.0.1:8000/retrieve", "corpus_id": "http:x", "top_k": 3, "max_turns": 4,
        "samples": samples, "temperature": 0.6, "seed": 3, "snapshot_id": "abcdef0123456789abcdef",
        "judge": {"model": "big-judge", "prompt": 1, "asked": 10, "failures": 2},
        "arms": list(arms), "sets": parts, "macro": macro if len(sets) > 1 else None,
    }  # fmt: skip


LOGS = {
    "em": 0.582, "f1": 0.72, "cem": 0.655, "searches_per_answer": 2.2, "answered": 0.99, "n": 500,
    "dialect": "r1_searcher",
    "intervals": {"em": [0.54, 0.62], "f1": [0.69, 0.75], "cem": [0.61, 0.7]}, "trajectories": ["qwen7b.jsonl.gz"],
}  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def put(name, data):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(data))
        return tmp_path / name

    return put


def test_events_have_a_column_where_they_happened(write, read_page, tmp_path):
    data = result()
    data["sets"]["2wiki"]["with_hek"] |= {"tool_retries": 12, "scorer_failures": 0}
    page = read_page(report([write("e.json", data)], tmp_path / "out.html"))
    head = page.tables["eval-0"][0]
    assert "toolretries" in head
    assert "scorerfailures" not in head


def test_a_page_of_evaluations_alone(write, read_page, tmp_path):
    folder = write("seven/result.json", result()).parent
    page = read_page(report([folder], tmp_path / "out.html"))
    table = page.tables["eval-0"]
    assert [row[0] for row in table[1:]] == [
        "hotpotqa (500 questions, scorer hiexp)", "without HEK", "with HEK",
        "2wiki (500 questions, scorer hiexp)", "without HEK", "with HEK",
        "mean of 2 sets", "without HEK", "with HEK",
    ]  # fmt: skip
    expected = result()["sets"]["hotpotqa"]["with_hek"]
    cells = dict(zip(table[0], table[3], strict=True))
    assert cells["F1"].startswith(f"{expected['f1']:.3f}")
    assert f"{expected['intervals']['f1'][0]:.3f}" in cells["F1"]
    assert (cells["searches"], cells["failedsearches"], cells["alltokens"]) == ("1.84", "3", "1,833")
    assert "+0.051" in page.tables["eval-0-differences"][2][1]
    for words in (
        "dialect search_r1",
        "http over http://127.0.0.1",
        "judge big-judge (2 answers",
        "snapshot abcdef",
        "<b>7B",
    ):
        assert words in page.text
    assert page.count("svg") == 3  # two sets and their mean
    assert page.count("script") == 0


def test_evaluations_logs_and_runs_share_a_page(write, read_page, tmp_path, make_run):
    paths = [make_run("run", evaluations={0: (0.3, None)}), write("a.json", result(1)), write("logs.json", LOGS)]
    page = read_page(report(paths, tmp_path / "out.html", samples=0))
    assert {"arms", "eval-0", "eval-1"} <= page.tables.keys()
    assert page.tables["eval-1"][2][1].startswith("0.582")
    assert "stored trajectories qwen7b.jsonl.gz; scorer r1_searcher" in page.text


def test_the_same_data_set_of_two_evaluations_is_one_picture(write, read_page, tmp_path):
    paths = [write("a.json", result(1, sets=("hotpotqa",))), write("b.json", result(2, sets=("hotpotqa",)))]
    page = read_page(report(paths, tmp_path / "out.html"))
    assert page.count("svg") == 1
    assert "a: without HEK" in page.text
    assert "b: with HEK" in page.text


def test_mixed_kinds_many_arms_and_samples(write, read_page, tmp_path):
    arms = ("without_hek", "with_hek", "prompting", "prompting_hek", "direct")
    path = write("m.json", result(3, arms, ("aime24", "hotpotqa"), samples=8))
    page = read_page(report([path], tmp_path / "out.html"))
    head = page.tables["eval-0"][0]
    assert head.index("accuracypass@2") == head.index("accuracy") + 1
    assert "EMpass@8" in head
    assert "main metric" in head
    assert len(page.tables["eval-0"]) == 1 + 6 * 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"e\.json: not valid JSON"), ("[]", "expected a result of hiexp eval"),
        ('{"em": 1}', r"expected a result of hiexp eval with the keys arms, macro, sets"),
        ('{"trajectories": []}', "keys dialect, intervals"),
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(DataError, match=message):
        load_evaluations([tmp_path / "e.json"])
    with pytest.raises(DataError, match=r"absent\.json: no such file"):
        load_evaluations([tmp_path / "absent.json"])


def test_what_counts_as_an_evaluation(write, tmp_path, make_run):
    assert is_evaluation(write("seven/result.json", result()).parent)
    assert is_evaluation("anything.json")
    assert not is_evaluation(make_run("run"))
