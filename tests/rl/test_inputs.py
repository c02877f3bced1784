"""What a run reads from outside: contents that were replaced underneath are refused, unless allowed by name."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from hiexp.io import DataError
from hiexp.rl.config import TrainConfig
from hiexp.rl.inputs import fingerprints
from hiexp.rl.trainer import GRPOTrainer


@pytest.fixture
def own_run(tiny_run, tmp_path):
    """The miniature in files of its own, that a test may change, with one step done."""
    root = tmp_path / "files"
    shutil.copytree(tiny_run.root, root)
    config = type(tiny_run)(root).config(tmp_path / "run", run={"steps": 1})
    GRPOTrainer(TrainConfig.from_dict(config)).train()
    config["run"]["steps"] = 2
    return root, TrainConfig.from_dict(config)


def change_model(root):
    from safetensors.torch import load_file, save_file

    file = root / "model" / "model.safetensors"
    weights = load_file(file)
    next(iter(weights.values()))[:1] += 0.5
    save_file(weights, file, metadata={"format": "pt"})


def change_questions(root):
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    rows[3]["golden_answers"] = ["black"]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("change", "names"), [(change_model, ["model.weights"]), (change_questions, ["task.train", "task.evaluation"])]
)
def test_contents_changed_underneath_are_refused_unless_allowed(own_run, change, names):
    root, config = own_run
    change(root)
    with pytest.raises(ValueError, match=f"began with other contents of {', '.join(names)}; put the old files back"):
        GRPOTrainer(config)
    run = root.parent / "run"
    assert not (run / "config.changes.jsonl").exists()
    assert GRPOTrainer(config, allow_changed=names).train()["step"] == 2
    (line,) = (run / "config.changes.jsonl").read_text().splitlines()
    assert json.loads(line) == {"steps_before": 1, "changes": [f"{name}: other contents" for name in names]}
    # From now on these are the run's own.
    assert GRPOTrainer(config).train()["step"] == 2


def test_a_run_without_fingerprints_gets_them(own_run):
    root, config = own_run
    file = root.parent / "run" / "inputs.json"
    file.unlink()
    trainer = GRPOTrainer(config)
    trainer.train()
    assert json.loads(file.read_text()).keys() == {"model.weights", "task.train", "task.evaluation"}
    file.write_text("{")
    with pytest.raises(DataError, match=r"inputs.json: expected a JSON object .*; delete it"):
        GRPOTrainer(config)


def test_any_tensor_and_any_question_counts(tiny_run, tmp_path):
    trainer = GRPOTrainer(TrainConfig.from_dict(tiny_run.config(tmp_path / "run")))
    model, task = trainer.model, trainer.task
    seen = [fingerprints(model, task)]
    assert fingerprints(model, task) == seen[0]
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.view(-1)[0] += 1
        seen.append(fingerprints(model, task))
    assert len({one["model.weights"] for one in seen}) == len(seen)
    for change in ({"id": "another"}, {"text": "?"}, {"golden_answers": ("?",)}):
        task.questions[-1] = dataclasses.replace(task.questions[-1], **change)
        seen.append(fingerprints(model, task))
    assert len({one["task.train"] for one in seen}) == 4


def test_half_precision_and_large_tensors():
    model = torch.nn.Linear(300, 400).to(torch.bfloat16)
    before = fingerprints(model, object())
    assert before.keys() == {"model.weights"}
    with torch.no_grad():
        model.weight.mul_(1.5)
    assert fingerprints(model, object()) != before
