"""``hiexp doctor CONFIG``: each thing that can be wrong is found, named and comes with a way to mend it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate", reason="the train extra is not installed")
yaml = pytest.importorskip("yaml")

from hiexp import cli  # noqa: E402
from hiexp.agent.protocol import COMPACT_TAGS, COMPACT_WORDS  # noqa: E402
from hiexp.experience.record import Experience  # noqa: E402
from hiexp.experience.store import HEK  # noqa: E402
from hiexp.preflight import services  # noqa: E402
from hiexp.preflight.check import gib  # noqa: E402
from hiexp.preflight.command import check_config  # noqa: E402
from hiexp.preflight.memory import adapter_parameters, checkpoint_bytes, model_shape  # noqa: E402
from hiexp.preflight.settings import setting_checks  # noqa: E402
from hiexp.rl.config import TrainConfig  # noqa: E402
from hiexp.tasks.question import Question  # noqa: E402

WORDS = [f"w{i}" for i in range(30)]


def rows(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from hiexp.rl.tiny_policy import make_tokenizer

    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer([*COMPACT_TAGS, *COMPACT_WORDS, *WORDS])
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **size)
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def sound(model, tmp_path):
    """A config, as nested dicts, that no check finds fault with."""
    rows(
        tmp_path / "train.jsonl",
        [{"id": f"t{i}", "question": f"w{i} w3", "golden_answers": [f"w{i}"]} for i in range(20)],
    )
    rows(
        tmp_path / "test.jsonl",
        [{"id": f"e{i}", "question": f"w{i} w4", "golden_answers": [f"w{i}"]} for i in range(9)],
    )
    rows(tmp_path / "corpus.jsonl", [{"id": f"d{i}", "title": f"w{i}", "text": f"w{i} w{i + 1}"} for i in range(9)])
    return {
        "model": {"path": str(model), "device": "cpu"},
        "task": {"train": str(tmp_path / "train.jsonl"), "evaluation": str(tmp_path / "test.jsonl")},
        "tool": {"kind": "bm25", "corpus": str(tmp_path / "corpus.jsonl")},
        "rollout": {"dialect": "hiexp_compact", "max_new_tokens": 8, "max_total_tokens": 120, "max_document_tokens": 10,
                    "group_size": 4},
        "run": {"dir": str(tmp_path / "run"), "questions_per_step": 5, "steps": 8},
    }  # fmt: skip


def found(config, **stages):
    """Checks by (name, status) after ``stages`` changed the config."""
    merged = {stage: {**config.get(stage, {}), **stages.get(stage, {})} for stage in {*config, *stages}}
    return check_config(TrainConfig.from_dict(merged))


def pick(checks, name, status):
    matching = [check for check in checks if (check.name, check.status) == (name, status)]
    assert matching, [(check.name, check.status, check.text) for check in checks]
    return matching[0]


def test_a_sound_config_has_no_complaint(sound, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    checks = found(sound)
    assert {check.status for check in checks} == {"ok"}
    names = [check.name for check in checks]
    for name in ("memory", "prompts", "turns", "search", "leak: questions", "run.dir", "disk", "epochs"):
        assert name in names
    assert "2 epochs" in pick(checks, "epochs", "ok").text
    assert sorted(path.name for path in tmp_path.iterdir()) == before


CASES = {
    "no such questions": ({"task": {"train": "absent.jsonl"}}, "task.train", "error", "absent.jsonl: no such file"),
    "no evaluation": ({"task": {"evaluation": ""}}, "task.evaluation", "warn", "no evaluation"),
    "more questions a step than there are": ({"run": {"questions_per_step": 21}}, "epochs", "error", "there are 20"),
    "no model": ({"model": {"path": "./absent"}}, "model", "error", "no such model folder"),
    "context beyond the model": ({"model": {"context_length": 200}}, "context", "error", "beyond the model's own 128"),
    "rollouts beyond the context": ({"rollout": {"max_total_tokens": 300}}, "context", "warn", "beyond the context"),
    "no room for a search": ({"rollout": {"max_document_tokens": 110}}, "turns", "error", "one search and an answer"),
    "no room for all turns": ({"rollout": {"max_turns": 9}}, "turns", "warn", "9 turns at their limits"),
    "no room for a turn": ({"rollout": {"max_new_tokens": 119}}, "prompts", "warn", "does not fit into 120"),
    "no room for the prompt": ({"rollout": {"max_total_tokens": 2}}, "prompts", "error", "no room in 2"),
    "micro-batch": ({"algorithm": {"tokens_per_microbatch": 50}}, "micro-batch", "warn", "longest rollout 120"),
    "no corpus": ({"tool": {"corpus": ""}}, "search", "error", "without tool.corpus"),
    "corpus missing": ({"tool": {"corpus": "absent.jsonl"}}, "search", "error", "absent.jsonl"),
    "retriever down": (
        {"tool": {"kind": "http", "corpus": "", "url": "http://127.0.0.1:1/retrieve"}}, "search", "error", "no answer",
    ),
    "replay without record": ({"tool": {"kind": "replay"}}, "search", "error", "tool.record"),
    "server down": (
        {"rollout": {"server": "http://127.0.0.1:1/v1"}, "model": {"context_length": 128}},
        "server", "error", "no answer",
    ),
    "server for acting": (
        {"rollout": {"server": "http://127.0.0.1:1/v1"}, "model": {"context_length": 128}},
        "settings", "warn", "rollout.weights_dir: expected a folder in training",
    ),
    "server without limit": (
        {"rollout": {"server": "http://127.0.0.1:1/v1", "weights_dir": "w"}},
        "settings", "error", "model.context_length: expected the server's limit",
    ),
    "server at another temperature": (
        {"rollout": {"server": "http://127.0.0.1:1/v1", "weights_dir": "w", "temperature": 0.7},
         "model": {"context_length": 128}},
        "settings", "error", "rollout.temperature: expected 1 in training",
    ),
    "misspelt tracker": ({"run": {"trackers": ["tensorbord"]}}, "settings", "error", "run.trackers: expected names"),
    "a world in memory": ({"task": {"kind": "miniworld"}}, "task.train", "error", "run hiexp quickstart"),
    "no HEK": ({"experience": {"hek": "absent.sqlite"}}, "HEK", "error", "absent.sqlite"),
    "share without HEK": ({"experience": {"experience_share": 0.5}}, "groups", "warn", "without experience.hek"),
    "bfloat16 and a small lr": ({"model": {"dtype": "bfloat16"}}, "precision", "warn", "larger than 0.0005 round back"),
    "corpus of another tool": ({"tool": {"kind": "none"}}, "unused", "warn", "tool.corpus has no effect"),
    "lr 0": ({"algorithm": {"lr": 0.0}}, "updates", "warn", "nothing is learned"),
    "cold rollouts": ({"rollout": {"temperature": 0.1}}, "updates", "warn", "hardly differ"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_fault_is_found_and_can_be_mended(sound, case, monkeypatch):
    monkeypatch.setattr("hiexp.agent.http_rules.time.sleep", lambda seconds: None)
    stages, name, status, words = CASES[case]
    check = pick(found(sound, **stages), name, status)
    assert words in check.text
    assert check.mend


@pytest.mark.parametrize("case", [case for case, (_, name, status, _) in CASES.items() if name == "settings"])
def test_train_refuses_what_the_doctor_says_it_refuses(sound, case):
    from hiexp.rl.trainer import GRPOTrainer

    stages, _, _, words = CASES[case]
    config = {stage: {**sound.get(stage, {}), **stages.get(stage, {})} for stage in {*sound, *stages}}
    with pytest.raises(ValueError, match=words):
        GRPOTrainer(TrainConfig.from_dict(config))


def test_a_chat_api_needs_no_model_here(sound, http_server):
    choices = [{"message": {"content": "yes"}}]
    server = http_server((200, {"choices": choices}), (401, {"error": "who?"}))
    sound["model"] = {"path": "big-model"}
    sound["rollout"] |= {"server": f"{server.url}/v1", "server_api": "chat"}
    checks = found(sound)
    assert "rollout.server_api: expected completions for training" in pick(checks, "settings", "warn").text
    assert "chat API" in pick(checks, "model", "ok").text
    assert "big-model answers" in pick(checks, "server", "ok").text
    assert not {"memory", "hub"} & {check.name for check in checks}
    assert server.requests[0].path == "/v1/chat/completions"
    assert "status 401" in pick(found(sound), "server", "error").text


def test_processes_that_share_a_run_are_refused_as_in_training(sound):
    sound["rollout"]["staleness"] = 1
    assert "settings" not in [check.name for check in check_config(TrainConfig.from_dict(sound))]
    check = pick(check_config(TrainConfig.from_dict(sound), shards=2), "settings", "error")
    assert "rollouts ahead need one process, got 2" in check.text


def test_checkpoints_of_adapters_hold_no_weights(sound):
    """A whole model of 3 x its weights becomes a fraction; merged models come on top."""
    pytest.importorskip("peft")

    def taken(**model):
        return pick(found(sound, model=model), "disk", "ok").text.split(" take ")[1].split(",")[0]

    shape = model_shape(sound["model"]["path"])
    config = TrainConfig.from_dict({**sound, "model": {**sound["model"], "lora_rank": 2}})
    merged = TrainConfig.from_dict({**sound, "model": {**sound["model"], "lora_rank": 2, "lora_merged": True}})
    adapter = checkpoint_bytes(shape, config)
    assert adapter == 3 * 4 * adapter_parameters(shape, 2)
    assert checkpoint_bytes(shape, merged) == adapter + 4 * shape.parameters
    assert checkpoint_bytes(shape, TrainConfig.from_dict(sound)) == 3 * 4 * shape.parameters
    assert taken(lora_rank=2) == gib(4 * adapter)


def test_files_of_other_commands_are_known(tmp_path, capsys):
    from pathlib import Path

    from hiexp.evidence.config import EvidenceConfig

    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    assert cli.main(["doctor", str(quickstart)]) == 0
    assert f"hiexp quickstart --config {quickstart}" in capsys.readouterr().out
    assert cli.main(["doctor", str(quickstart), "--set", "run.steps=3"]) == 2
    assert "--set: expected a config of hiexp train" in capsys.readouterr().err
    broken = tmp_path / "quickstart.yaml"
    broken.write_text("seed: 0\nwarm_start:\n  stepps: 3\n")
    assert cli.main(["doctor", str(broken)]) == 2
    assert "unknown key warm_start.stepps; did you mean warm_start.steps?" in capsys.readouterr().err
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(EvidenceConfig().to_dict()))
    assert cli.main(["doctor", str(study)]) == 0
    assert "hiexp evidence" in capsys.readouterr().out
    typo = tmp_path / "typo.yaml"
    typo.write_text("modell:\n  path: x\n")
    assert cli.main(["doctor", str(typo)]) == 2
    assert "unknown key modell; did you mean model?" in capsys.readouterr().err


def test_an_index_without_its_faiss_part_is_left_as_it_is(sound, tmp_path):
    pytest.importorskip("faiss")
    out, corpus = tmp_path / "index", sound["tool"]["corpus"]
    assert cli.main(["index", corpus, "--out", str(out), "--encoder", "hashing:16"]) == 0
    before = sorted(path.name for path in out.iterdir())
    tool = {"kind": "dense", "index": str(out), "encoder": "hashing:16"}
    assert (
        "no part for tool.method hnsw yet" in pick(found(sound, tool={**tool, "method": "hnsw"}), "search", "warn").text
    )
    assert "dense answers" in pick(found(sound, tool=tool), "search", "ok").text
    assert sorted(path.name for path in out.iterdir()) == before


def test_repeated_and_leaked_questions(sound, tmp_path):
    again = {"id": "t99", "question": "W0  w3", "golden_answers": ["w0"]}
    with open(tmp_path / "train.jsonl", "a") as stream:
        stream.write(json.dumps(again) + "\n")
    with open(tmp_path / "test.jsonl", "a") as stream:
        stream.write(json.dumps({"id": "e99", "question": "the w7, w3?", "golden_answers": ["w0"]}) + "\n")
    checks = found(sound)
    assert "t0 and t99" in pick(checks, "task.train", "warn").text
    leak = pick(checks, "leak: questions", "error")
    assert "1 evaluation questions are trained on (0 letter by letter), first e99 = t7" in leak.text


def test_maths_under_qa(sound, tmp_path):
    rows(tmp_path / "m.jsonl", [{"problem": "w1 w2", "answer": "1"}])
    for source, words in (("", "columns of a maths set"), ("aime24=", "answers of aime24 are judged as maths")):
        check = pick(found(sound, task={"evaluation": f"{source}{tmp_path}/m.jsonl"}), "task.evaluation", "error")
        assert words in check.text
    for task in ({"kind": "maths", "metric": "accuracy", "train": f"maths={sound['task']['train']}"}, {"kind": "qa"}):
        label = "qa=" if task["kind"] == "qa" else ""
        checks = found(sound, task={**task, "evaluation": f"{label}{tmp_path}/m.jsonl"})
        assert not [check for check in checks if check.name.startswith("task.") and check.status == "error"]


@pytest.fixture
def hek(tmp_path):
    def make(*entries):
        with HEK.create(tmp_path / "hek.sqlite", encoder="hashing") as hek:
            hek.add(entries)
        return {"hek": str(tmp_path / "hek.sqlite")}

    return make


def test_answers_and_evaluation_questions_in_the_hek(sound, hek, tmp_path):
    rows(tmp_path / "test.jsonl", [{"id": "e1", "question": "who was it", "golden_answers": ["Marie Curie"]}])
    experience = hek(
        Experience("E2", "people", "the answer is marie curie", qa_groups=("t1",)),
        Experience("E1", "people", "look for dates", qa_groups=("e1",)),
    )
    checks = found(sound, experience=experience)
    assert "1 entries hold an answer" in pick(checks, "leak: answers", "error").text
    assert "attempts at 1 evaluation questions" in pick(checks, "leak: HEK", "warn").text
    assert "asks for E3" in pick(checks, "HEK", "warn").text


@pytest.mark.parametrize(
    ("source", "told"),
    [
        (Question("text:of-a-log", "The w0, w4!", ("w0",)), "attempts at 1 evaluation questions"),
        (Question("e0", "w9 w5", ("w0",)), ""),
        (Question("e0", "w0 w4", ("w0",)), "attempts at 1 evaluation questions"),
    ],
)
def test_the_source_of_an_entry_is_known_by_its_text_and_not_by_its_id(sound, tmp_path, source, told):
    with HEK.create(tmp_path / "hek.sqlite", encoder="hashing") as hek:
        hek.register_questions([source])
        hek.add([Experience("E1", source.text, "look for w3 , not w4", qa_groups=(source.id,))])
    checks = found(sound, experience={"hek": str(tmp_path / "hek.sqlite")})
    leaks = [check.text for check in checks if check.name == "leak: HEK"]
    assert len(leaks) == bool(told)
    assert all(told in text for text in leaks)


@pytest.mark.data
def test_logs_without_ids_are_found_among_the_evaluation_questions(data_dir, tmp_path):
    from hiexp.experience.importers import load_trajectories
    from hiexp.preflight.data import leak_checks
    from hiexp.tasks.qa import load_questions

    evaluation = load_questions(data_dir / "hotpotqa_500.jsonl")
    groups = load_trajectories([data_dir / "trajectories_hotpotqa_qwen7b.jsonl.gz"])[:20]
    asked = {" ".join(group[0].question.casefold().split()) for group in groups}
    both = sum(" ".join(one.text.casefold().split()) in asked for one in evaluation)
    assert both
    with HEK.create(tmp_path / "hek.sqlite", encoder="hashing") as hek:
        first = [group[0] for group in groups]
        hek.register_questions([Question(one.question_id, one.question, one.golden_answers) for one in first])
        hek.add([Experience("E1", one.question, "look for dates", qa_groups=(one.question_id,)) for one in first])
        (leak,) = [check for check in leak_checks([], evaluation, hek.snapshot()) if check.name == "leak: HEK"]
    assert f"attempts at {both} evaluation questions" in leak.text


@pytest.mark.parametrize(
    ("share", "status", "words"),
    [
        (1.0, "ok", "4 of 4"),
        (0.5, "ok", "2 controls|2 are controls"),
        (0.1, "warn", "rounds away"),
        (0.75, "warn", "single rollout"),
    ],
)
def test_shares_of_a_group(sound, hek, share, status, words):
    entry = Experience("E2", "w1", "look for w3 , not w4", qa_groups=("other",))
    third = Experience("E3", "w2", "look for w5 , not w6", qa_groups=("other",))
    checks = found(sound, experience={**hek(entry, third), "experience_share": share})
    assert any(part in pick(checks, "groups", status).text for part in words.split("|"))


def test_a_directory_of_another_run_and_one_that_cannot_be_written(sound, tmp_path):
    from hiexp.rl.config_parse import dump_yaml

    (tmp_path / "run").mkdir()
    other = TrainConfig.from_dict({**sound, "algorithm": {"lr": 0.5}})
    (tmp_path / "run" / "config.resolved.yaml").write_text(dump_yaml(other))
    assert "algorithm.lr" in pick(found(sound), "run.dir", "error").text
    (tmp_path / "run" / "config.resolved.yaml").write_text(dump_yaml(TrainConfig.from_dict(sound)))
    assert "continues" in pick(found(sound), "run.dir", "ok").text
    (tmp_path / "file").write_text("")
    assert (
        "cannot be written" in pick(found(sound, run={"dir": str(tmp_path / "file" / "run")}), "run.dir", "error").text
    )


def test_memory_and_disk_against_what_there_is(sound, monkeypatch):
    config = TrainConfig.from_dict(sound)
    assert pick(check_config(config, memory_gib=1e-3), "memory", "error").mend
    monkeypatch.setattr(services.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    assert "10" in pick(check_config(config), "disk", "error").text or pick(check_config(config), "disk", "error").mend
    told = next(check for check in check_config(config, memory_gib=80) if check.name == "memory")
    assert told.status == "ok"
    assert "80.0 GiB given" in told.text


def test_adapters_of_installed_stacks_must_load(monkeypatch):
    real = services.importlib.util.find_spec
    there = {"trl": True, "hiexp.integrations": True, "hiexp.integrations.trl": True, "verl": None}
    monkeypatch.setattr(
        services.importlib.util, "find_spec", lambda name: there.get(name, real("json") if name in there else None)
    )
    monkeypatch.setattr(services.importlib.metadata, "version", lambda name: "9.9")
    monkeypatch.setattr(services.importlib, "import_module", lambda name: None)
    assert [(check.name, check.status) for check in services.plugin_checks()] == [("plug-in trl", "ok")]

    def broken(name):
        raise AttributeError("no GRPOTrainer")

    monkeypatch.setattr(services.importlib, "import_module", broken)
    (check,) = services.plugin_checks()
    assert check.status == "error"
    assert "trl 9.9: AttributeError: no GRPOTrainer" in check.text


def test_settings_that_say_nothing_wrong_say_nothing(sound):
    assert [check for check in setting_checks(TrainConfig.from_dict(sound), "cpu") if check.status != "ok"] == []


def test_the_command_prints_lines_or_json_and_exits_by_errors(sound, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(sound))
    assert cli.main(["doctor", str(tmp_path / "c.yaml")]) == 0
    out = capsys.readouterr().out
    assert out.strip().endswith(f"0 errors, 0 warnings, {len(out.splitlines()) - 1} checks")
    assert cli.main(["doctor", str(tmp_path / "c.yaml"), "--json", "--set", "run.questions_per_step=30"]) == 1
    checks = json.loads(capsys.readouterr().out)
    bad = [check for check in checks if check["status"] == "error"]
    assert [check["name"] for check in bad] == ["epochs"]
    assert bad[0]["mend"] == "lower run.questions_per_step to 20"
    assert cli.main(["doctor", str(tmp_path / "c.yaml"), "--set", "run.dirr=x"]) == 2
    assert cli.main(["doctor", "--json"]) == 2
    assert "--json: expected a CONFIG" in capsys.readouterr().err
