"""Pictures: which appear, that they are valid SVG without outside references, and that numbers reach them."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from hiexp.report.figures import arm_color
from hiexp.report.plots import comparison_png, curve_pictures, evaluation_pictures, smoothed
from hiexp.report.runs import load_runs

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def runs(make_shared_run):
    return load_runs(
        [
            make_shared_run("none", steps=25, evaluations={0: (0.5, None), 25: (0.8, None)}),
            make_shared_run("half", steps=25, hek=True, controls=True, evaluations={0: (0.5, 0.7), 25: (0.8, 0.9)}),
        ]
    )


@pytest.fixture(scope="module")
def pictures(runs):
    return curve_pictures(runs)


def test_curves_follow_what_was_recorded(runs, pictures) -> None:
    titles = [picture.title for picture in pictures]
    for title in ("Reward", "Reward with and without experience", "Advantage variance", "Zero-variance groups",
                  "Gradient norm", "KL to the starting model", "Clip fraction", "Searches per answer", "HEK size",
                  "Engine/trainer mismatch", "Uplift of experience", "Time per step"):  # fmt: skip
        assert title in titles
    assert "Entropy" not in titles
    alone = [picture.title for picture in curve_pictures(runs[:1])]
    assert "HEK size" not in alone
    assert "Reward with and without experience" not in alone


def test_evaluations_have_one_picture_a_metric(runs) -> None:
    assert [p.title for p in evaluation_pictures(runs)] == [
        "Test EM",
        "Test F1",
        "Test CEM",
        "Searches per answer (test)",
    ]


def test_pictures_are_inline_svg_in_the_page_colour(runs, pictures) -> None:
    ids: list[str] = []
    for picture in [*pictures, *evaluation_pictures(runs)]:
        root = ET.fromstring(picture.svg)
        assert root.tag.endswith("svg")
        assert "width" not in root.attrib
        assert "currentColor" in picture.svg
        references = re.findall(r'(?:href|src)="([^"]*)"', picture.svg) + re.findall(r"url\(([^)]*)\)", picture.svg)
        assert all(reference.startswith("#") for reference in references)
        ids += [element.attrib["id"] for element in root.iter() if "clipPath" in element.tag and "id" in element.attrib]
    assert len(set(ids)) == len(ids)


def test_every_arm_is_drawn_in_its_colour(pictures) -> None:
    reward = pictures[0].svg
    assert arm_color(0) in reward
    assert arm_color(1) in reward
    assert arm_color(2) not in reward


def test_extreme_values_can_be_drawn(make_run) -> None:
    path = make_run("arm", steps=4)
    rows = [
        {"step": 1, "reward_mean": 0.0, "grad_norm": 1e-9, "kl_ref": -1e-12},
        {"step": 2, "reward_mean": 0.0, "grad_norm": 1e9, "kl_ref": None},
        {"step": 3, "reward_mean": 0.0, "grad_norm": 1e3},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [p.title for p in curve_pictures(load_runs([path]))] == [
        "Reward",
        "Gradient norm",
        "KL to the starting model",
    ]


def test_smoothing_keeps_constants_length_and_mean_level() -> None:
    assert smoothed(np.arange(5.0)).tolist() == [0, 1, 2, 3, 4]
    assert smoothed(np.full(100, 0.7)) == pytest.approx(0.7)
    line = np.linspace(0, 1, 200)
    assert smoothed(line)[20:-20] == pytest.approx(line[20:-20], abs=0.01)


@pytest.mark.parametrize("arms", [1, 2])
def test_comparison_png(runs, tmp_path, arms: int) -> None:
    out = tmp_path / "cmp.png"
    comparison_png([run.path for run in runs[:arms]], out)
    data = out.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    assert width > 1000
    assert height > 400
    comparison_png([run.path for run in runs[:arms]], out)
    assert out.read_bytes() == data


def test_comparison_png_of_a_run_without_numbers(make_run, tmp_path) -> None:
    path = make_run("arm", steps=1, rollouts=False)
    (path / "metrics.jsonl").unlink()
    comparison_png([path], tmp_path / "cmp.png")
    assert (tmp_path / "cmp.png").stat().st_size > 1000
