"""The arms of an evaluation: what the model is told in each, and that only what an arm stands for changes."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from hiexp.agent.arms import ARMS, choose_arms, direct_dialect, prompting_dialect
from hiexp.agent.eval_run import Evaluator, load_sets, macro_average
from hiexp.agent.eval_table import table_lines
from hiexp.agent.protocol import DIALECTS, Action, get_dialect
from hiexp.rl.config import TrainConfig

INSTRUCTED = [name for name, dialect in DIALECTS.items() if dialect.instructions]


@pytest.mark.parametrize("name", INSTRUCTED)
def test_prompting_explains_the_grammar_and_shows_a_whole_example(name):
    dialect = get_dialect(name)
    prompting = prompting_dialect(dialect, max_turns=5)
    prompt = prompting.build_prompt("Who was it?", "look twice")
    for tag in dialect.tags:
        assert tag in prompting.instructions
    assert "at most 4 times" in prompt
    assert prompt.endswith("look twice\n\nQuestion: Who was it?\n")
    assert prompting.chat
    # The example in the prompt is one that the parser itself understands, turn by turn.
    example = prompting.instructions.partition("An example:")[2]
    query, _, rest = example.partition(dialect.reply_tags[0])
    assert dialect.parse(query).kind == "search"
    answer = dialect.parse(rest.partition(dialect.reply_tags[1])[2])
    assert (answer.kind, answer.text) == ("answer", "Steven Spielberg")


@pytest.mark.parametrize("name", INSTRUCTED)
def test_direct_names_no_search(name):
    dialect = get_dialect(name)
    direct = direct_dialect(dialect)
    prompt = direct.build_prompt("Who was it?")
    assert not any(tag in prompt for tag in (*dialect.query_tags, *dialect.reply_tags))
    assert dialect.answer_tags[0] in prompt
    said = f"so {dialect.answer_tags[0]}Ada{dialect.answer_tags[1]}"
    assert direct.parse(said) == Action("answer", "Ada", "so")


@pytest.mark.parametrize("make", [direct_dialect, lambda dialect: prompting_dialect(dialect, 4)])
def test_a_dialect_without_instructions_is_refused(make):
    with pytest.raises(ValueError, match=r"expected one with instructions .*hiexp_compact"):
        make(get_dialect("hiexp_compact"))


def test_choice_of_arms():
    assert choose_arms(None, False, "hiexp_compact") == ["without_hek"]
    assert choose_arms(None, True, "hiexp_compact") == ["without_hek", "with_hek"]
    assert choose_arms(["direct", "without_hek"], False, "hiexp") == ["without_hek", "direct"]
    for name, kind in ARMS.items():
        assert kind.against in ARMS
        assert not ARMS[kind.against].hek, name


@pytest.fixture
def evaluator(fakes, word_tokenizer, tmp_path):
    """Every row searches, then answers w1; the tool remembers what it was asked."""
    rows = [{"id": f"q{i}", "question": f"w{i} w{i + 1}", "golden_answers": [f"w{i}"]} for i in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    call = word_tokenizer("<tool_call> w9 </tool_call>")["input_ids"]
    answer = word_tokenizer("<think> w3 </think> \\boxed{ w1 }")["input_ids"]
    config = TrainConfig.from_dict(
        {"task": {"train": "x", "evaluation": str(tmp_path / "q.jsonl")},
         "rollout": {"dialect": "hiexp", "max_total_tokens": 1200, "max_turns": 3}, "evaluation": {"questions": 3}}
    )  # fmt: skip

    def make(arms, turns=(call, answer), **changes):
        engine = fakes.ScriptedEngine(word_tokenizer, [list(turns)], context_length=1500)
        evaluator = Evaluator(engine, fakes.ListTool(), config, None, arms, 1, None, None)
        for name, value in changes.items():
            setattr(evaluator, name, value)
        return evaluator, load_sets(config, [config.task.evaluation], False)[0]

    return make


def test_arms_differ_in_prompt_and_search_alone(evaluator):
    maker, one = evaluator(["without_hek", "prompting", "direct"])
    told, values = maker.evaluate(one)
    searches = {arm: told[arm]["searches_per_answer"] for arm in maker.arms}
    assert searches == {"without_hek": 1.0, "prompting": 1.0, "direct": 0.0}
    # Without its search turn the direct arm has no answer in this script.
    assert [told[arm]["em"] for arm in maker.arms] == pytest.approx([1 / 3, 1 / 3, 0.0])
    assert told["prompting"]["tokens"] > told["without_hek"]["tokens"]
    assert told["differences"].keys() == {"prompting", "direct"}
    assert told["differences"]["direct"]["em"][0] == pytest.approx(-1 / 3)
    assert values["direct"]["em"].shape == (3,)


def test_failed_searches_are_counted(evaluator):
    class Broken:
        name = "broken"

        def search(self, queries, top_k):
            raise OSError("down")

    maker, one = evaluator(["without_hek"], tool=Broken())
    assert maker.evaluate(one)[0]["without_hek"]["failed_searches"] == 3


def test_events_are_counted_and_shown_where_they_happened(evaluator):
    class Restless:
        name = "restless"
        client = SimpleNamespace(retried=9)
        empty_passages = 4

        def search(self, queries, top_k):
            self.client.retried += len(queries)
            self.empty_passages += 2 * len(queries)
            return [[] for _ in queries]

    maker, one = evaluator(["without_hek"], tool=Restless())
    arm = maker.evaluate(one)[0]["without_hek"]
    assert (arm["tool_retries"], arm["empty_passages"]) == (3, 6)
    assert (arm["duplicate_searches"], arm["engine_restarts"], arm["scorer_failures"]) == (0, 0, 0)
    table = "\n".join(table_lines({"x": arm}))
    assert "tool_retries" in table
    assert "scorer_failures" not in table


def test_judged_answers_bring_one_more_score(evaluator):
    maker, one = evaluator(["without_hek"])

    def judge(items):
        assert [item.golds for item in items] == [("w0",), ("w1",), ("w2",)]
        return [True, None, False]

    maker.judge = judge
    arm = maker.evaluate(one)[0]["without_hek"]
    assert arm["judge"] == pytest.approx(1 / 3)
    assert "judge" in arm["intervals"]


def test_macro_average_weighs_sets_equally(evaluator):
    maker, one = evaluator(["without_hek", "prompting"])
    _, values = maker.evaluate(one)
    other = {arm: {name: scores[:1] + 0.5 for name, scores in part.items()} for arm, part in values.items()}
    macro = macro_average({"a": values, "b": other}, {"a": "f1", "b": "em"})
    a, b = values["prompting"]["em"].mean(), other["prompting"]["em"].mean()
    assert macro["prompting"]["em"] == pytest.approx((a + b) / 2)
    low, high = macro["prompting"]["intervals"]["em"]
    assert low <= macro["prompting"]["em"] <= high
    main = (values["prompting"]["f1"].mean() + other["prompting"]["em"].mean()) / 2
    assert macro["prompting"]["main"] == pytest.approx(main)
    assert macro["differences"]["prompting"]["em"] == pytest.approx((0.0, 0.0, 0.0))
    assert "main" not in macro_average({"a": values, "b": other}, {"a": "em", "b": "em"})["prompting"]


def test_names_of_sets_stay_apart(evaluator, tmp_path):
    _, one = evaluator(["without_hek"])
    config = dataclasses.replace(TrainConfig(), task=one.config)
    source = str(tmp_path / "q.jsonl")
    assert [each.name for each in load_sets(config, [source, source, source], False)] == ["q", "q_2", "q_3"]


def test_joined_sources_are_sets_of_their_own(evaluator, tmp_path):
    _, one = evaluator(["without_hek"])
    config = dataclasses.replace(TrainConfig(), task=one.config)
    source = str(tmp_path / "q.jsonl")
    sets = load_sets(config, [f"{source}[:2] + {source}"], False)
    assert [(each.name, len(each.questions)) for each in sets] == [("q", 2), ("q_2", 3)]
    assert sets[0].questions[0].id == "q0"
