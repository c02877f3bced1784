"""The driver: own pace, bounded flight, budgets, cancellation, tools in the background, engines that die."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hiexp.agent.engine import EngineError
from hiexp.agent.record import Rollout
from hiexp.agent.rollout import SearchAgent
from hiexp.tasks.question import Question

QUESTIONS = [Question(f"q{i}", f"w{i} w{i + 1} w{i + 2}", (f"w{i + 3}",)) for i in range(6)]
SEARCH, ANSWER = "<think> w1 </think> <tool_call> w0 w9 </tool_call>", "<think> w2 </think> \\boxed{ w3 }"
OTHER = "<tool_call> w8 </tool_call>"


def agent_saying(fakes, tokenizer, *rows, tool=None, order=lambda count: 1, dies=(), room=999, **settings):
    """Rows of turns; the last row is said by all further ones."""
    script = [[tokenizer(turn)["input_ids"] for turn in turns] for turns in rows]
    engine = fakes.ScriptedEngine(tokenizer, script, order=order, dies=dies, room=room)
    return SearchAgent(engine, tool or fakes.ListTool(), **{"dialect": "hiexp_compact", **settings})


def plain(rollouts):
    """What must not depend on the schedule."""
    rows = [rollout.to_json() for rollout in rollouts]
    for row in rows:
        row.pop("engine_restarts")
        for call in row["tool_calls"]:
            call.pop("seconds")
    return rows


def test_rollouts_are_streamed_as_they_finish_and_collected_in_order(fakes, word_tokenizer):
    rows = [[SEARCH, OTHER, ANSWER], [ANSWER], [SEARCH, ANSWER]]
    agent = agent_saying(fakes, word_tokenizer, *rows)
    streamed = [rollout.question_id for rollout in agent.stream(QUESTIONS[:3], seeds=range(3))]
    assert streamed == ["q1", "q2", "q0"]
    assert [rollout.question_id for rollout in agent.run(QUESTIONS[:3], seeds=range(3))] == ["q0", "q1", "q2"]
    assert agent.engine.released == {0, 1, 2}


@pytest.mark.parametrize("batch_rows", [1, 2, 5])
def test_no_more_in_flight_than_allowed_and_no_influence(fakes, word_tokenizer, batch_rows):
    rows = [[SEARCH, ANSWER], [ANSWER], [SEARCH, OTHER, ANSWER]]
    whole = agent_saying(fakes, word_tokenizer, *rows).run(QUESTIONS, seeds=range(6))
    agent = agent_saying(fakes, word_tokenizer, *rows, batch_rows=batch_rows)
    assert plain(agent.run(QUESTIONS, seeds=range(6))) == plain(whole)
    assert agent.engine.most == batch_rows


def test_stream_checks_its_arguments_before_anything_runs(fakes, word_tokenizer):
    agent = agent_saying(fakes, word_tokenizer, [ANSWER])
    with pytest.raises(ValueError, match="seeds: expected 6 values"):
        agent.stream(QUESTIONS, seeds=[1])
    assert list(agent.stream([], seeds=[])) == []
    assert agent.engine.opened == []


@pytest.mark.parametrize(
    ("settings", "reason", "statuses", "sampled"),
    [
        ({"max_searches": 1}, "max_searches", ["ok"], 14),
        ({"max_searches": 0}, "max_searches", [], 7),
        ({"max_sampled_tokens": 9}, "max_tokens", ["ok"], 9),
        ({"max_sampled_tokens": 7}, "max_tokens", [], 7),
        ({"max_tool_seconds": 1e-9}, "max_tool_seconds", ["ok"], 14),
        ({"max_turns": 3}, "max_turns", ["ok", "duplicate"], 21),
    ],
)
def test_budgets(fakes, word_tokenizer, settings, reason, statuses, sampled):
    rollout = agent_saying(fakes, word_tokenizer, [SEARCH], **settings).run(QUESTIONS[:1], seeds=[0])[0]
    assert (rollout.finish_reason, [call.status for call in rollout.tool_calls]) == (reason, statuses)
    assert sum(rollout.loss_mask) == sampled


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_searches": -1}, "max_searches: expected at least 0, got -1"),
        ({"max_sampled_tokens": 0}, "max_sampled_tokens: expected at least 1"),
        ({"batch_rows": 0}, "batch_rows: expected at least 1"),
        ({"max_tool_seconds": 0.0}, "max_tool_seconds: expected a positive number"),
        ({"engine_retries": -1}, "engine_retries: expected at least 0"),
    ],
)
def test_bad_budgets_are_named(fakes, word_tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        agent_saying(fakes, word_tokenizer, [ANSWER], **settings)


def test_repeated_queries_are_answered_from_the_first_result(fakes, word_tokenizer):
    tool = fakes.ListTool()
    turns = [SEARCH, OTHER, "<tool_call> w0 w9 </tool_call>", ANSWER]
    rollout = agent_saying(fakes, word_tokenizer, turns, tool=tool, max_turns=5).run(QUESTIONS[:1], seeds=[0])[0]
    assert tool.queries == ["w0 w9", "w8"]
    assert [call.status for call in rollout.tool_calls] == ["ok", "ok", "duplicate"]
    assert rollout.tool_calls[2].document_ids == rollout.tool_calls[0].document_ids
    assert word_tokenizer.decode(rollout.token_ids).count("<tool_response> w1 w2 w3 | w4 w5 </tool_response>") == 3
    # Another rollout of the same question asks for itself.
    agent_saying(fakes, word_tokenizer, turns, tool=tool).run(QUESTIONS[:1] * 2, seeds=[0, 1])
    assert tool.queries.count("w0 w9") == 3


def test_failed_searches_are_tried_again(fakes, word_tokenizer):
    tool = fakes.ListTool()
    answers = iter([OSError("down"), None])
    found = tool.search

    def search(queries, top_k):
        error = next(answers)
        if error is not None:
            raise error
        return found(queries, top_k)

    tool.search = search
    rollout = agent_saying(fakes, word_tokenizer, [SEARCH, SEARCH, ANSWER], tool=tool).run(QUESTIONS[:1], seeds=[0])[0]
    assert [call.status for call in rollout.tool_calls] == ["error", "ok"]


@pytest.mark.parametrize("as_event", [True, False])
def test_cancelled_rollouts_end_as_they_are(fakes, word_tokenizer, as_event):
    cancelled, tool = threading.Event(), fakes.ListTool()
    found = tool.search

    def search(queries, top_k):
        cancelled.set()
        return found(queries, top_k)

    tool.search = search
    agent = agent_saying(fakes, word_tokenizer, [ANSWER], [SEARCH, ANSWER], [ANSWER], tool=tool, batch_rows=2)
    cancel = cancelled if as_event else cancelled.is_set
    rollouts = agent.run(QUESTIONS, seeds=range(6), cancel=cancel)
    assert [rollout.finish_reason for rollout in rollouts] == ["answer"] + ["cancelled"] * 5
    assert [len(rollout.tool_calls) for rollout in rollouts] == [0, 1, 0, 0, 0, 0]
    assert rollouts[1].spans[-1].kind == "template"
    assert all(rollout.answer is None for rollout in rollouts[1:])
    assert agent.engine.released == set(range(6))


class RemoteTool:
    """A tool on another machine: every search waits until it is let through."""

    name, remote = "remote", True

    def __init__(self, documents):
        self.documents, self.gate = documents, threading.Semaphore(0)
        self.begun, self.lock, self.at_once, self.most = [], threading.Lock(), 0, 0
        self.waiting = threading.Condition(self.lock)

    def search(self, queries, top_k):
        with self.waiting:
            self.begun += queries
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            self.waiting.notify_all()
        assert self.gate.acquire(timeout=60)
        with self.lock:
            self.at_once -= 1
        return [self.documents[:top_k] for _ in queries]


def test_other_rollouts_go_on_while_a_remote_tool_works(fakes, word_tokenizer):
    local = fakes.ListTool()
    tool = RemoteTool(local.documents)
    rows = [[SEARCH, ANSWER], [ANSWER], [ANSWER], [OTHER, ANSWER]]
    agent = agent_saying(fakes, word_tokenizer, *rows, tool=tool)
    stream = agent.stream(QUESTIONS[:4], seeds=range(4))
    assert [next(stream).question_id, next(stream).question_id] == ["q1", "q2"]
    for _ in range(2):
        tool.gate.release()
    rest = sorted(stream, key=lambda rollout: rollout.question_id)
    there = agent_saying(fakes, word_tokenizer, *rows, tool=local).run(QUESTIONS[:4], seeds=range(4))
    assert plain(rest) == plain([there[0], there[3]])


def test_remote_searches_are_bounded(fakes, word_tokenizer):
    tool = RemoteTool(fakes.ListTool().documents)
    for _ in QUESTIONS:
        tool.gate.release()
    agent = agent_saying(fakes, word_tokenizer, [SEARCH, ANSWER], tool=tool, remote_calls=2)
    rollouts = agent.run(QUESTIONS, seeds=range(6))
    assert [rollout.finish_reason for rollout in rollouts] == ["answer"] * 6
    assert tool.most <= 2


def test_an_interrupt_leaves_no_threads_and_begins_no_search(fakes, word_tokenizer):
    tool = RemoteTool(fakes.ListTool().documents)

    class Interrupted(fakes.ScriptedEngine):
        def finished(self, block=True):
            if self.asked == 3:
                with tool.waiting:
                    assert tool.waiting.wait_for(lambda: tool.begun, timeout=60)
                raise KeyboardInterrupt
            return super().finished(block)

    script = [[word_tokenizer(SEARCH)["input_ids"]]]
    engine = Interrupted(word_tokenizer, script, order=lambda count: 1)
    agent = SearchAgent(engine, tool, dialect="hiexp_compact", remote_calls=1)
    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        agent.run(QUESTIONS, seeds=range(6))
    tool.gate.release()
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(tool.begun) == 1
    assert engine.released == set(range(6))


def test_rollouts_in_flight_survive_an_engine_that_dies(fakes, word_tokenizer):
    """A second session is opened from the tokens so far; a scripted row then begins its turns anew."""
    agent = agent_saying(fakes, word_tokenizer, [SEARCH], [ANSWER], [SEARCH], dies=[2], max_turns=2)
    rollouts = agent.run(QUESTIONS[:3], seeds=[7, 8, 9])
    first, second = agent.engine.opened
    assert [rollout.engine_restarts for rollout in rollouts] == [1, 0, 1]
    assert first[2] == [0, 0, 0]
    assert second[1] == [7, 9]
    assert second[2] == [7, 0]  # what row 0 had sampled; row 2 was still in its first turn
    assert second[0][0] == rollouts[0].token_ids[: len(second[0][0])]
    assert len(second[0][0]) > len(first[0][0])
    # In the new session the third rollout is row 1, whose script is an answer.
    assert [rollout.finish_reason for rollout in rollouts] == ["max_turns", "answer", "answer"]
    assert [len(rollout.tool_calls) for rollout in rollouts] == [1, 0, 0]
    assert Rollout.from_json(rollouts[0].to_json()) == rollouts[0]


def test_an_engine_that_keeps_dying_is_given_up_after_finished_rollouts_were_handed_out(fakes, word_tokenizer):
    agent = agent_saying(fakes, word_tokenizer, [ANSWER], [SEARCH, ANSWER], dies=range(1, 9), engine_retries=2)
    stream = agent.stream(QUESTIONS[:2], seeds=[0, 1])
    assert next(stream).finish_reason == "answer"
    with pytest.raises(EngineError, match=r"rollout q1/0/0: the engine died \(3 times\)"):
        next(stream)
    assert len(agent.engine.opened) == 3


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.sampled_from([SEARCH, OTHER, ANSWER, "w1", ""]), max_size=4), min_size=1, max_size=4),
    orders=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    batch_rows=st.integers(1, 6),
    remote=st.booleans(),
)
def test_no_schedule_changes_a_rollout(fakes, word_tokenizer, rows, orders, batch_rows, remote):
    whole = agent_saying(fakes, word_tokenizer, *rows, order=lambda count: count).run(QUESTIONS, seeds=range(6))
    asked = iter(orders * 100)
    agent = agent_saying(
        fakes, word_tokenizer, *rows, order=lambda count: next(asked), batch_rows=batch_rows, remote_calls=2
    )
    agent.tool.remote = remote
    assert plain(agent.run(QUESTIONS, seeds=range(6))) == plain(whole)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dies=st.sets(st.integers(0, 12), max_size=4), order=st.integers(1, 4), batch_rows=st.integers(1, 6))
def test_deaths_change_nothing_but_their_count(fakes, word_tokenizer, dies, order, batch_rows):
    """Turns of one kind, so that a scripted row that begins anew says what it would have said."""
    make = {"max_turns": 3, "batch_rows": batch_rows, "engine_retries": 9, "order": lambda count: order}
    whole = agent_saying(fakes, word_tokenizer, [SEARCH], **make).run(QUESTIONS, seeds=range(6))
    agent = agent_saying(fakes, word_tokenizer, [SEARCH], dies=dies, **make)
    rollouts = agent.run(QUESTIONS, seeds=range(6))
    assert plain(rollouts) == plain(whole)
    died = len([call for call in dies if call < agent.engine.asked])
    assert len(agent.engine.opened) == 1 + died
    assert max(rollout.engine_restarts for rollout in rollouts) <= died
    assert replace(agent, engine_retries=0).engine_retries == 0


@pytest.mark.filterwarnings("ignore:out of memory")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(room=st.integers(1, 5), order=st.integers(1, 4), batch_rows=st.integers(1, 6))
def test_fewer_conversations_are_in_flight_after_memory_ran_out(fakes, word_tokenizer, room, order, batch_rows):
    make = {"max_turns": 3, "batch_rows": batch_rows, "order": lambda count: order}
    whole = agent_saying(fakes, word_tokenizer, [SEARCH], **make).run(QUESTIONS, seeds=range(6))
    agent = agent_saying(fakes, word_tokenizer, [SEARCH], room=room, engine_retries=0, **make)
    assert plain(agent.run(QUESTIONS, seeds=range(6))) == plain(whole)


def test_memory_that_ran_out_is_told_and_one_conversation_must_fit(fakes, word_tokenizer):
    agent = agent_saying(fakes, word_tokenizer, [ANSWER], room=2)
    with pytest.warns(RuntimeWarning, match="out of memory with 6 rows; going on with 3 instead of 6") as told:
        agent.run(QUESTIONS, seeds=range(6))
    assert len(told) == 2  # 6, 3, 1
    agent = agent_saying(fakes, word_tokenizer, [ANSWER], room=0, engine_retries=2)
    with pytest.raises(EngineError, match=r"rollout q0/0/0: out of memory with 1 rows \(3 times\)"):
        agent.run(QUESTIONS[:1], seeds=[0])


@pytest.mark.filterwarnings("ignore:out of memory")
def test_going_on_with_fewer_uses_up_no_retry(fakes, word_tokenizer):
    """Memory runs out with 6 and with 3 rows; the first real death after that is still retried."""
    agent = agent_saying(fakes, word_tokenizer, [ANSWER], room=2, dies={2}, engine_retries=1)
    assert len(agent.run(QUESTIONS, seeds=range(6))) == 6
    assert agent.engine.asked > 3
