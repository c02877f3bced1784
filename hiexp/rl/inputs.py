"""Fingerprints of what a run reads from outside its directory: a resumed run must find what it began with.

The settings name a model and question files; their contents may be replaced underneath. Another starting model would be
another KL reference, other questions another order of training, and nothing else would say so.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hiexp.rl.reward import QuestionTask, Task

if TYPE_CHECKING:
    from hiexp.tasks.question import Question

# Training touches every tensor, so a sample tells two models apart: 0.4 % of a matrix of 4096 x 4096.
_ELEMENTS = 1 << 16


def fingerprints(model: Any, task: Task) -> dict[str, str]:
    """By the name with which a change can be allowed: ``model.weights``, ``task.train``, ``task.evaluation``.

    Of a task that is no list of questions the model's alone.
    """
    found = {"model.weights": _weights(model)}
    if isinstance(task, QuestionTask):
        found["task.train"] = _questions(task.questions)
        found["task.evaluation"] = _questions([one for batch in task.evaluation() for one in batch.questions])
    return found


def _weights(model: Any) -> str:
    """Names, shapes and types of all parameters, and the values of up to 65,536 elements of each, evenly spaced."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        values = tensor.detach().reshape(-1)
        values = values[:: max(1, -(-len(values) // _ELEMENTS))].contiguous().cpu()
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _questions(questions: Sequence[Question]) -> str:
    digest = hashlib.sha256()
    for question in questions:
        digest.update(repr((question.id, question.text, question.golden_answers)).encode())
    return digest.hexdigest()
