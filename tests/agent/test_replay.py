"""Replay: the inserted tokens of a stored rollout come back without a model; a record that was changed is found out."""

from __future__ import annotations

import copy
import json

import pytest

from hiexp.agent.record import Rollout
from hiexp.agent.recorded_tool import RecordedTool
from hiexp.agent.replay import replay
from hiexp.agent.rollout import SearchAgent
from hiexp.experience.encoder import HashingEncoder
from hiexp.experience.record import Experience
from hiexp.experience.retrieve import Snapshot
from hiexp.io import DataError
from hiexp.tasks.question import Question

QUESTION = Question("q0", "w0 w1 w2", ("w3",))
TURNS = [
    "<think> w1 </think> <tool_call> w0 w9 </tool_call>",
    "<tool_call> w5 </tool_call>",
    "<tool_call> W0  w9 </tool_call>",
    "<think> w2 </think> \\boxed{ w3 }",
]


def lessons():
    encoder = HashingEncoder(64)
    entries = [
        Experience("E1", "w0 w9", "look for w1 , not w2", exp_id="e0", rev=1, qa_groups=("other",)),
        Experience("E2", "w0 w1 w2", "look for w5 , not w6", exp_id="e1", rev=2, qa_groups=("other",)),
    ]
    vectors = encoder.encode([entry.title for entry in entries])
    return Snapshot(tuple(entries), vectors, encoder.id, encoder.spec, {"E1": 0.3})


def agent_of(fakes, tokenizer, tool, turns=TURNS, **settings):
    script = [[tokenizer(turn.lower())["input_ids"] for turn in turns]]
    engine = fakes.ScriptedEngine(tokenizer, script)
    return SearchAgent(engine, tool, dialect="hiexp_compact", **settings)


@pytest.mark.parametrize("with_experience", [True, False])
@pytest.mark.parametrize(
    ("turns", "reason"),
    [(TURNS, "answer"), (["w1 w2"], "malformed"), (["w1 <eos>"], "eos"), (TURNS[:1], "max_turns"), ([], "malformed")],
)
def test_stored_rollouts_replay_from_their_recorded_searches(
    fakes, word_tokenizer, tmp_path, turns, reason, with_experience
):
    class Moody(fakes.ListTool):
        def search(self, queries, top_k):
            if "w5" in queries:
                raise OSError("no answer")
            return super().search(queries, top_k)

    snapshot = lessons()
    recording = RecordedTool(tmp_path / "searches.sqlite", Moody())
    agent = agent_of(fakes, word_tokenizer, recording, turns)
    made = agent.run([QUESTION], seeds=[4], snapshot=snapshot, with_experience=[with_experience])[0]
    assert made.finish_reason == reason
    stored = Rollout.from_json(json.loads(json.dumps(made.to_json())))
    if turns == TURNS:
        assert [call.status for call in stored.tool_calls] == ["ok", "error", "duplicate"]
        player = RecordedTool(tmp_path / "searches.sqlite")
    else:
        player = recording
    again = replay(agent_of(fakes, word_tokenizer, player), stored, QUESTION, snapshot)
    for name in ("token_ids", "loss_mask", "logprobs", "spans", "injections", "steps", "finish_reason", "answer"):
        assert getattr(again, name) == getattr(stored, name), name


def test_changed_records_and_other_settings_are_found_out(fakes, word_tokenizer):
    agent = agent_of(fakes, word_tokenizer, fakes.ListTool())
    stored = agent.run([QUESTION], seeds=[4], snapshot=lessons())[0]
    changed = copy.deepcopy(stored)
    place = next(span.start for span in stored.spans if span.kind == "tool")
    changed.token_ids[place] += 1
    with pytest.raises(DataError, match=rf"q0/0/0: its replay differs from token {place} on .* kind 'tool'"):
        replay(agent, changed, QUESTION, lessons())
    shorter = agent_of(fakes, word_tokenizer, fakes.ListTool(), max_document_tokens=2)
    with pytest.raises(DataError, match="settings, tokenizer, snapshot or searches"):
        replay(shorter, stored, QUESTION, lessons())
    with pytest.raises(ValueError, match="snapshot: expected"):
        replay(agent, stored, QUESTION)
    with pytest.raises(ValueError, match="question: expected 'q0'"):
        replay(agent, stored, Question("q1", "w1", ("w2",)), lessons())
