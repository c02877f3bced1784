"""Time pictures: parts add up to the step, old runs keep their phases, many steps stay few columns."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiexp.report.runs import Run, load_runs
from hiexp.report.times import _COLORS, _PHASES, _thinned, step_parts, time_pictures

pytest.importorskip("matplotlib")

WHOLE = {
    "seconds_rollout": 4.0, "seconds_prefill": 1.0, "seconds_decode": 2.5, "seconds_score": 0.25,
    "seconds_update": 3.0, "seconds_forward": 1.0, "seconds_backward": 1.5, "seconds_optimiser": None,
    "seconds_step": 8.0,
}  # fmt: skip


def run_of(tmp_path, rows, name: str = "arm") -> Run:
    lines = [json.dumps({"step": step, **row}) + "\n" for step, row in enumerate(rows, start=1)]
    (tmp_path / name).mkdir()
    (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    return load_runs([tmp_path / name])[0]


def test_parts_of_a_step(tmp_path) -> None:
    parts = step_parts(run_of(tmp_path, [WHOLE, {}, WHOLE]))
    assert {label: seconds.tolist() for label, seconds in parts.items()} == {
        "prefill": [1.0, 1.0], "decode": [2.5, 2.5], "tools, agent": [0.5, 0.5], "rewards": [0.25, 0.25],
        "forward": [1.0, 1.0], "backward": [1.5, 1.5], "rest of update": [0.5, 0.5], "other": [0.75, 0.75],
    }  # fmt: skip


@given(st.lists(st.lists(st.floats(0, 1e3), min_size=8, max_size=8), min_size=1, max_size=5))
def test_parts_add_up_to_the_step(values) -> None:
    rows = []
    for prefill, decode, tools, rewards, forward, backward, rest, other in values:
        rollout, update = prefill + decode + tools, forward + backward + rest
        rows.append({
            "seconds_rollout": rollout, "seconds_prefill": prefill, "seconds_decode": decode, "seconds_score": rewards,
            "seconds_update": update, "seconds_forward": forward, "seconds_backward": backward,
            "seconds_step": rollout + rewards + update + other,
        })  # fmt: skip
    parts = step_parts(Run("arm", None, rows=[{"step": i, **row} for i, row in enumerate(rows)]))
    total = sum(parts.values(), np.zeros(len(rows)))
    assert total == pytest.approx([row["seconds_step"] for row in rows], abs=1e-6)


def test_every_part_has_its_colour() -> None:
    labels = {label for _, whole, rest, inner in _PHASES for label in [whole, rest, *(label for _, label in inner)]}
    assert (labels | {"other"}) - {""} == _COLORS.keys()
    assert len(set(_COLORS.values())) == len(_COLORS)


def test_pictures_name_the_parts_that_were_recorded(tmp_path) -> None:
    run = run_of(tmp_path, [WHOLE, WHOLE])
    mean, steps = time_pictures([run])
    for svg in (mean.svg, steps.svg):
        for label in ("prefill", "decode", "forward", "backward"):
            assert f">{label}<" in svg
            assert _COLORS[label] in svg
        assert ">optimiser<" not in svg
    # A run of an older version has phases alone; several runs are compared by their means.
    old = run_of(tmp_path, [{"seconds_rollout": 2.0, "seconds_update": 1.0, "seconds_step": 3.0}] * 2, "old")
    assert list(step_parts(old)) == ["rollouts", "update"]
    assert [picture.title for picture in time_pictures([run, old])] == ["Time per step"]
    assert time_pictures([run_of(tmp_path, [{"seconds_step": None}], "empty")]) == []


def test_many_steps_become_few_columns_of_the_same_mean() -> None:
    seconds = np.random.default_rng(0).random((3, 1000))
    steps, thin = _thinned(np.arange(1000.0), seconds)
    assert thin.shape == (3, 100)
    assert len(steps) == 100
    assert thin.mean(axis=1) == pytest.approx(seconds.mean(axis=1))
