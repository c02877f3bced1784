"""Maths answers: extraction from the usual data-set formats and checking through math-verify.

SymPy can be made to run for hours or to eat all memory by a short string (``9**9**9**9``), and model output is
untrusted. So the checker works in a child process with limits on processor time and memory that can neither write files
nor start programs (``math_worker.py``); what exceeds them scores 0 and is counted, and a new child takes over.
"""

from __future__ import annotations

import json
import re
import selectors
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import Any

from hiexp._extras import require
from hiexp.tasks.scorers import check_golds

_GSM8K_ANSWER = re.compile(r"####\s*(\S.*?)\s*$")
# A final answer stands at the end; more text only costs the parser time.
MAX_ANSWER_CHARACTERS = 4_000
# Importing SymPy takes seconds on a busy machine; not charged to the first answer.
_START_SECONDS = 120.0
_CLOCK_FACTOR = 20.0  # a machine this busy answers nobody


def gsm8k_answer(solution: str) -> str:
    """The answer behind ``####`` of a GSM8K solution, thousands separators removed.

    Raises:
        ValueError: no ``#### answer`` line.
    """
    match = _GSM8K_ANSWER.search(solution)
    if match is None:
        raise ValueError(f"expected a solution that ends in '#### answer', got {solution[-60:]!r}")
    return re.sub(r"(?<=\d),(?=\d{3})", "", match.group(1))


def number_text(value: float) -> str:
    """A number as a person writes it: AMC files hold ``27.0`` for 27."""
    return str(int(value)) if float(value).is_integer() else repr(value)


class MathScorer:
    r"""``{"accuracy"}`` of maths answers by mathematical equality (``1/2`` = ``0.5`` = ``\frac{1}{2}``).

    Text that holds ``\boxed{...}`` (the last one counts) or ``$...$`` is judged by that, other text as one LaTeX
    expression and, where that differs, by the expression math-verify finds in it. Garbage scores 0.

    Args:
        time_limit: seconds of processor time per answer, after which the checker ends and the answer scores 0. The
            same answer gets the same time on a busy machine; twenty times as long on the clock ends it in any case.

    Attributes:
        failures: how many answers broke the limits so far.
    """

    metrics: tuple[str, ...] = ("accuracy",)

    def __init__(self, time_limit: float = 5.0) -> None:
        require("math_verify", "train", "MathScorer")
        if not time_limit > 0:
            raise ValueError(f"time_limit: expected seconds > 0, got {time_limit!r}")
        self.time_limit = time_limit
        self.failures = 0
        self._worker: subprocess.Popen[bytes] | None = None

    def score(self, prediction: str | None, golds: Sequence[str]) -> dict[str, float]:
        """1.0 where ``prediction`` equals one of ``golds``; None, empty or unreadable predictions score 0.

        Raises:
            TypeError, ValueError: see :func:`hiexp.tasks.scorers.check_golds`.
        """
        check_golds(golds)
        text = (prediction or "").strip()[-MAX_ANSWER_CHARACTERS:]
        if not text:
            return {"accuracy": 0.0}
        # math-verify takes several boxes for one set; a final answer is the last of them.
        text = text[max(text.rfind("\\boxed"), 0) :]
        if any(text == gold.strip() for gold in golds):
            return {"accuracy": 1.0}
        return {"accuracy": float(self._ask(text, [str(gold) for gold in golds]))}

    def close(self) -> None:
        """End the checker process; the next score starts a new one."""
        if self._worker is not None:
            _end(self._worker)
            self._worker = None

    def _ask(self, prediction: str, golds: list[str]) -> bool:
        worker = self._worker or self._start()
        request = json.dumps({"prediction": prediction, "golds": golds, "seconds": self.time_limit}).encode() + b"\n"
        assert worker.stdin is not None
        try:
            worker.stdin.write(request)
            worker.stdin.flush()
            reply = _read_line(worker, self.time_limit * _CLOCK_FACTOR)
        except BrokenPipeError:
            reply = None
        if reply is None:
            self.failures += 1
            self.close()
            return False
        return bool(reply["equal"])

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "hiexp.tasks.math_worker"]
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        weakref.finalize(self, _end, worker)
        if _read_line(worker, _START_SECONDS) is None:
            _end(worker)
            raise RuntimeError(f"the maths checker did not start within {_START_SECONDS:.0f} s: {' '.join(command)}")
        self._worker = worker
        return worker


def _read_line(worker: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
    """The worker's next line; None where the time ran out or it died."""
    assert worker.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    line = worker.stdout.readline()
    return json.loads(line) if line else None


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.kill()
    worker.wait()
    for stream in (worker.stdin, worker.stdout):
        if stream is not None:
            # A killed worker leaves an unread request in the pipe; closing may flush into it.
            try:
                stream.close()
            except BrokenPipeError:
                continue
