"""The client against a server that speaks vLLM's completions over token ids, with a real tiny model behind it."""

import json
import threading

import pytest

torch = pytest.importorskip("torch")

from hiexp.agent.engine import EngineError, Sampling, generate  # noqa: E402
from hiexp.agent.engine_openai import OpenAIEngine  # noqa: E402
from hiexp.agent.engine_transformers import TransformersEngine  # noqa: E402
from hiexp.agent.http_rules import ServiceError  # noqa: E402
from hiexp.agent.openai_server import OpenAIChat, OpenAIServer  # noqa: E402

STOP = ("w6", "w12", "w18")
GREEDY = Sampling(temperature=0.0)


@pytest.fixture
def serve(http_server):
    """``serve(answer, …)``: ``answer(path, body)`` gives (status, object or bytes); a server and its client."""

    def start(answer, **keywords):
        server = http_server(lambda request: answer(request.path, request.json()))
        return server, OpenAIServer("tiny", f"{server.url}/v1", **keywords)

    return start


def completions(engine):
    """What `vllm serve` does with one request, by ``engine``; stop strings end a text as there."""
    lock = threading.Lock()

    def answer(path, body):
        assert path == "/v1/completions"
        assert body["return_token_ids"]
        assert body["include_stop_str_in_output"]
        with lock:
            session = engine.open([body["prompt"]], [body["seed"]])
            said = generate(
                session, [0], [body["max_tokens"]], tuple(body["stop"]), Sampling(body["temperature"], body["top_p"])
            )[0]
        reason = "length" if said.finish_reason in ("length", "context") else "stop"
        choice = {
            "token_ids": said.token_ids, "logprobs": {"token_logprobs": said.logprobs}, "finish_reason": reason,
            "text": "",
        }  # fmt: skip
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(said.token_ids)}
        return 200, {"choices": [choice], "usage": usage}

    return answer


@pytest.fixture
def local(tiny_models, fast_tokenizer):
    return TransformersEngine(tiny_models["llama"], fast_tokenizer, context_length=40)


def test_greedy_turns_equal_the_engine_in_process(serve, local, fast_tokenizer):
    server, client = serve(completions(local), concurrency=4)
    remote = OpenAIEngine(client, fast_tokenizer, 40)
    prompts = [[5 + i, 7, 9 + i] for i in range(8)]
    sessions = [engine.open(prompts, list(range(8))) for engine in (local, remote)]
    for _ in range(4):  # into the limit of the context
        room = [row for row in range(8) if len(sessions[0].tokens[row]) < 38]
        said = [generate(session, room, [12] * len(room), STOP, GREEDY) for session in sessions]
        for one, other in zip(*said, strict=True):
            assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        for session in sessions:
            session.extend(room, [[4, 5] if len(session.tokens[row]) < 38 else [] for row in room])
    assert sessions[0].tokens == sessions[1].tokens
    assert {reason for generation in said[0] for reason in [generation.finish_reason]} <= {"stop", "context", "length"}
    sampled = sum(len(request.json()["prompt"]) for request in server.requests)
    assert client.usage["prompt_tokens"] == sampled
    assert client.usage["requests"] == len(server.requests)


def test_groups_are_cut_where_their_brace_closes(serve, fast_tokenizer):
    class Tokenizer:
        eos_token_id = None
        words = ("\\boxed{", "a", "}", "b", "{")

        def __len__(self):
            return len(self.words)

        def convert_ids_to_tokens(self, ids):
            return [self.words[i] for i in ids]

        def decode(self, ids, **_):
            return "".join(self.words[i] for i in ids)

    said = [3, 0, 1, 4, 1, 2, 2, 3, 3]
    choice = {"token_ids": said, "logprobs": {"token_logprobs": [-1.0] * 9}, "finish_reason": "length"}
    server, client = serve(lambda path, body: (200, {"choices": [choice]}))
    session = OpenAIEngine(client, Tokenizer(), 100).open([[1]], [0])
    (generation,) = generate(session, [0], [9], ("\\boxed{}", "stop!"), Sampling())
    assert generation.token_ids == said[:7]
    assert generation.finish_reason == "stop"
    assert session.tokens == [[1, *said[:7]]]
    assert server.requests[0].json()["stop"] == ["stop!"]


