"""Background work: bounded, in order, forgotten when dropped, no thread left."""

from __future__ import annotations

import threading

import pytest

from hiexp.agent.background import Background


def collected(background):
    outcomes = []
    while len(background):
        outcomes += background.collect(None)
    return outcomes


def test_every_outcome_comes_once_errors_included():
    background = Background(3, "test")
    for key in range(20):
        background.submit(key, (lambda key=key: key * key) if key % 5 else (lambda: 1 / 0))
    outcomes = sorted(collected(background))
    assert [one.key for one in outcomes] == list(range(20))
    assert [one.value for one in outcomes if one.error is None] == [key * key for key in range(20) if key % 5]
    assert sum(isinstance(one.error, ZeroDivisionError) for one in outcomes) == 4
    assert background.collect(None) == []


def test_no_more_at_once_than_allowed():
    at_once, most, lock, gate = 0, 0, threading.Lock(), threading.Barrier(3, timeout=60)

    def work():
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        gate.wait()  # passes only when three are here
        with lock:
            at_once -= 1

    background = Background(3, "test")
    for key in range(9):
        background.submit(key, work)
    assert [one.error for one in collected(background)] == [None] * 9
    assert most == 3


def test_dropped_work_is_forgotten_and_its_key_free_again():
    gate, ran = threading.Event(), []
    background = Background(1, "test")
    background.submit(0, lambda: gate.wait(60) and "old")
    background.submit(1, lambda: ran.append(1))
    background.drop(0)
    background.drop(1)
    assert len(background) == 0
    background.submit(0, lambda: "new")
    gate.set()
    assert [one.value for one in collected(background)] == ["new"]
    assert not ran


def test_closing_ends_the_threads():
    gate, before = threading.Event(), set(threading.enumerate())
    background = Background(2, "test")
    for key in range(10):
        background.submit(key, lambda: gate.wait(60))
    background.close()
    gate.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    assert background.collect(0.0) == []
    with pytest.raises(ValueError, match="limit: expected at least 1"):
        Background(0, "test")
