"""From the files of a study to numbers: a row of measures per seed and arm, then means, intervals, paired differences.

Fixed before any result was seen: the endpoints are test EM on trained families in trained wordings, once without and
once with the HEK (:data:`ENDPOINTS`), and differences are taken within a seed against :data:`BASELINE`. Intervals are
Student's t over seeds, 95%. Added after the first seed: arms tested as they were trained (:data:`AS_TRAINED`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hiexp.evidence.config import ARMS, UNTRAINED, EvidenceConfig
from hiexp.io import DataError
from hiexp.rl.config_parse import build, read_yaml
from hiexp.rl.metrics import read_metrics
from hiexp.tasks.statistics import t_interval

BASELINE = "none"
ENDPOINTS = {"without HEK": "without.seen.em", "with HEK": "hek.seen.em"}
AS_TRAINED = "as trained.seen.em"
# Training rewards whose first crossing is reported, on the mean of so many steps.
THRESHOLDS, WINDOW = (0.5, 0.8), 5
PLATEAU_SHARE = 0.2
_STORES = ("hek", "teacher")

Row = dict[str, float | None]


def collect(out: str | Path) -> dict[str, Any]:
    """Everything that is finished in ``out`` as one JSON-ready summary; ``missing`` lists what is not.

    Raises:
        DataError: there is no study, or none of its arms is finished.
    """
    out = Path(out)
    if not (out / "evidence.yaml").is_file():
        raise DataError(f"{out}: expected a study, made by hiexp evidence --out {out}")
    settings = read_yaml(out / "evidence.yaml", [])
    config = build(EvidenceConfig, settings, str(out / "evidence.yaml"))
    steps = {name: config.arm_steps(name) for name in ARMS}
    folders = sorted(out.glob("seed_*"), key=lambda path: int(path.name.removeprefix("seed_")))
    rows = {int(folder.name.removeprefix("seed_")): read_seed(folder, steps) for folder in folders}
    arms = [name for name in (UNTRAINED, *ARMS) if any(name in found for found in rows.values())]
    if not arms:
        raise DataError(f"{out}: nothing is finished yet")
    stores = {seed: _read_stores(folder) for seed, folder in zip(rows, folders, strict=True)}
    return {
        "settings": settings,
        "seeds": [seed for seed, found in rows.items() if found],
        "missing": _missing(rows, arms),
        "endpoints": ENDPOINTS,
        "arms": {
            name: _over_seeds({seed: found[name] for seed, found in rows.items() if name in found}) for name in arms
        },
        "differences": {name: difference(rows, name, BASELINE) for name in arms if name != BASELINE},
        "stores": {name: _over_seeds({s: f[name] for s, f in stores.items() if name in f}) for name in _STORES},
        "curves": {name: _curves(out, name, list(rows), steps[name]) for name in arms if name != UNTRAINED},
    }


def _missing(rows: Mapping[int, Mapping[str, Row]], arms: Sequence[str]) -> list[str]:
    """What has begun and is not finished, a line a seed, and arms that no seed has finished."""
    open_ = {seed: [name for name in arms if name not in found] for seed, found in rows.items()}
    lines = [f"seed {seed}: {', '.join(names)}" for seed, names in open_.items() if names]
    absent = [name for name in ARMS if name not in arms]
    return [*lines, *([f"any seed: {', '.join(absent)}"] if absent else [])]


def difference(rows: Mapping[int, Mapping[str, Row]], name: str, other: str) -> dict[str, Any]:
    """``name - other`` of every measure over the seeds that have both."""
    return _over_seeds(
        {
            seed: {
                key: _minus(value, found[other].get(key)) for key, value in found[name].items() if key in found[other]
            }
            for seed, found in rows.items()
            if name in found and other in found
        }
    )


def _minus(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _over_seeds(rows: Mapping[int, Row]) -> dict[str, Any]:
    """Measure -> mean, low, high (None with fewer than two seeds), n and the values by seed."""
    found = {}
    for key in dict.fromkeys(key for row in rows.values() for key in row):
        values = {seed: row[key] for seed, row in rows.items() if row.get(key) is not None}
        numbers = [float(value) for value in values.values() if value is not None]
        interval = t_interval(numbers)
        found[key] = {
            "mean": float(np.mean(numbers)) if numbers else None,
            "low": interval[0] if interval else None,
            "high": interval[1] if interval else None,
            "n": len(numbers),
            "seeds": {str(seed): value for seed, value in values.items()},
        }
    return found


def read_seed(folder: Path, steps: Mapping[str, int]) -> dict[str, Row]:
    """The finished arms of one seed: trained to their last step and tested at least without and with the HEK."""
    found = {}
    for name in (UNTRAINED, *ARMS):
        tests = {path.parent.name: path for path in (folder / "tests" / name).glob("[!.]*/measures.json")}
        training = read_metrics(folder / "arms" / name / "metrics.jsonl")
        if {"without", "hek"} <= tests.keys() and (name == UNTRAINED or len(training) >= steps[name]):
            row: Row = {} if name == UNTRAINED else training_measures(training)
            for condition, path in sorted(tests.items()):
                row |= {f"{condition}.{key}": value for key, value in _flat(_read(path)).items()}
            if name != UNTRAINED:
                own = f"{ARMS[name].condition(name)}."
                scores = {key: value for key, value in row.items() if key.endswith((".em", ".f1", ".cem"))}
                row |= {f"as trained.{k.removeprefix(own)}": v for k, v in scores.items() if k.startswith(own)}
            found[name] = row
    return found


def training_measures(rows: Sequence[Mapping[str, Any]]) -> Row:
    """Speed, height and steadiness of one run. ``advantage_var`` is taken before the division by the group's std."""

    def series(key: str) -> np.ndarray[Any, Any]:
        return np.array([row[key] for row in rows if row.get(key) is not None], dtype=np.float64)

    reward = series("reward_mean")
    # The update divides by the rollouts that it trains; over all of the step's, as GRPO's equation 3 has it, the norm
    # shrinks by the share that has no variance. A step without update has no gradient.
    norm = np.array([(row.get("grad_norm") or 0.0) * (1.0 - row["zero_variance_share"]) for row in rows])
    tail = max(1, round(PLATEAU_SHARE * len(reward)))
    means = np.convolve(reward, np.full(WINDOW, 1.0 / WINDOW), mode="valid") if len(reward) >= WINDOW else reward[:0]
    untold = series("reward_without_experience")
    found: Row = {
        "reward_auc": _mean(reward),
        "reward_first": _mean(reward[:tail]),
        "reward_plateau": _mean(reward[-tail:]),
        # After as many rollouts without experience as an arm that shows it to half of each group has in all.
        "reward_midway": _mean(reward[: len(reward) // 2][-tail:]),
        "reward_untold_plateau": _mean(untold[-tail:]),
        "advantage_var": _mean(series("advantage_var_raw")),
        "advantage_var_first": _mean(series("advantage_var_raw")[:tail]),
        "advantage_var_last": _mean(series("advantage_var_raw")[-tail:]),
        "zero_variance_share": _mean(series("zero_variance_share")),
        "zero_variance_first": _mean(series("zero_variance_share")[:tail]),
        "zero_variance_last": _mean(series("zero_variance_share")[-tail:]),
        "grad_norm": _mean(norm),
        "grad_norm_cv": float(norm.std(ddof=1) / norm.mean()) if len(norm) > 1 and norm.mean() > 0 else None,
        "clip_fraction": _mean(series("clip_fraction")),
        "train_searches": _mean(series("searches_per_answer")),
        "hit_rate_start": _mean(series("experience_hit_rate_start")),
        "hit_rate_tool": _mean(series("experience_hit_rate_E1")),
        "seconds": float(series("seconds_step").sum()),
    }
    for threshold in THRESHOLDS:
        reached = np.flatnonzero(means >= threshold)
        found[f"steps_to_{threshold:g}"] = float(reached[0] + WINDOW) if len(reached) else None
    return found


def _mean(values: np.ndarray[Any, Any]) -> float | None:
    return float(values.mean()) if len(values) else None


def _flat(values: Mapping[str, Any], path: str = "") -> Row:
    """Nested measures with dotted names."""
    found: Row = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{path}{key}.")
        elif value is None or isinstance(value, int | float):
            found[f"{path}{key}"] = value
    return found


def _read_stores(folder: Path) -> dict[str, Row]:
    reports = {name: folder / name / "report.json" for name in _STORES}
    return {name: _flat(_read(path)) for name, path in reports.items() if path.is_file()}


def _curves(out: Path, name: str, seeds: Sequence[int], steps: int) -> dict[str, list[float | None]]:
    """Reward by step of the finished runs, by seed."""
    found = {}
    for seed in seeds:
        rows = read_metrics(out / f"seed_{seed}" / "arms" / name / "metrics.jsonl")
        if len(rows) >= steps:
            found[str(seed)] = [row["reward_mean"] for row in rows]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); delete its folder to make it again") from error
