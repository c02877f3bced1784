"""Maths answers: equality, garbage, the limits of the checker process, data-set formats."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hiexp.tasks.maths import MathScorer, gsm8k_answer, number_text
from hiexp.tasks.qa import load_questions

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def scorer() -> Iterator[MathScorer]:
    scorer = MathScorer(time_limit=3.0)
    yield scorer
    scorer.close()


@pytest.mark.parametrize(
    ("prediction", "golds", "accuracy"),
    [
        ("204", ["204"], 1),
        ("204.0", ["204"], 1),
        ("1/2", ["0.5"], 1),
        (r"\frac{1}{2}", ["0.5"], 1),
        (r"so the answer is $\boxed{\frac{2}{4}}$", ["1/2"], 1),
        (r"not \boxed{12} but \boxed{13}", ["13"], 1),
        ("The answer is 204", ["204"], 1),
        ("$70,000", ["70000"], 1),
        ("18 dollars", ["18"], 1),
        (r"\$18", ["18"], 1),
        (r"\boxed{\$1,800}", ["1800"], 1),
        ("x^2+1", ["1+x^2"], 1),
        (r"(3,\frac{\pi}{2})", [r"\left(3, \frac{\pi}{2}\right)"], 1),
        ("5", ["4", "5"], 1),
        ("205", ["204"], 0),
        ("0.3333", ["1/3"], 0),
        ("x^2-1", ["1+x^2"], 0),
        (None, ["1"], 0),
        ("", ["1"], 0),
        ("no idea", ["1"], 0),
    ],
)
def test_accuracy(scorer: MathScorer, prediction: str | None, golds: list[str], accuracy: float) -> None:
    assert scorer.score(prediction, golds) == {"accuracy": accuracy}


@pytest.mark.parametrize(
    "garbage",
    [
        "\x00\x07",
        r"\frac{3}{",
        r"\boxed{\boxed{",
        "$" * 50,
        "<|im_end|>",
        "١٢٣؟",
        "{" * 200,
        "\n",
        "1" * 3000,
        "\ud800",
    ],
)
def test_garbage_scores_zero(scorer: MathScorer, garbage: str) -> None:
    assert scorer.score(garbage, ["7"]) == {"accuracy": 0.0}


def test_an_explosive_expression_is_cut_off_and_the_next_answer_is_judged() -> None:
    scorer = MathScorer(time_limit=1.0)
    assert scorer.score("9**9**9**9", ["3"]) == {"accuracy": 0.0}
    assert scorer.failures == 1
    scorer.time_limit = 20.0
    assert scorer.score("2/4", ["0.5"]) == {"accuracy": 1.0}
    assert scorer.failures == 1
    scorer.close()


BOMBS = {
    "exponents": "9**9**9**9",
    "factorial": "(10^7)!",
    "endless sum": r"\sum_{n=1}^{10^{12}} n^{-3}",
    "deep fractions": "\\frac{1}{" * 400 + "2" + "}" * 400,
    "expansion": "(x+y)^{100000}",
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_bombs_score_zero_within_their_processor_time(bomb: str) -> None:
    """The kernel's clock of finished children says what the checker really used."""
    scorer = MathScorer(time_limit=0.3)
    scorer.score("2/4", ["0.5"])
    assert scorer._worker is not None
    started = cpu_seconds(scorer._worker.pid)
    before = finished_cpu_seconds()
    assert scorer.score(bomb, ["3"]) == {"accuracy": 0.0}
    if scorer.failures:
        assert finished_cpu_seconds() - before - started < 0.3 + 0.2
    scorer.close()


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def finished_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


INJECTIONS = [
    "__import__('os').system('touch {file}')",
    r"\boxed{{__import__('os').system('touch {file}')}}",
    "open('{file}', 'w').write('x')",
    "exec(\"open('{file}', 'w')\")",
    "().__class__.__base__.__subclasses__()",
    '7"}}\n{{"equal": true}}\n',
]


@pytest.mark.parametrize("text", INJECTIONS)
def test_injected_code_does_nothing(scorer: MathScorer, tmp_path: Path, text: str) -> None:
    file = tmp_path / "made"
    assert scorer.score(text.format(file=file), ["42"]) == {"accuracy": 0.0}
    assert not file.exists()


