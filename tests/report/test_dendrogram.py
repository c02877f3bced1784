"""The picture of a hierarchy shows exactly the clusters the build made, and refuses what it cannot draw."""

import numpy as np
import pytest

import hiexp
from hiexp.cli import main
from hiexp.experience.record import Experience
from hiexp.experience.store import HEK
from hiexp.report.dendrogram import check_picture, draw_hierarchy, forest

pytest.importorskip("matplotlib")
THRESHOLDS = {"E2": 1.2, "E3": 5.0}


@pytest.fixture
def hek(tmp_path):
    texts = ["When did the play {} first open on stage?", "In which town was the painter {} born?"]
    with HEK.create(tmp_path / "hek.sqlite") as store:
        store.add(
            [
                Experience("E1", title=text.format(f"name{f}{i}"), description=f"advice {f} {i} $5")
                for f, text in enumerate(texts)
                for i in range(4)
            ]
            + [Experience("E1", title="zebra umbrella", description="alone")]
        )
        yield store


def test_forest_has_one_tree_a_cluster():
    X = np.random.default_rng(0).normal(size=(40, 3))
    Z = hiexp.linkage(X, threshold=1.5)
    roots = forest(Z, 40)
    labels = hiexp.cut_tree(Z, 40, threshold=1.5)
    assert len(roots) == 40 - len(Z) == labels.max() + 1
    assert sorted(leaf for root in roots for leaf in root.leaves) == list(range(40))
    for root in roots:
        assert len(set(labels[root.leaves])) == 1
        assert all(child.height <= root.height < 1.5 for child in root.children)


def test_svg_names_lessons_patterns_strategies_and_cuts(hek, tmp_path):
    report = hek.build_hierarchy(thresholds=THRESHOLDS)
    draw_hierarchy(hek, report.thresholds, tmp_path / "tree.svg")
    svg = (tmp_path / "tree.svg").read_text(encoding="utf-8")
    assert "9 lessons (E1)" in svg
    assert f"{report.sizes['E2']} patterns (E2)" in svg
    assert f"{report.sizes['E3']} strategies (E3)" in svg
    assert "cut at 1.200" in svg
    assert "cut at 5.000" in svg
    assert "zebra umbrella" in svg
    assert svg.count("name00") == 1 + sum("name00" in entry.title for entry in [*hek.entries("E2"), *hek.entries("E3")])


def test_hek_without_levels_above_is_drawn(hek, tmp_path):
    draw_hierarchy(hek, THRESHOLDS, tmp_path / "tree.png")
    assert (tmp_path / "tree.png").read_bytes().startswith(b"\x89PNG")


def test_bad_pictures_are_named_before_the_build(hek, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"picture: expected a file ending in \.png, \.svg or \.pdf"):
        check_picture(tmp_path / "tree.gif")
    with pytest.raises(ValueError, match="picture: no such folder"):
        check_picture(tmp_path / "none" / "tree.png")
    hek.close()
    assert main(["build", str(tmp_path / "hek.sqlite"), "--picture", str(tmp_path / "tree.gif")]) != 0
    assert "expected a file ending in" in capsys.readouterr().err
    with HEK.open(tmp_path / "hek.sqlite") as same:
        assert not same.entries("E2")


def test_empty_hek_is_refused(tmp_path):
    with HEK.create(tmp_path / "empty.sqlite") as empty, pytest.raises(ValueError, match="expected a HEK with lessons"):
        draw_hierarchy(empty, THRESHOLDS, tmp_path / "tree.svg")
