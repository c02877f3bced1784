"""Calibration: thresholds are quantiles over random pairs, within bounds, the same in every run, kept with the HEK."""

import numpy as np
import pytest

from hiexp.experience.calibrate import E1_BOUNDS, Calibration, calibrate, calibrate_search
from hiexp.experience.encoder import HashingEncoder
from hiexp.experience.store import HEK

from .conftest import lesson

ENCODER = HashingEncoder(64)
TEXTS = [f"entirely different text number {i} about subject {i * 7919 % 101}" for i in range(400)]


def test_calibration_is_stored(path, hek):
    assert hek.calibration.source == "reference"
    before = hek.snapshot().thresholds["E1"]
    hek.add([lesson(i) for i in range(10)])
    assert hek.calibrate().source == "titles"
    hek.close()
    with HEK.open(path) as again:
        assert again.snapshot().thresholds["E1"] == again.calibration.thresholds["E1"] > before


def test_calibration_on_given_texts(path):
    texts = [f"entirely different text number {i} about subject {i * 7919 % 101}" for i in range(200)]
    with HEK.create(path, calibrate=texts) as hek:
        calibration = hek.calibration
        vectors = hek.encoder.encode(texts)
    assert calibration.source == "texts"
    upper = (vectors @ vectors.T)[np.triu_indices(200, 1)]
    # All 19,900 pairs are few enough to be used, so the quantile is exact.
    assert calibration.thresholds["E1"] == pytest.approx(np.clip(np.quantile(upper, 0.99), 0.1, 0.95), abs=1e-5)
    assert calibration.thresholds["E2"] == pytest.approx(np.quantile(np.sqrt(2 - 2 * upper), 0.05), abs=1e-4)


def test_calibration_needs_two_texts(path):
    with pytest.raises(ValueError, match="at least two distinct texts, got 1"):
        HEK.create(path, calibrate=["same", "same"])
    assert not path.exists()


def test_the_built_in_reference_serves_without_texts():
    calibration = calibrate(ENCODER)
    assert calibration.source == "reference"
    assert calibration.encoder_id == ENCODER.id
    assert E1_BOUNDS[0] <= calibration.thresholds["E1"] <= E1_BOUNDS[1]
    assert 0 < calibration.thresholds["E2"] < calibration.thresholds["E3"] < 2


def test_random_pairs_estimate_the_quantiles_of_all_pairs():
    calibration = calibrate(ENCODER, TEXTS)
    assert calibration.n_pairs == 20_000 < 400 * 399 // 2
    vectors = ENCODER.encode(TEXTS)
    everything = (vectors @ vectors.T)[np.triu_indices(400, 1)]
    for quantile in (0.25, 0.5, 0.75):
        assert calibration.similarity[str(quantile)] == pytest.approx(np.quantile(everything, quantile), abs=0.02)


def test_order_and_duplicates_do_not_matter():
    assert calibrate(ENCODER, TEXTS) == calibrate(ENCODER, [*reversed(TEXTS), *TEXTS[:50]])


def test_json_round_trip():
    calibration = calibrate(ENCODER, TEXTS)
    assert Calibration.from_json(calibration.to_json()) == calibration


def test_stricter_quantiles_give_stricter_thresholds():
    loose = calibrate(ENCODER, TEXTS, e1_quantile=0.5, cluster_quantiles={"E2": 0.2, "E3": 0.5}).thresholds
    strict = calibrate(ENCODER, TEXTS, e1_quantile=0.999, cluster_quantiles={"E2": 0.001, "E3": 0.1}).thresholds
    assert loose["E1"] < strict["E1"]
    assert loose["E2"] > strict["E2"]
    assert loose["E3"] > strict["E3"]


def test_bounds_hold_for_near_duplicates():
    assert (
        calibrate(ENCODER, [f"the very same long question about a film {i}" for i in range(9)]).thresholds["E1"] <= 0.95
    )


def test_a_quantile_outside_its_range():
    with pytest.raises(ValueError, match=r"e1_quantile: expected a quantile from 0 to 1, got 1\.5"):
        calibrate(ENCODER, TEXTS, e1_quantile=1.5)
    with pytest.raises(ValueError, match="E2: expected a quantile"):
        calibrate(ENCODER, TEXTS, cluster_quantiles={"E2": -0.1})


SEARCHES = [(text, " ".join(text.split()[-3:])) for text in TEXTS]


def test_the_search_threshold_is_a_quantile_of_queries_and_titles_of_other_questions():
    before = calibrate(ENCODER, TEXTS)
    after = calibrate_search(before, ENCODER, TEXTS, SEARCHES)
    similarity = ENCODER.encode([query for _, query in SEARCHES]) @ ENCODER.encode(TEXTS).T
    # All pairs but those of a query and its own question; 20,000 of them were drawn.
    others = similarity[~np.eye(len(TEXTS), dtype=bool)]
    assert after.thresholds["E1"] == pytest.approx(np.quantile(others, 0.99), abs=0.02)
    assert after.n_queries == len({query for _, query in SEARCHES})
    assert {**after.thresholds, "E1": 0} == {**before.thresholds, "E1": 0}
    assert calibrate_search(before, ENCODER, TEXTS[::-1], SEARCHES[::-1]) == after


def test_a_query_makes_no_pair_with_its_own_question():
    # Every question asks for itself: with its own title the similarity would be 1 for one pair in 60.
    titles = [f"{'abcdefghijklmnopqrstuvwxyz'[i % 26] * 9}{i}" for i in range(60)]
    searches = [(title.upper(), title) for title in titles]
    found = calibrate_search(calibrate(ENCODER, TEXTS), ENCODER, titles, searches, e1_quantile=1.0)
    similarity = ENCODER.encode(titles) @ ENCODER.encode(titles).T
    highest = np.clip(similarity[~np.eye(60, dtype=bool)].max(), *E1_BOUNDS)
    assert found.thresholds["E1"] == pytest.approx(highest, abs=1e-5)


def test_too_few_queries_change_nothing():
    before = calibrate(ENCODER, TEXTS)
    assert calibrate_search(before, ENCODER, TEXTS, SEARCHES[:20]) == before
    assert calibrate_search(before, ENCODER, TEXTS[:20], SEARCHES) == before
    with pytest.raises(ValueError, match="e1_quantile: expected a quantile"):
        calibrate_search(before, ENCODER, TEXTS, SEARCHES, e1_quantile=2.0)
    with pytest.raises(ValueError, match="encoder: expected 'hashing-v1-d64'"):
        calibrate_search(before, HashingEncoder(32), TEXTS, SEARCHES)


def test_the_search_threshold_survives_a_build_and_reopening(path, hek):
    hek.add([lesson(i) for i in range(80)])
    found = hek.calibrate_search([(f"When did play {i} open?", f"play {i} premiere") for i in range(80)])
    assert found.n_queries == 80
    hek.build_hierarchy()
    assert hek.calibration.source == "titles"
    hek.close()
    with HEK.open(path) as again:
        assert again.snapshot().thresholds["E1"] == found.thresholds["E1"]
        assert again.calibration.n_queries == 80


def test_files_from_before_queries_were_counted_are_read():
    row = calibrate(ENCODER, TEXTS).to_json()
    del row["n_queries"]
    assert Calibration.from_json(row).n_queries == 0
