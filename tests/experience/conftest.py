"""A small HEK in a file, and lessons to put into it."""

import pytest

from hiexp.experience.record import Experience
from hiexp.experience.store import HEK


def lesson(number=0, **fields):
    base = {
        "level": "E1",
        "title": f"When did play {number} open?",
        "description": f"look for premiere , not composition {number}",
        "qa_groups": (f"q{number}",),
        "sources": (f"q{number}/0/1", f"q{number}/0/2"),
    }
    return Experience(**(base | fields))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "hek.sqlite"


@pytest.fixture
def hek(path):
    with HEK.create(path, encoder="hashing:64") as store:
        yield store