def test_seeds_differ_by_row_and_turn(serve, local, fast_tokenizer):
    server, client = serve(completions(local))
    session = OpenAIEngine(client, fast_tokenizer, 40).open([[5, 6], [5, 6]], [1, 2])
    for _ in range(2):
        generate(session, [0, 1], [3, 3], (), Sampling())
    seeds = [request.json()["seed"] for request in server.requests]
    assert len(set(seeds)) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_full_rows_ask_nothing(serve, local, fast_tokenizer):
    server, client = serve(completions(local))
    session = OpenAIEngine(client, fast_tokenizer, 3).open([[5, 6, 7], [5]], [1, 2])
    full, other = generate(session, [0, 1], [4, 0], (), Sampling())
    assert (full.token_ids, full.finish_reason) == ([], "context")
    assert (other.token_ids, other.finish_reason) == ([], "length")
    assert not server.requests


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ({"choices": []}, ["choices"]),
        ({"error": "no such model"}, ["choices", "no such model"]),
        ({"choices": [{"text": "a", "logprobs": None}]}, ["token_ids", "vLLM 0.10.2"]),
        ({"choices": [{"token_ids": [1, 2], "logprobs": {"token_logprobs": [-1.0]}}]}, ["token_ids"]),
        ({"choices": [{"token_ids": [1], "logprobs": {"token_logprobs": [None]}}]}, ["finite"]),
        ({"choices": [{"token_ids": [1] * 9, "logprobs": {"token_logprobs": [0.0] * 9}}]}, ["at most 4"]),
    ],
)
def test_answers_of_another_schema_are_named(serve, fast_tokenizer, reply, words):
    _, client = serve(lambda path, body: (200, reply))
    session = OpenAIEngine(client, fast_tokenizer, 40).open([[5]], [0])
    with pytest.raises(ServiceError) as caught:
        generate(session, [0], [4], (), Sampling())
    for word in [client.url, *words]:
        assert word in str(caught.value)
    assert session.tokens == [[5]]  # a failed turn leaves the row as it was


def test_key_is_sent_and_never_shown(serve, monkeypatch):
    monkeypatch.setenv("HIEXP_TEST_KEY", "secret-123")
    server, client = serve(lambda path, body: (401, {"error": "denied"}), key_variable="HIEXP_TEST_KEY")
    with pytest.raises(ServiceError, match="status 401") as caught:
        OpenAIChat(client)(["hello"])
    assert server.requests[0].headers["authorization"] == "Bearer secret-123"
    assert len(server.requests) == 1
    assert "secret-123" not in str(caught.value)
    assert "secret-123" not in repr(vars(client))


def test_chat_replies_keep_their_order_and_survive_busy_servers(serve):
    busy = iter([True, True, False])

    def answer(path, body):
        if next(busy, False):
            return 429, {"error": "slow down"}
        text = body["messages"][0]["content"]
        return 200, {
            "choices": [{"message": {"content": text.upper()}}],
            "usage": {"prompt_tokens": 2, "completion_tokens": 1},
        }

    server, client = serve(answer, concurrency=8)
    prompts = [f"prompt {i}" for i in range(20)]
    assert OpenAIChat(client, max_tokens=7)(prompts) == [prompt.upper() for prompt in prompts]
    assert client.usage == {"requests": 20, "prompt_tokens": 40, "completion_tokens": 20}
    assert len(server.requests) == 22
    assert server.requests[0].json()["max_tokens"] == 7


def test_turns_come_as_they_are_answered(serve, fast_tokenizer):
    """The first request is held back until the turn of the second was handed out and its row said more."""
    gate = threading.Event()

    def answer(path, body):
        if body["prompt"] == [5]:
            assert gate.wait(60)
        choice = {"token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length"}
        return 200, {"choices": [choice]}

    _, client = serve(answer, concurrency=2)
    session = OpenAIEngine(client, fast_tokenizer, 40).open([[5], [6]], [0, 1])
    session.start([0, 1], [1, 1], (), Sampling())
    assert [row for row, _ in session.finished()] == [1]
    session.extend([1], [[8]])
    session.start([1], [1], (), Sampling())
    assert [row for row, _ in session.finished()] == [1]
    assert session.tokens == [[5], [6, 7, 8, 7]]
    assert session.finished(block=False) == []
    gate.set()
    assert [row for row, _ in session.finished()] == [0]
    assert session.finished() == []


def test_a_server_that_stays_away_is_an_engine_that_died(serve, fast_tokenizer):
    """Answered turns come first; the rollout then goes on in a new session."""
    down = {"now": True}

    def answer(path, body):
        if down["now"] and body["prompt"] == [5]:
            return 503, {"error": "loading"}
        choice = {"token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length"}
        return 200, {"choices": [choice]}

    _, client = serve(answer, concurrency=1, retries=1)
    engine = OpenAIEngine(client, fast_tokenizer, 40)
    session = engine.open([[6], [5]], [0, 1])
    session.start([0, 1], [1, 1], (), Sampling())
    assert [row for row, _ in session.finished()] == [0]
    with pytest.raises(EngineError, match="no answer in 2 attempts, last status 503"):
        session.finished()
    with pytest.raises(EngineError, match="503"):
        session.finished()
    down["now"] = False
    again = engine.open([session.tokens[1]], [1], [0])
    assert generate(again, [0], [1], (), Sampling())[0].token_ids == [7]


