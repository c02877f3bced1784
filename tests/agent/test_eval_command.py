"""``hiexp eval`` with a tiny saved policy: arms, several sets, going on after a kill, logs, errors before any work."""

from __future__ import annotations

import argparse
import json

import pytest

pytest.importorskip("accelerate", reason="the train extra is not installed")

from hiexp.agent.commands import register
from hiexp.agent.record import Rollout
from hiexp.io import DataError, read_jsonl


def hiexp(*arguments):
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers(required=True))
    args = parser.parse_args([str(argument) for argument in arguments])
    return args.func(args)


def result_of(path):
    return json.loads(path.read_text(encoding="utf-8"))


def rollouts_of(path):
    return [Rollout.from_json(row) for _, row in read_jsonl(path)]


def without_time(result):
    for part in result["sets"].values():
        for arm in result["arms"]:
            part[arm].pop("seconds")
    return result


@pytest.fixture
def hek(tmp_path):
    from hiexp.experience.record import Experience
    from hiexp.experience.store import HEK

    with HEK.create(tmp_path / "hek.sqlite", encoder="hashing") as hek:
        hek.add([Experience("E2", "w0 w1", "look for w3 , not w4", qa_groups=("other",))])
    return tmp_path / "hek.sqlite"


@pytest.fixture
def without_questions(given):
    place = given.index("--questions")
    return [*given[:place], *given[place + 2 :]]


SAMPLED = ("--set", "evaluation.temperature=1")


def test_with_and_without_hek(given, hek, tmp_path, capsys):
    assert hiexp("eval", *given, "--hek", hek, "--json", tmp_path / "e.json") == 0
    result = result_of(tmp_path / "e.json")
    scores = result["sets"]["q"]
    assert result["arms"] == ["without_hek", "with_hek"]
    assert scores["without_hek"]["n"] == scores["with_hek"]["n"] == 5
    difference = scores["differences"]["with_hek"]["f1"][0]
    assert difference == pytest.approx(scores["with_hek"]["f1"] - scores["without_hek"]["f1"])
    assert result["snapshot_id"]
    assert result["corpus_id"].startswith("bm25:")
    out = capsys.readouterr().out
    for words in (
        "without HEK",
        "searches_per_answer",
        "with HEK minus without HEK",
        "dialect hiexp_compact",
        "c.jsonl",
    ):
        assert words in out
    hiexp("eval", *given, "--limit", 2, "--json", tmp_path / "e.json")
    result = result_of(tmp_path / "e.json")
    scores = result["sets"]["q"]
    assert (scores["without_hek"]["n"], scores["with_hek"], result["snapshot_id"]) == (2, None, None)


