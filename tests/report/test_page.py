"""The HTML report as a whole: self-contained, complete, safe, and usable whatever a killed run left."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from hiexp.io import DataError
from hiexp.report.commands import register
from hiexp.report.page import report

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def page(make_shared_run, read_page, tmp_path_factory: pytest.TempPathFactory) -> Any:
    runs = [
        make_shared_run("none", steps=40, evaluations={0: (0.5, 0.8), 40: (0.7, None)}),
        make_shared_run(
            "hek", steps=40, hek=True, first=0.8, evaluations={0: (0.5, 0.8), 40: (0.5, 0.95)}, tokenizer=True
        ),
    ]
    return read_page(report(runs, tmp_path_factory.mktemp("page") / "report.html", threshold=0.75, samples=2))


def test_self_contained_without_scripts(page: Any) -> None:
    assert page.count("script") == page.count("link") == page.count("img") == page.count("iframe") == 0
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("href", "src", "xlink:href", "action"):
                assert (value or "").startswith("#")


def test_the_table_compares_the_arms_and_the_start(page: Any) -> None:
    start, none, hek = page.tables["arms"][2:]
    assert start == ["before RL", "0", "–", "–", "–", "0.50", "0.52", "0.54", "0.80", "0.82", "0.84", "200"]
    assert none[:2] == ["none", "40"]
    assert none[5:] == ["0.70", "0.72", "0.74", "–", "–", "–", "200"]
    assert hek[5:] == ["0.50", "0.52", "0.54", "0.95", "0.97", "0.99", "200"]
    assert float(none[2]) < float(none[3])
    assert 1 <= int(hek[4]) < int(none[4]) <= 40
    assert page.tables["settings"][0] == ["setting", "none", "hek"]


def test_the_verdict_stands_first(page: Any) -> None:
    assert "hek: the HEK helped only while it is shown" in page.text
    assert page.text.index("the HEK helped") < page.text.index("Training")


def test_pictures_and_trajectories_are_there(page: Any) -> None:
    assert page.count("figure") == page.count("svg") >= 15
    assert page.count("details") == 4
    classes = [attributes.get("class") for tag, attributes in page.tags if tag == "span"]
    assert "trained sampled" in classes
    assert "masked experience" in classes
    # The question of every sample holds a script tag: shown as text.
    assert "who directed mirror harbor <script>alert(1)</script>" in page.text


def test_the_same_runs_give_the_same_bytes(make_run, tmp_path: Path) -> None:
    path = make_run("arm", steps=12)
    first = report([path], tmp_path / "a.html").read_bytes()
    assert report([path], tmp_path / "b.html").read_bytes() == first


def test_a_run_killed_before_its_first_step(make_run, read_page, tmp_path: Path) -> None:
    path = make_run("arm", steps=9, rollouts=False)
    (path / "metrics.jsonl").write_text('{"step": 1, "rew')
    page = read_page(report([path], tmp_path / "report.html"))
    assert "0 of 9 training steps are recorded" in page.text
    assert "No rollouts are stored" in page.text
    assert page.count("svg") == 0


def test_names_and_settings_are_escaped(make_run, read_page, tmp_path: Path) -> None:
    path = make_run("<b>arm & co", steps=3)
    (path / "config.resolved.yaml").write_text("model: {path: '<img src=x onerror=alert(1)>'}\n")
    page = read_page(report([path], tmp_path / "report.html"))
    assert page.count("img") == 0
    assert "<b>arm & co" in page.text
    assert "<img src=x onerror=alert(1)>" in page.text


def test_bad_input_leaves_an_old_report_alone(make_run, tmp_path: Path) -> None:
    path, out = make_run("arm", steps=3), tmp_path / "report.html"
    out.write_text("old")
    (path / "metrics.jsonl").write_text('{"step": 1}\n{"step":\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2: not valid JSON"):
        report([path], out)
    assert out.read_text() == "old"


def test_bad_arguments(make_run, tmp_path: Path) -> None:
    path = make_run("arm", steps=3)
    with pytest.raises(ValueError, match="samples: expected 0 or more, got -1"):
        report([path], tmp_path / "r.html", samples=-1)
    with pytest.raises(ValueError, match=r"out: the folder of .*r\.html does not exist"):
        report([path], tmp_path / "nowhere" / "r.html")


def test_command(make_run, read_page, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    register(parser.add_subparsers())
    runs = [str(make_run("a", steps=3)), str(make_run("b", steps=3))]
    html, png = tmp_path / "r.html", tmp_path / "r.png"
    args = parser.parse_args(["report", *runs, "--out", str(html), "--png", str(png), "--samples", "0"])
    assert args.func(args) == 0
    assert capsys.readouterr().out.split() == [str(html), str(png)]
    assert png.stat().st_size > 1000
    assert read_page(html).count("details") == 0