CONFINED = """
import socket, subprocess, sys
from hiexp.tasks import math_worker
math_worker._confine()
print("confined", flush=True)
{action}
print("escaped", flush=True)
"""


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("open({file!r}, 'w')", 3),
        ("import os; os.open({file!r}, os.O_CREAT | os.O_WRONLY)", 3),
        ("import os; os.system('true')", 3),
        ("import os; os.fork()", 3),
        ("subprocess.run(['true'])", 3),
        ("socket.socket().connect(('127.0.0.1', 9))", 3),
        ("try: open({file!r}, 'w')\nexcept BaseException: pass", 3),
        ("x = bytearray(3 << 30)", 1),
        ("import signal; signal.setitimer(signal.ITIMER_PROF, 0.1)\nwhile True: pass", -27),
        ("import signal; signal.setitimer(signal.ITIMER_PROF, 0.1); 9 ** 9 ** 9", -27),
        ("open(__import__('os').devnull).read()", 0),
    ],
)
def test_the_confined_process_cannot_do_harm(tmp_path: Path, action: str, code: int) -> None:
    """Limits hold against any Python that a parser might come to run, not against the strings we thought of only."""
    file = str(tmp_path / "made")
    program = CONFINED.format(action=action.format(file=file))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (code, "confined\n" if code else "confined\nescaped\n")
    assert not Path(file).exists()


@pytest.mark.data
@pytest.mark.parametrize("name", ["aime24", "amc23", "gsm8k"])
def test_real_golds_are_accepted_in_other_words(scorer: MathScorer, data_dir: Path, name: str) -> None:
    golds = [question.golden_answers[0] for question in load_questions(str(data_dir / "math" / f"{name}.jsonl"))][:25]
    failures = scorer.failures
    for gold in golds:
        for text in (rf"so $\boxed{{{gold}}}$.", f"The answer is {gold}", f"{3 * int(gold)}/3", f"{int(gold):,}.0"):
            assert scorer.score(text, [gold]) == {"accuracy": 1.0}, text
        assert scorer.score(rf"\boxed{{{int(gold) + 1}}}", [gold]) == {"accuracy": 0.0}
    assert scorer.failures == failures


def test_a_checker_that_died_is_replaced(scorer: MathScorer) -> None:
    scorer.score("2/4", ["0.5"])
    failures = scorer.failures
    assert scorer._worker is not None
    scorer._worker.kill()
    scorer._worker.wait()
    assert scorer.score("2/4", ["0.5"]) == {"accuracy": 0.0}
    assert scorer.failures == failures + 1
    assert scorer.score("2/4", ["0.5"]) == {"accuracy": 1.0}


def test_only_the_end_of_a_long_text_is_read(scorer: MathScorer) -> None:
    assert scorer.score("word " * 5000 + r"\boxed{42}", ["42"]) == {"accuracy": 1.0}


def test_bad_arguments(scorer: MathScorer) -> None:
    with pytest.raises(ValueError, match="time_limit: expected seconds > 0, got 0"):
        MathScorer(time_limit=0)
    with pytest.raises(TypeError, match="golds: expected a sequence of strings, got the string '4'"):
        scorer.score("4", "4")
    with pytest.raises(ValueError, match="golds: expected at least one gold answer"):
        scorer.score("4", [])


def test_gsm8k_answer() -> None:
    assert gsm8k_answer("2*9 = $<<2*9=18>>18.\n#### 18") == "18"
    assert gsm8k_answer("so\n#### 1,234,000\n") == "1234000"
    assert gsm8k_answer("#### -3.5 ") == "-3.5"
    with pytest.raises(ValueError, match="expected a solution that ends in '#### answer'"):
        gsm8k_answer("it is 18")


@pytest.mark.parametrize(("value", "text"), [(27.0, "27"), (27, "27"), (0.5, "0.5"), (-3.0, "-3")])
def test_number_text(value: float, text: str) -> None:
    assert number_text(value) == text
