"""Hosted models: text through the token protocol, messages, stop strings that were swallowed, a whole evaluation."""

import json
import re

import pytest

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.agent.engine import EngineError, Sampling, generate
from hiexp.agent.engine_chat import ChatEngine, ChatTokenizer, finish, said_ids, to_messages
from hiexp.agent.http_rules import ServiceError
from hiexp.agent.openai_server import OpenAIServer
from hiexp.agent.protocol import DIALECTS
from hiexp.agent.record import Rollout
from hiexp.agent.rollout import SearchAgent
from hiexp.agent.tools import Document
from hiexp.cli import main
from hiexp.io import read_jsonl
from hiexp.tasks.question import Question

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
STOP = ("</search>", "</answer>")
tokenizer = ChatTokenizer()


def inserted(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(st.lists(st.tuples(st.booleans(), TEXT)))
def test_text_comes_back_exactly_and_says_where_it_came_from(parts):
    ids = [token for said, text in parts for token in (said_ids(text) if said else inserted(text))]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "".join(text for _, text in parts)
    assert all(0 < token < 2**34 for token in ids)
    assert json.loads(json.dumps(ids)) == ids
    merged = []
    for said, text in parts:
        role = "assistant" if said else "user"
        if merged and text and merged[-1]["role"] == role:
            merged[-1]["content"] += text
        elif text:
            merged.append({"role": role, "content": text})
    assert to_messages(ids) == merged


def test_lone_surrogates_do_not_survive():
    assert tokenizer.decode(said_ids("a\ud800b")) == "a?b"


@pytest.mark.parametrize(
    ("text", "choice", "said", "reason"),
    [
        ("<search> Ada", {"finish_reason": "stop"}, "<search> Ada</search>", "stop"),
        ("x <search>a b", {}, "x <search>a b</search>", "stop"),
        ("so <answer> Graz", {"finish_reason": "stop"}, "so <answer> Graz</answer>", "stop"),
        ("<search>a</search>", {"finish_reason": "stop"}, "<search>a</search>", "stop"),
        ("<search>a</search> made up <answer>b</answer>", {"finish_reason": "length"}, "<search>a</search>", "stop"),
        ("I do not know.", {"finish_reason": "stop"}, "I do not know.", "eos"),
        ("<search> Ada", {"finish_reason": "length"}, "<search> Ada", "length"),
        ("<search> Ada", {"finish_reason": "content_filter"}, "<search> Ada", "eos"),
        ("with <search> I", {"finish_reason": "stop", "stop_reason": None}, "with <search> I", "eos"),
        ("with <search> I", {"finish_reason": "stop", "stop_reason": 151645}, "with <search> I", "eos"),
        ("<search> Ada", {"stop_reason": "stop_sequence"}, "<search> Ada</search>", "stop"),
        ("a", {"finish_reason": "stop", "stop_reason": "</answer>"}, "a</answer>", "stop"),
        ("<answer> a", {"finish_reason": "stop", "stop_reason": "</answer>"}, "<answer> a</answer>", "stop"),
        ("", {"finish_reason": "stop"}, "", "eos"),
    ],
)
def test_a_swallowed_stop_string_is_put_back_where_its_tag_is_open(text, choice, said, reason):
    assert finish(text, STOP, choice) == (said, reason)


def test_a_group_is_cut_where_its_brace_closes():
    stop = DIALECTS["hiexp"].stop
    assert finish(r"so \boxed{\frac{1}{2}} and on", stop, {}) == (r"so \boxed{\frac{1}{2}}", "stop")
    assert finish(r"so \boxed{1", stop, {"finish_reason": "stop"}) == (r"so \boxed{1", "eos")
    assert finish("<tool_call>Ada", stop, {"finish_reason": "stop"}) == ("<tool_call>Ada</tool_call>", "stop")


@pytest.mark.parametrize("name", ["hiexp", "search_r1", "r1_searcher"])
@given(thought=st.text("ab <>/"), query=st.text("cd 12", min_size=1).filter(str.strip))
@settings(max_examples=40)
def test_the_grammar_reads_the_query_of_an_api_that_swallows(name, thought, query):
    dialect = DIALECTS[name]
    said, reason = finish(f"{thought}{dialect.query_tags[0]}{query}", dialect.stop, {"finish_reason": "stop"})
    action = dialect.parse(said)
    assert (action.kind, action.text, reason) == ("search", " ".join(query.split()), "stop")


def reply(text, reason="stop", **more):
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return 200, {"choices": [{"message": {"content": text}, "finish_reason": reason}], "usage": usage, **more}


@pytest.fixture
def chat(http_server):
    """``chat(answer)``: ``answer(messages)`` gives (status, body); a server and an engine over it."""

    def start(answer, **keywords):
        server = http_server(lambda request: answer(request.json()["messages"]))
        return server, ChatEngine(OpenAIServer("big", f"{server.url}/v1", **keywords))

    return start


def test_a_request_has_what_every_api_takes(chat):
    server, engine = chat(lambda messages: reply("<search> Ada"))
    session = engine.open([inserted("Who?"), inserted("Where?")], [1, 2])
    first = generate(session, [0], [50], STOP, Sampling(0.0))
    assert tokenizer.decode(first[0].token_ids) == "<search> Ada</search>"
    assert all(value != value for value in first[0].logprobs)
    assert len(first[0].logprobs) == len(first[0].token_ids)
    session.extend([0], [inserted("\n<information>x</information>\n")])
    generate(session, [0], [50], ("x{}",), Sampling(0.5, 0.9))
    one, two = (request.json() for request in server.requests)
    assert server.requests[0].path == "/v1/chat/completions"
    assert one == {
        "model": "big", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 50, "temperature": 0.0,
        "stop": list(STOP),
    }  # fmt: skip
    assert [message["role"] for message in two["messages"]] == ["user", "assistant", "user"]
    assert two["messages"][1]["content"] == "<search> Ada</search>"
    assert two["messages"][2]["content"] == "\n<information>x</information>\n"
    assert two["top_p"] == 0.9
    assert "stop" not in two
    (nothing,) = generate(session, [1], [0], STOP, Sampling())
    assert (nothing.token_ids, nothing.finish_reason, len(server.requests)) == ([], "length", 2)


@pytest.mark.parametrize(
    ("declined", "reason", "refused"),
    [
        ((400, {"error": {"message": "flagged by our content policy"}}), "eos", 1),
        ((400, {"error": {"message": "This model's maximum context length is 8192 tokens."}}), "context", 0),
        ((413, {"error": {"message": "prompt is too long"}}), "context", 0),
        (reply("I", "content_filter"), "eos", 1),
        (reply(None), "eos", 0),
        ((200, {"choices": [{"message": {"content": None, "refusal": "No."}}]}), "eos", 1),
        (reply("<search> Ada", "length"), "length", 0),
    ],
)
def test_a_declined_turn_ends_one_rollout_only(chat, declined, reason, refused):
    _, engine = chat(lambda messages: declined if "bad" in messages[0]["content"] else reply("<answer> 1"))
    session = engine.open([inserted("good"), inserted("bad")], [1, 2])
    good, bad = generate(session, [0, 1], [9, 9], STOP, Sampling())
    assert (tokenizer.decode(good.token_ids), good.finish_reason) == ("<answer> 1</answer>", "stop")
    assert bad.finish_reason == reason
    assert engine.usage["refused"] == refused


def test_settings_that_an_api_refuses_end_the_evaluation_at_once(chat):
    server, engine = chat(lambda messages: (400, {"error": {"message": "Unsupported parameter: 'max_tokens'"}}))
    with pytest.raises(ServiceError, match="Unsupported parameter"):
        generate(engine.open([inserted("Who?")], [1]), [0], [9], STOP, Sampling())
    assert len(server.requests) == 2  # the second one with harmless messages


def test_requests_without_a_count_are_told(chat):
    _, engine = chat(lambda messages: (200, {"choices": [{"message": {"content": "a"}}]}))
    generate(engine.open([inserted("Who?")], [1]), [0], [9], STOP, Sampling())
    assert engine.usage == {
        "requests": 1, "prompt_tokens": 0, "completion_tokens": 0, "requests_without_usage": 1, "refused": 0,
    }  # fmt: skip


class Towns:
    name = "towns"

    def search(self, queries, top_k):
        return [[Document("d", query, f"{query} was born in Salzburg")] for query in queries]


def test_a_rollout_goes_on_with_its_messages_after_the_server_was_away(chat):
    away = iter([False, True, False])

    def answer(messages):
        if next(away):
            return 503, {"error": "busy"}
        return reply("<search> Ada" if len(messages) == 1 else "<answer> Salzburg")

    server, engine = chat(answer, retries=0)
    agent = SearchAgent(engine, Towns(), dialect="search_r1", max_total_tokens=1000)
    (rollout,) = agent.run([Question("q", "Where was Ada born?", ("Salzburg",))], seeds=[1])
    assert (rollout.answer, rollout.finish_reason, rollout.engine_restarts) == ("Salzburg", "answer", 1)
    assert server.requests[1].json() == server.requests[2].json()
    assert [message["role"] for message in server.requests[2].json()["messages"]] == ["user", "assistant", "user"]
    row = json.loads(json.dumps(rollout.to_json(), allow_nan=False))
    again = Rollout.from_json(row)
    assert repr(again) == repr(rollout)
    _, engine = chat(lambda messages: (503, {}), retries=0)
    with pytest.raises(EngineError, match="3 times"):
        SearchAgent(engine, Towns(), dialect="search_r1").run([Question("q", "Where?", ("S",))], seeds=[1])


PEOPLE = {"Ada": "Salzburg", "Bela": "Graz", "Cato": "Linz"}


@pytest.fixture
def hosted(http_server, tmp_path, monkeypatch):
    """A model that searches for the name and reads the town; flags of questions, a corpus and its server."""
    monkeypatch.setenv("HIEXP_CACHE", str(tmp_path / "cache"))

    def answer(request):
        body = request.json()
        messages = body["messages"]
        if "Cato" in messages[0]["content"]:
            return 400, {"error": {"message": "flagged by our content policy"}}
        if messages[0]["content"] == "Say yes.":
            return reply("yes")
        assert {message["role"] for message in messages[::2]} == {"user"}
        assert {message["role"] for message in messages[1::2]} <= {"assistant"}
        assert "</search>" in body["stop"]
        if len(messages) == 1:
            name = re.findall(r"was (\w+) born", messages[0]["content"])[-1]
            return reply(f"<think>A town.</think> <search> {name} born ")
        town = re.search(r"born in (\w+)", messages[2]["content"])[1]
        return reply(f"<answer> {town} ")

    server = http_server(answer)
    questions = [
        {"id": name, "question": f"Where was {name} born?", "golden_answers": [town]} for name, town in PEOPLE.items()
    ]
    passages = [
        {"id": name, "title": name, "text": f"The painter {name} was born in {town}."} for name, town in PEOPLE.items()
    ]
    for name, rows in (("q.jsonl", questions), ("c.jsonl", passages)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    flags = [
        "--model", "big-model", "--questions", str(tmp_path / "q.jsonl"), "--corpus", str(tmp_path / "c.jsonl"),
        "--dialect", "search_r1", "--set", f"rollout.server={server.url}/v1", "--set", "rollout.server_api=chat",
    ]  # fmt: skip
    return server, flags


def test_a_hosted_model_is_evaluated(hosted, tmp_path, capsys):
    server, flags = hosted
    for name in ("one", "two"):  # the second time nothing is asked again
        assert main(["eval", *flags, "--out", str(tmp_path / "kept"), "--json", str(tmp_path / f"{name}.json")]) == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert one == two
    arm = one["sets"]["q"]["without_hek"]
    assert arm["em"] == pytest.approx(2 / 3)
    assert arm["searches_per_answer"] == pytest.approx(2 / 3)
    asked = [request.json()["messages"][0]["content"] for request in server.requests]
    answered = sum("Cato" not in text for text in asked)
    assert len(asked) - answered == 1
    assert (arm["requests"], arm["refused"], arm["requests_without_usage"]) == (answered, 1, 0)
    assert (arm["prompt_tokens"], arm["completion_tokens"]) == (7 * answered, 3 * answered)
    assert arm["sampled_tokens"] == pytest.approx(3 * answered / 3)
    assert arm["tokens"] is None
    assert (one["server_api"], one["logprobs"], one["model"]) == ("chat", False, "big-model")
    assert "no log-probs" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "kept"), "--out", str(tmp_path / "report.html")]) == 0
    kept, hek = tmp_path / "kept" / "q" / "without_hek.jsonl", tmp_path / "hek.sqlite"
    assert main(["distill", str(kept), "--questions", str(tmp_path / "q.jsonl"), "--out", str(hek)]) == 0
    rows = [row for _, row in read_jsonl(kept)]
    sampled = [value for row in rows for value, mask in zip(row["logprobs"], row["loss_mask"], strict=True) if mask]
    assert sampled
    assert set(sampled) == {None}


def test_rollouts_with_log_probs_are_refused_before_anything_runs(hosted, tmp_path, capsys):
    server, flags = hosted
    assert main(["rollout", *flags, "--out", str(tmp_path / "out")]) == 2
    assert "rollout.server_api: expected completions for hiexp rollout: a chat API gives" in capsys.readouterr().err
    assert not server.requests
    assert not (tmp_path / "out").exists()
