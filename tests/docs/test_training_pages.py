"""docs/training_metrics.md names every metric and every alarm."""

from __future__ import annotations

import re
from pathlib import Path

from hiexp.rl.config import ALARMS
from hiexp.rl.metrics import METRIC_KEYS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training_metrics.md"


def test_every_metric_and_alarm_is_explained():
    named = set(re.findall(r"`([^`]+)`", PAGE.read_text(encoding="utf-8")))
    named |= {f"experience_hit_rate{name}" for name in named if name in ("_E2", "_E3")}
    prefixes = tuple(name[:-1] for name in named if name.endswith("_*"))
    assert [key for key in METRIC_KEYS if key != "step" and key not in named and not key.startswith(prefixes)] == []
    assert set(ALARMS) <= named