def test_experience_that_holds_an_answer_is_refused(given, tmp_path):
    from hiexp.experience.record import Experience
    from hiexp.experience.store import HEK

    rows = [{"id": "q0", "question": "w0 w1", "golden_answers": ["Marie Curie"]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with HEK.create(tmp_path / "hek.sqlite", encoder="hashing") as hek:
        hek.add([Experience("E2", "w0 w1", "the answer is marie curie", qa_groups=("other",))])
    with pytest.raises(ValueError, match="1 entries must not be shown"):
        hiexp("eval", *given, "--hek", tmp_path / "hek.sqlite")


def test_several_answers_and_data_sets(given, without_questions, tmp_path, capsys):
    (tmp_path / "other.jsonl").write_text("".join((tmp_path / "q.jsonl").read_text().splitlines(True)[:2]))
    hiexp(
        "eval", *without_questions, "--questions", tmp_path / "q.jsonl", tmp_path / "other.jsonl", "--samples", 3,
        *SAMPLED, "--json", tmp_path / "e.json", "--out", tmp_path / "kept",
    )  # fmt: skip
    result = result_of(tmp_path / "e.json")
    assert result == result_of(tmp_path / "kept" / "result.json")
    assert list(result["sets"]) == result["macro"]["sets"] == ["q", "other"]
    assert result["samples"] == 3
    arm = result["sets"]["q"]["without_hek"]
    assert arm["n"] == 15
    assert arm["em_pass@3"] >= arm["em_pass@2"] >= arm["em"]
    for metric in ("f1", "em_pass@2"):
        low, high = arm["intervals"][metric]
        assert low <= arm[metric] <= high
    kept = rollouts_of(tmp_path / "kept" / "q" / "without_hek.jsonl")
    assert len({rollout.rollout_id for rollout in kept}) == len({rollout.seed for rollout in kept}) == 15
    assert arm["tokens"] == sum(len(rollout.token_ids) for rollout in kept) / 15
    # Every set counts the same, however many questions it has.
    means = [part["without_hek"]["f1"] for part in result["sets"].values()]
    assert result["macro"]["without_hek"]["f1"] == pytest.approx(sum(means) / 2)
    out = capsys.readouterr().out
    assert "em_pass@3" in out
    assert "mean over 2 data sets" in out


def test_a_killed_evaluation_goes_on_and_ends_the_same(given, hek, tmp_path, monkeypatch):
    from hiexp.agent import eval_store

    flags = [*given, "--hek", hek, "--samples", 2, *SAMPLED, "--set", "rollout.batch_rows=3"]
    hiexp("eval", *flags, "--out", tmp_path / "whole", "--json", tmp_path / "whole.json")
    real, calls = eval_store.append_jsonl, []

    def killed(path, rows):
        if len(calls) == 14:
            raise KeyboardInterrupt
        calls.append(path)
        real(path, rows)

    monkeypatch.setattr(eval_store, "append_jsonl", killed)
    with pytest.raises(KeyboardInterrupt):
        hiexp("eval", *flags, "--out", tmp_path / "cut")
    monkeypatch.setattr(eval_store, "append_jsonl", real)
    log = tmp_path / "cut" / "q" / "with_hek.jsonl"
    assert 0 < len(rollouts_of(log)) < 10
    with open(log, "ab") as stream:
        stream.write(b'{"rollout_id": "q4/0/')  # the line at which the machine went down
    first = log.read_bytes().splitlines()[0]
    hiexp("eval", *flags, "--out", tmp_path / "cut", "--json", tmp_path / "cut.json", "--set", "rollout.batch_rows=4")
    assert log.read_bytes().splitlines()[0] == first
    assert without_time(result_of(tmp_path / "cut.json")) == without_time(result_of(tmp_path / "whole.json"))

    def never(self, agent, one, rows, snapshot):
        assert not rows  # an evaluation that is complete answers nothing
        return iter(())

    monkeypatch.setattr("hiexp.agent.eval_run.Evaluator._answers", never)
    hiexp("eval", *flags, "--out", tmp_path / "cut")
    with pytest.raises(AssertionError):
        hiexp("eval", *flags, "--samples", 3, "--out", tmp_path / "cut")


def test_answers_of_other_settings_or_questions_are_not_mixed(given, tmp_path):
    hiexp("eval", *given, "--limit", 1, "--out", tmp_path / "a")
    with pytest.raises(ValueError, match=r"other settings \(rollout\.max_turns: 4 -> 2\)"):
        hiexp("eval", *given, "--limit", 1, "--out", tmp_path / "a", "--set", "rollout.max_turns=2")
    rows = [{"id": "q0", "question": "w7 w8", "golden_answers": ["w7"]}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"without_hek\.jsonl:1: question 'q0' was another one"):
        hiexp("eval", *given, "--out", tmp_path / "a")


def test_answers_over_another_corpus_are_not_mixed(given, tmp_path):
    hiexp("eval", *given, "--limit", 1, "--out", tmp_path / "a")
    stored = result_of(tmp_path / "a/result.json")
    corpus = tmp_path / "c.jsonl"
    corpus.write_text(corpus.read_text() + json.dumps({"id": "d99", "title": "w0", "text": "w7"}) + "\n")
    with pytest.raises(ValueError, match=r"other settings \(tool_identity: 'bm25:.*' -> 'bm25:.*'\)"):
        hiexp("eval", *given, "--out", tmp_path / "a")
    assert result_of(tmp_path / "a/result.json") == stored


def test_kept_answers_follow_the_golds_of_today(given, tmp_path):
    hiexp("eval", *given, "--out", tmp_path / "a")
    answers = {rollout.question_id: rollout.answer for rollout in rollouts_of(tmp_path / "a/q/without_hek.jsonl")}
    rows = [
        {"id": f"q{i}", "question": f"w{i} w{i + 1}", "golden_answers": [answers[f"q{i}"] or "w0"]} for i in range(5)
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    hiexp("eval", *given, "--out", tmp_path / "a")
    arm = result_of(tmp_path / "a/result.json")["sets"]["q"]["without_hek"]
    assert arm["em"] == sum(answer is not None for answer in answers.values()) / 5


def test_repeated_questions_are_counted(given, tmp_path, capsys):
    rows = [{"id": f"q{i}", "question": f"w{i % 2} w5", "golden_answers": ["w1"]} for i in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    hiexp("eval", *given, "--json", tmp_path / "e.json")
    assert result_of(tmp_path / "e.json")["sets"]["q"]["repeated_questions"] == 1
    assert "1 questions are asked more than once" in capsys.readouterr().out


def test_a_named_maths_set_is_judged_as_maths(given, without_questions, tmp_path, monkeypatch):
    pytest.importorskip("math_verify")
    datasets = pytest.importorskip("datasets")
    (tmp_path / "test.jsonl").write_text(json.dumps({"problem": "w1", "answer": "1", "id": "0"}) + "\n")
    real = datasets.load_dataset
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_: real("json", data_files={"test": str(tmp_path / "test.jsonl")})
    )
    hiexp("eval", *without_questions, "--questions", "aime25", tmp_path / "q.jsonl", "--json", tmp_path / "e.json")
    result = result_of(tmp_path / "e.json")
    maths, qa = result["sets"]["aime25"], result["sets"]["q"]
    assert (maths["kind"], maths["scorer"], maths["source"]) == ("maths", "math", "math-ai/aime25")
    assert "accuracy" in maths["without_hek"]
    assert {"em", "f1", "cem"} <= qa["without_hek"].keys()
    # No metric is common to both, so the mean is over each set's own.
    main = (maths["without_hek"]["accuracy"] + qa["without_hek"][qa["metric"]]) / 2
    assert result["macro"]["without_hek"]["main"] == pytest.approx(main)


def test_local_maths_and_qa_stand_beside_each_other(given, without_questions, tmp_path):
    pytest.importorskip("math_verify")
    (tmp_path / "m.jsonl").write_text(json.dumps({"problem": "w1", "answer": "1"}) + "\n")
    (tmp_path / "aime24.jsonl").write_text(json.dumps({"problem": "w1", "answer": "1"}) + "\n")
    files = [f"maths={tmp_path}/m.jsonl", tmp_path / "aime24.jsonl", f"qa={tmp_path}/m.jsonl", tmp_path / "q.jsonl"]
    hiexp("eval", *without_questions, "--questions", *files, "--json", tmp_path / "e.json")
    sets = result_of(tmp_path / "e.json")["sets"]
    assert {name: part["scorer"] for name, part in sets.items()} == {
        "m": "math", "aime24": "math", "m_3": "hiexp", "q": "hiexp",
    }  # fmt: skip
    assert sets["aime24"]["source"] == str(tmp_path / "aime24.jsonl")
    with pytest.raises(ValueError, match=r"m\.jsonl: columns of a maths set, task\.kind is qa.*write maths="):
        hiexp("eval", *without_questions, "--questions", tmp_path / "m.jsonl")


def test_logs(given, tmp_path):
    hiexp("rollout", *given, "--k", 2, "--out", tmp_path / "a")
    hiexp(
        "eval", "--trajectories", *(tmp_path / "a").glob("*.gz"), "--questions", tmp_path / "q.jsonl",
        "--json", tmp_path / "e.json",
    )  # fmt: skip
    logs = result_of(tmp_path / "e.json")
    rows = [row for path in (tmp_path / "a").glob("shard_*") for _, row in read_jsonl(path)]
    assert logs["n"] == len(rows)
    assert logs["f1"] == pytest.approx(sum(row["scores"]["f1"] for row in rows) / len(rows))
    assert logs["searches_per_answer"] == pytest.approx(
        sum(step[0] == "query" for row in rows for step in row["steps"]) / len(rows)
    )


def test_several_logs_have_a_table_each_and_one_together(tmp_path, capsys):
    def log(name, answers):
        rows = [
            {"question": f"q {i}?", "golden_answers": ["w1"], "prediction": answer,
             "stop_reason": "stop", "text": f"<think>so</think><answer>{answer}</answer>"}
            for i, answer in enumerate(answers)
        ]  # fmt: skip
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    one, other = log("a.jsonl", ["w1", "w1", "w2"]), log("b.jsonl", ["w2"])
    flags = ["--corpus", "pages of 2018", "--json", tmp_path / "e.json"]
    hiexp("eval", "--trajectories", one, other, *flags)
    result = result_of(tmp_path / "e.json")
    assert (result["em"], result["n"], result["corpus"]) == (0.5, 4, "pages of 2018")
    assert [(part["em"], part["n"]) for part in result["files"].values()] == [(pytest.approx(2 / 3), 3), (0.0, 1)]
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.endswith(":")] == [f"{one}:", f"{other}:"]
    assert "all 2 files" in out
    assert "corpus: pages of 2018" in out
    hiexp("eval", "--trajectories", one, other, "--limit", 1, "--json", tmp_path / "e.json")
    assert (result_of(tmp_path / "e.json")["em"], result_of(tmp_path / "e.json")["n"]) == (0.5, 2)
    capsys.readouterr()
    hiexp("eval", "--trajectories", one)
    out = capsys.readouterr().out
    assert out.count("searches_per_answer") == 1
    assert "which they do not name" in out
    with pytest.raises(ValueError, match="--trajectories: expected different files"):
        hiexp("eval", "--trajectories", one, one)


@pytest.mark.data
@pytest.mark.parametrize(
    ("model", "em", "f1", "cem"),
    [("qwen7b", (0.580, 0.582), (0.719, 0.721), (0.654, 0.656)), ("llama8b", (0.584,) * 2, (0.706,) * 2, (0.648,) * 2)],
)
def test_published_figures_of_r1_searcher(data_dir, tmp_path, model, em, f1, cem):
    logs = data_dir / f"trajectories_hotpotqa_{model}.jsonl.gz"
    hiexp("eval", "--trajectories", logs, "--dialect", "r1_searcher", "--json", tmp_path / "e.json")
    result = result_of(tmp_path / "e.json")
    for name, (low, high) in (("em", em), ("f1", f1), ("cem", cem)):
        assert low - 5e-4 <= result[name] <= high + 5e-4


def test_list_sets(capsys):
    assert hiexp("eval", "--list-sets") == 0
    assert "RUC-NLPIR/FlashRAG_datasets:musique" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"task\.evaluation: expected questions"),
        (["--questions", "q.jsonl", "--limit", "0"], "--limit: expected at least 1, got 0"),
        (["--questions", "q.jsonl", "--samples", "0"], "--samples: expected at least 1, got 0"),
        (["--questions", "q.jsonl", "--samples", "2"], "--samples 2: expected evaluation.temperature above 0"),
        (["--questions", "q.jsonl", "--arms", "with_hek"], "with_hek needs experience"),
        (["--questions", "q.jsonl", "--arms", "without"], "expected names among without_hek, .*got 'without'"),
        (
            ["--questions", "q.jsonl", "--arms", "direct", "--dialect", "hiexp_compact"],
            "with instructions .*hiexp_compact",
        ),
        (["--questions", "hotpotq"], "did you mean hotpotqa"),
        (["--questions", "q.jsonl", "--judge", "gpt"], "--judge: expected openai:MODEL, got 'gpt'"),
        (["--questions", "q.jsonl", "--judge-url", "http://h/v1"], "--judge-url: expected --judge"),
        (["--questions", "q.jsonl", "--set", "evaluation.questions=0"], "evaluation.questions: expected at least 1"),
        (["--trajectories", "t", "--limit", "-1"], "--limit: expected at least 1, got -1"),
        (["--trajectories", "absent.jsonl"], "absent.jsonl"),
        (["--trajectories", "t", "--hek", "h", "--samples", "2"], "takes no --hek, --samples"),
        (["--trajectories", "t", "--arms", "direct"], "takes no --arms"),
    ],
)
def test_errors_come_before_any_work(arguments, message, tmp_path, monkeypatch):
    (tmp_path / "q.jsonl").write_text('{"question": "w1?", "answer": "w2"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, TypeError), match=message):
        hiexp("eval", *arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]
