"""What a rollout was told and what it chose, read from hand-made rollouts."""

from __future__ import annotations

import pytest

from hiexp.agent.record import Injection, Rollout, ToolCall
from hiexp.evidence.task import EvidenceTask
from hiexp.evidence.trial import measure, read
from hiexp.experience.record import Experience
from hiexp.experience.retrieve import Snapshot
from hiexp.tasks.question import Question

from .conftest import tiny

TASK = EvidenceTask(tiny(), seed=0)
QUESTION = TASK.test["seen"][0]
RIGHT, TRAP = QUESTION.meta["right"], QUESTION.meta["trap"]
LINES = {
    "right": f"look for {RIGHT} , not {TRAP}",
    "inverted": f"look for {TRAP} , not {RIGHT}",
    "other": "look for nothing , not something",
    "leak": f"look for {QUESTION.golden_answers[0]}",
}


def rollout(
    question: Question, named: list[str], shown: list[tuple[str, int]] = (), queries: list[str] = ()
) -> Rollout:
    return Rollout(
        rollout_id="r", question_id=question.id, question=question.text, token_ids=[], loss_mask=[], logprobs=[],
        spans=[],
        injections=[Injection(line, 1, "E1" if turn else "E2", 1.0, turn, 0, 1) for line, turn in shown],
        tool_calls=[ToolCall(1, query, "ok", 0.0) for query in queries], snapshot_id=None, seed=0, policy_step=0,
        dialect="hiexp_compact", finish_reason="answer", answer="x", scores={"em": 1.0, "f1": 1.0, "cem": 1.0},
        steps=[("think", name) for name in named],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("named", "shown", "expected"),
    [
        ([RIGHT, RIGHT], [], ("none", "none", "right", "right")),
        ([TRAP, RIGHT], [("inverted", 0), ("right", 1)], ("inverted", "right", "inverted", "right")),
        ([TRAP, TRAP], [("other", 0), ("right", 0)], ("right", "none", "inverted", "inverted")),
        ([RIGHT, TRAP], [("right", 1), ("inverted", 2)], ("none", "inverted", "right", "inverted")),
        (["elsewhere"], [("other", 0)], ("none", "none", "other", "other")),
        ([], [], ("none", "none", "other", "other")),
    ],
)
def test_reading(named, shown, expected):
    found = read(QUESTION, rollout(QUESTION, named, shown), LINES)
    assert (found["start"], found["tool"], found["searched"], found["chosen"]) == expected
    assert not found["leak"]


def test_a_line_with_the_answer_counts_as_a_leak():
    assert read(QUESTION, rollout(QUESTION, [RIGHT], [("leak", 1)]), LINES)["leak"]


def test_shares_over_a_stratum():
    snapshot = Snapshot(
        tuple(Experience("E2", name, LINES[name], exp_id=name, rev=1) for name in sorted(LINES)),
        [[1.0]] * len(LINES), "e", "", {"E1": 0.0},
    )  # fmt: skip
    rollouts = [rollout(question, [], queries=["a", "b"]) for question in TASK.evaluation()[0].questions]
    rollouts[0] = rollout(QUESTION, [RIGHT, RIGHT], [("right", 0)], ["same", "same"])
    found = measure(rollouts, TASK, snapshot)
    n = len(TASK.test["seen"])
    seen = found["seen"]
    assert (seen["n"], seen["em"], seen["leaks"], seen["searches"]) == (n, 1.0, 0, 2.0)
    assert seen["start"]["right"] == seen["chose_right"] == seen["duplicate_queries"] == 1 / n
    assert seen["start"]["follows_right"] == 1.0
    assert seen["start"]["follows_inverted"] is None
    assert seen["start"]["right_untold"] == 0.0
    assert found["unseen"]["start"]["right"] == 0.0
