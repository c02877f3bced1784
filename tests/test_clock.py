"""Seconds by part add up, survive exceptions and are taken once."""

from __future__ import annotations

import pytest

from hiexp import clock


def test_parts_add_up_and_are_taken_once(monkeypatch) -> None:
    times = iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(times))
    watch = clock.Clock()
    with watch.part("forward"):
        pass
    with watch.part("backward"):
        pass
    with pytest.raises(ValueError, match="lost"), watch.part("forward"):
        raise ValueError("lost")
    assert watch.take() == {"seconds_forward": 6.0, "seconds_backward": 0.5}
    assert watch.take() == {}
