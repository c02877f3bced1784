"""Results of an evaluation as text: one table a data set, differences, averages, and what the numbers depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hiexp.agent.arms import ARMS
from hiexp.agent.command_config import number
from hiexp.rl.metrics import SERVICE_KEYS

_CELL = 22
# Shown where they happened.
EVENTS = ("duplicate_searches", "engine_restarts", *SERVICE_KEYS)


def result_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """Everything ``hiexp eval`` prints about a result of :mod:`hiexp.agent.eval_run`."""
    for name, part in result["sets"].items():
        repeated = part["repeated_questions"]
        twice = f"; {repeated} questions are asked more than once" if repeated else ""
        yield f"\n{name}: {part['n_questions']} questions, {part['kind']}, scorer {part['scorer']}{twice}"
        yield from table_lines({ARMS[arm].title: part[arm] for arm in result["arms"]})
        yield from _difference_lines(part["differences"])
    if result["macro"] is not None:
        yield f"\nmean over {len(result['macro']['sets'])} data sets, each counts the same"
        yield from table_lines({ARMS[arm].title: result["macro"][arm] for arm in result["arms"]})
        yield from _difference_lines(result["macro"]["differences"])
    yield f"\n{statement(result)}"


def table_lines(arms: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A table with a line per metric and a column per arm; numbers with their 95 % interval where they have one."""
    metrics = [
        key
        for key in dict.fromkeys(key for arm in arms.values() for key, value in arm.items() if _is_number(value))
        if key not in EVENTS or any(arm.get(key) for arm in arms.values())
    ]
    width = max(map(len, metrics), default=0)
    yield " ".join([" " * width, *(f"{name:>{_CELL}}" for name in arms)])
    for metric in metrics:
        yield " ".join([f"{metric:<{width}}", *(f"{_with_interval(arm, metric):>{_CELL}}" for arm in arms.values())])


def _difference_lines(differences: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[str]:
    for arm, scores in differences.items():
        yield f"{ARMS[arm].title} minus {ARMS[ARMS[arm].against].title}, paired by question"
        width = max(map(len, scores), default=0)
        for metric, (mean, low, high) in scores.items():
            yield f"  {metric:<{width}}  {mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def statement(result: Mapping[str, Any]) -> str:
    """One sentence with what every score depends on."""
    corpus = f"{result['tool']} over {result['corpus']}" if result["corpus"] else "no search"
    judge = result.get("judge")
    judged = (
        ""
        if judge is None
        else f"; judge {judge['model']} ({judge['failures']} answers without a verdict count as wrong)"
    )
    hek = f"; HEK snapshot {result['snapshot_id'][:16]}" if result["snapshot_id"] else ""
    chat = "" if result.get("logprobs", True) else "; chat API: no log-probs, tokens as the server counts them"
    return (
        f"{result['model']}{chat}; dialect {result['dialect']}; {corpus}; {result['samples']} answer(s) a question at "
        f"temperature {result['temperature']:g}, seed {result['seed']}{hek}{judged}; "
        "95 % bootstrap intervals over questions"
    )


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _with_interval(arm: Mapping[str, Any], metric: str) -> str:
    interval = arm.get("intervals", {}).get(metric)
    text = number(arm.get(metric))
    return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"
