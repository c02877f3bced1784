"""Quickstart: every stage through the real code, resumable; the table, the measures and the settings."""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from hiexp import quickstart_command
from hiexp.experience.record import Experience
from hiexp.experience.store import HEK
from hiexp.io import read_jsonl
from hiexp.quickstart import job, stages
from hiexp.quickstart.config import ARMS, QuickstartConfig
from hiexp.quickstart.job import quickstart
from hiexp.quickstart.measures import lesson_precision, verdict
from hiexp.quickstart.source import contrast, known_questions
from hiexp.quickstart.worlds import MiniWorldTask, world_seed
from hiexp.rl.metrics import TIME_KEYS
from hiexp.rl.run_directory import RunDirectory, directory_lock
from hiexp.tasks.miniworld import MiniWorld

ROOT = Path(__file__).parents[1]


def tiny() -> QuickstartConfig:
    """Seconds instead of a minute."""
    config = QuickstartConfig().short()
    train = config.train
    return replace(
        config,
        warm_start=replace(config.warm_start, steps=2, batch_size=4),
        source=replace(config.source, questions=22, group_size=2, world_size=4),
        worlds=replace(config.worlds, training_size=4, evaluation_size=4),
        train=replace(
            train,
            evaluation=replace(train.evaluation, questions=11),
            run=replace(train.run, steps=2, questions_per_step=2, checkpoint_every=1, threads=1),
        ),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out, said = tmp_path_factory.mktemp("quickstart") / "run", []
    page = quickstart(tiny(), out, say=said.append)
    assert page == out / "report.html"
    return out, said


def test_all_stages_leave_their_files(finished: tuple[Path, list[str]]):
    out, said = finished
    for name in ("policy/model.safetensors", "experience/hek.sqlite", "experience/rollouts.jsonl.gz", "comparison.png"):
        assert (out / name).stat().st_size > 0
    for arm in ARMS:
        rows = [row for _, row in read_jsonl(out / arm / "metrics.jsonl")]
        assert [row["step"] for row in rows] == [1, 2]
        assert rows[0]["snapshot_id"] is not None
        evaluation = json.loads((out / arm / "eval" / "step_000002.json").read_text())
        assert evaluation["with_hek"]["n"] == evaluation["without_hek"]["n"] == 11
    summary = (out / "summary.txt").read_text()
    assert [line.split()[0] for line in summary.splitlines()[1:5]] == ["before", *ARMS]
    assert summary in said[-1]


def test_arms_differ_in_the_share_of_rollouts_with_experience(finished: tuple[Path, list[str]]):
    out, _ = finished
    shares = {arm: json_config(out / arm)["experience"]["experience_share"] for arm in ARMS}
    assert shares == {"no-hek": 0.0, "hek-all": 1.0, "hek-half": 0.5}
    for arm in ("hek-all", "no-hek"):
        rollouts = [row for _, row in read_jsonl(out / arm / "rollouts" / "step_000001.jsonl.gz")]
        assert len(rollouts) == 8
        assert arm == "hek-all" or not any(row["injections"] for row in rollouts)


def json_config(run: Path) -> dict:
    import yaml

    return yaml.safe_load((run / "config.resolved.yaml").read_text())


def test_the_same_command_again_makes_nothing_anew(finished: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch):
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    monkeypatch.setattr(job, "warm_start", None)
    monkeypatch.setattr(job, "gather_experience", None)
    quickstart(tiny(), out, say=lambda line: None)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


def test_two_quickstarts_cannot_work_in_one_directory(tmp_path: Path):
    with directory_lock(tmp_path / "run"), pytest.raises(ValueError, match="another process is at work"):
        quickstart(tiny(), tmp_path / "run", say=lambda line: None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_stage_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    flushed = []

    def flush(folder: Path) -> None:
        flushed.append(((folder / "deep" / "file").read_text(), (tmp_path / "policy").exists()))

    def make(folder: Path) -> None:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("made")

    monkeypatch.setattr(stages, "fsync_tree", flush)
    stages.stage(tmp_path / "policy", make, lambda line: None, "policy")
    assert flushed == [("made", False)]
    assert (tmp_path / "policy" / "deep" / "file").read_text() == "made"


def test_a_killed_stage_is_made_again_and_a_killed_arm_continues(
    finished: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, original = tmp_path / "run", RunDirectory.write_rollouts
    shutil.copytree(finished[0] / "policy", out / "policy")
    for name in ("report", "comparison_png"):
        monkeypatch.setattr(job, name, lambda *arguments: None)

    def killed_in_step_two(self, step, rollouts):
        if step == 2:
            raise KeyboardInterrupt
        original(self, step, rollouts)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "write_rollouts", killed_in_step_two)
        with pytest.raises(KeyboardInterrupt):
            quickstart(tiny(), out, say=lambda line: None)
    # A leftover of a stage that was killed half-way must not count as the stage.
    (out / "experience").rename(out / ".experience.tmp")
    quickstart(tiny(), out, say=lambda line: None)
    for arm in ARMS:
        assert metrics(out / arm) == metrics(finished[0] / arm)


def metrics(run: Path) -> list[dict]:
    """Metrics of a run but for its times and memory."""
    rows = [row for _, row in read_jsonl(run / "metrics.jsonl")]
    return [{key: value for key, value in row.items() if key not in TIME_KEYS} for row in rows]


def test_other_settings_need_another_directory(finished: tuple[Path, list[str]]):
    with pytest.raises(ValueError, match=r"with other settings \(seed: 0 -> 1\)"):
        quickstart(replace(tiny(), seed=1), finished[0], say=lambda line: None)


def test_yaml_holds_the_defaults_and_bad_keys_are_named(tmp_path: Path):
    assert QuickstartConfig.from_yaml(ROOT / "configs" / "quickstart.yaml") == QuickstartConfig()
    file = tmp_path / "settings.yaml"
    file.write_text("warm_start:\n  step: 3\n")
    with pytest.raises(ValueError, match=r"unknown key warm_start\.step; did you mean warm_start\.steps"):
        QuickstartConfig.from_yaml(file)
    file.write_text("source:\n  questions: 1\n")
    with pytest.raises(ValueError, match=r"questions: expected a number >= 2, got 1"):
        QuickstartConfig.from_yaml(file)


def test_options_reach_the_settings_and_bad_ones_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(job, "quickstart", lambda config, out, say: seen.append((config, out)))
    parser = argparse.ArgumentParser()
    quickstart_command.register(parser.add_subparsers())

    def run(*options: str) -> int:
        arguments = parser.parse_args(["quickstart", "--out", str(tmp_path), *options])
        return arguments.func(arguments)

    assert run("--short", "--seed", "7", "--steps", "5") == 0
    short = QuickstartConfig().short()
    expected = replace(short, seed=7, train=replace(short.train, run=replace(short.train.run, steps=5)))
    assert seen == [(expected, str(tmp_path))]
    with pytest.raises(ValueError, match="--steps: expected at least 1, got -1"):
        run("--steps", "-1")


def test_worlds_are_fresh_at_every_step_and_the_task_repeats_itself():
    task, again = (MiniWorldTask(0, 4, 4, 22) for _ in range(2))
    first, second = task.training(1, 8), task.training(2, 8)
    assert [q.id for q in first.questions] == [q.id for q in again.training(1, 8).questions]
    assert not {q.text for q in first.questions} & {q.text for q in second.questions}
    assert [q.id for q in task.evaluation()[0].questions] == [q.id for q in again.evaluation()[0].questions]
    purposes = ("source", "training", "evaluation")
    assert len({world_seed(purpose, seed, i) for purpose in purposes for seed in (0, 1) for i in (0, 1)}) == 12
    question = first.questions[0]
    assert task.score(question, question.golden_answers[0])["em"] == 1.0
    assert task.score(question, question.meta["trap_answer"])["em"] == 0.0


def test_the_guard_knows_every_answer_of_the_job():
    config = tiny()
    task = MiniWorldTask(config.seed, 4, 4, 11)
    assert len(known_questions(config, task)) == 2 * 2 + 11


def test_contrast_finds_the_lesson_and_measures_judge_it(tmp_path: Path):
    from hiexp.agent.record import Rollout

    world = MiniWorld(seed=1, size=4)
    questions = world.questions(22, seed=0)
    rollouts = [
        rollout
        for q in questions
        for i, (attribute, answer) in enumerate(
            [(q.meta["right"], q.golden_answers[0]), (q.meta["trap"], q.meta["trap_answer"])]
        )
        for rollout in [
            Rollout(
                f"{q.id}/0/{i}", q.id, q.text, [], [], [], [], [], [], None, 0, 0, "hiexp_compact", "answer", answer,
                scores={"em": float(i == 0)},
                steps=[("think", attribute), ("query", f"{q.meta['entity']} {q.meta['phrase']} {attribute}"),
                       ("think", attribute), ("answer", answer)],
            )
        ]
    ]  # fmt: skip
    report = contrast(rollouts, questions, group_size=2)
    assert report.contrastive == 22
    with HEK.create(tmp_path / "hek.sqlite") as hek:
        hek.register_questions(questions)
        hek.add(report.experiences)
        assert len(hek.entries("E1")) == 22
        shares = lesson_precision(hek.entries("E1"), {q.id: q for q in questions})
    assert shares == {"right": 1.0, "inverted": 0.0, "other": 0.0, "n": 22}


def test_verdicts():
    question = MiniWorld(seed=1, size=4).questions(1, seed=0)[0]
    right, trap = question.meta["right"], question.meta["trap"]
    assert verdict(f"look for {right} , not {trap} ; e.g. more words", question) == "right"
    assert verdict(f"look for {trap} , not {right}", question) == "inverted"
    assert verdict(f"look for {right}", question) == "other"
    entry = Experience(level="E2", title="t", description=f"look for {trap} , not {right}", qa_groups=(question.id,))
    assert lesson_precision([entry], {question.id: question})["inverted"] == 1.0
    assert lesson_precision([], {})["right"] is None