def test_released_rows_are_not_asked(serve, fast_tokenizer):
    gate = threading.Event()

    def answer(path, body):
        assert gate.wait(60)
        choice = {"token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length"}
        return 200, {"choices": [choice]}

    server, client = serve(answer, concurrency=1)
    session = OpenAIEngine(client, fast_tokenizer, 40).open([[5], [6], [8]], [0, 1, 2])
    session.start([0, 1, 2], [1] * 3, (), Sampling())
    session.release([0, 1])
    gate.set()
    assert [row for row, _ in session.finished()] == [2]
    assert [6] not in [request.json()["prompt"] for request in server.requests]


@pytest.mark.parametrize(
    ("faults", "kind"),
    [
        ([(429, b""), (500, b"oops"), (200, b'{"choices": [{"token'), None], None),
        ([(500, b"oops")] * 3, EngineError),
        ([(200, b'{"choices": [{"token')] * 3, EngineError),
        ([(400, b'{"error": "bad"}')], ServiceError),
        ([(200, b'{"choices": [{"text": "no ids"}]}')], ServiceError),
        ([(200, b"<html>")], ServiceError),
    ],
)
def test_faults_of_a_server_never_show_the_key(serve, fast_tokenizer, monkeypatch, caplog, capsys, faults, kind):
    monkeypatch.setenv("HIEXP_TEST_KEY", "secret-123")
    good = {"choices": [{"token_ids": [7], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length"}]}
    replies = iter(faults)
    server, client = serve(
        lambda path, body: next(replies, None) or (200, good), key_variable="HIEXP_TEST_KEY",
        retries=3 if kind is None else 2,
    )  # fmt: skip
    session = OpenAIEngine(client, fast_tokenizer, 40).open([[5]], [0])
    if kind is None:
        assert generate(session, [0], [1], (), Sampling())[0].token_ids == [7]
    else:
        with pytest.raises(kind) as caught:
            generate(session, [0], [1], (), Sampling())
        assert client.url in str(caught.value)
        error = caught.value
        while error is not None:
            assert "secret-123" not in repr(error)
            error = error.__cause__ or error.__context__
    assert all(request.headers["authorization"] == "Bearer secret-123" for request in server.requests)
    assert "secret-123" not in caplog.text + "".join(capsys.readouterr())
    assert "secret-123" not in repr(vars(client)) + repr(vars(session))


def test_one_failure_stops_the_rest(serve):
    _, client = serve(lambda path, body: (400, {"error": "bad"}), concurrency=1)
    with pytest.raises(ServiceError, match="status 400"):
        OpenAIChat(client)([f"{i}" for i in range(50)])


@pytest.mark.parametrize(
    ("keywords", "words"),
    [({"url": "ftp://host/v1"}, "url: expected http"), ({"concurrency": 0}, "concurrency: expected at least 1")],
)
def test_bad_settings_are_named(keywords, words):
    with pytest.raises(ValueError, match=words):
        OpenAIServer("m", **keywords)


def test_commands_take_a_server(serve, local, fast_tokenizer, tmp_path, monkeypatch):
    from hiexp.cli import main

    _, client = serve(completions(local))
    local.model.save_pretrained(tmp_path / "model")
    fast_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"id": f"q{i}", "question": f"w{i} w{i + 1}", "golden_answers": [f"w{i}"]} for i in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = [
        "--model", str(tmp_path / "model"), "--questions", str(tmp_path / "q.jsonl"), "--dialect", "hiexp_compact",
        "--set", "rollout.max_new_tokens=8", "--set", "rollout.max_total_tokens=40", "--set", "model.device=cpu",
        "--set", "model.context_length=40",
    ]  # fmt: skip
    for name, more in (("here", []), ("there", ["--set", f"rollout.server={client.url}"])):
        assert main(["eval", *flags, *more, "--json", str(tmp_path / f"{name}.json")]) == 0
    here, there = (json.loads((tmp_path / f"{name}.json").read_text())["sets"]["q"] for name in ("here", "there"))
    for arm in (here["without_hek"], there["without_hek"]):
        arm.pop("seconds")
    assert here == there
