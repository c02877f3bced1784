"""The child process of ``MathScorer``: one JSON request a line on stdin, one reply a line on stdout.

Run as ``python -m hiexp.tasks.math_worker``. Lives apart so that an expression that explodes takes down this process
only. It may not write files, start programs or open connections: SymPy evaluates strings as Python in places, and the
strings come from a model. What tries to, or takes too much processor time or memory, ends the process.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

from hiexp._extras import require

# SymPy needs about 150 MB; the rest is room for honest big numbers.
MEMORY_BYTES = 2 * 1024**3
_MOST_FILES = 64  # open at once; late imports need a few
_FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill", "os.putenv",
              "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "os.truncate",
              "subprocess.Popen", "socket.", "shutil.", "ctypes.", "webbrowser.", "urllib.", "ftplib.")  # fmt: skip
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

# Text with one of these says itself where its expression is.
_ANCHORS = ("$", "\\boxed", "\\(", "\\[")


def equal(prediction: str, golds: list[str]) -> bool:
    """Whether math-verify finds ``prediction`` equal to one of ``golds``."""
    verify = require("math_verify", "train", "MathScorer").verify
    answers = _readings(prediction)
    # Golds are expressions, not prose: their first reading is the right one.
    targets = [readings[0] for readings in map(_readings, golds) if readings]
    return any(verify(target, answer, timeout_seconds=None) for target in targets for answer in answers)


def _readings(text: str) -> list[list[Any]]:
    """The ways math-verify can read ``text``: as one LaTeX expression, then as prose that holds one."""
    text = text.replace("\\$", "")  # a sum of money, which math-verify takes for the beginning of a formula
    parse = require("math_verify", "train", "MathScorer").parse
    texts = [text] if any(anchor in text for anchor in _ANCHORS) else [f"${text}$", text]
    # The caller's clock limits the time: math-verify's own alarm does not interrupt big-number arithmetic.
    return [reading for reading in (parse(each, parsing_timeout=None) for each in texts) if reading]


def _confine() -> None:
    """Limit what this process may do from now on; there is no way back."""
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_MOST_FILES, _MOST_FILES))
    sys.addaudithook(_forbid)


def _forbid(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and bool((args[2] or 0) & _WRITE_FLAGS)
    if writes or event.startswith(_FORBIDDEN):
        os._exit(3)  # not an exception: whoever evaluates the string might catch it


def main() -> None:
    """Answer requests until stdin closes."""
    logging.disable(logging.CRITICAL)
    # Replies go to the real stdout; whatever SymPy prints must not mix with them.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    equal("1", ["1"])
    _confine()
    replies.write('{"ready": true}\n')
    for line in sys.stdin:
        request = json.loads(line)
        # Processor time, not the clock: on a busy machine a fair answer gets its due. SIGPROF ends the process even in
        # the middle of big-number arithmetic, and even when nobody waits for the reply any more.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        try:
            found = equal(request["prediction"], request["golds"])
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps({"equal": found}) + "\n")


if __name__ == "__main__":
    main()
