"""The policy as it is trained: prepared by accelerate, scored, sharpened by the optimiser, saved and loaded whole.

What a checkpoint holds does not depend on how the run is spread over processes: ``model/`` loads with from_pretrained,
optimizer.pt names parameters as one process would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hiexp.rl.config import TrainConfig
from hiexp.rl.update import PolicyScorer


class Policy:
    """Model and optimiser of a run.

    Args:
        model: causal language model, on its device.
        config: all settings.
        accelerator: the engine that trains it.

    Attributes:
        scorer: the model as accelerate wraps it, see :class:`hiexp.rl.update.PolicyScorer`.
        optimizer: AdamW over the trained parameters.
        model: the trained model itself.
        acting: the model that rollouts are sampled from.
    """

    def __init__(self, model: Any, config: TrainConfig, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        settings = config.algorithm
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.scorer, self.optimizer = accelerator.prepare(PolicyScorer(model, config.rollout.temperature), optimizer)
        self.model = accelerator.unwrap_model(self.scorer).model
        self.acting = self.model

    def state(self) -> dict[str, Any]:
        """Whole weights and optimiser state for :meth:`write`; all ranks have to call it, rank 0 gets the content."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def write(self, state: dict[str, Any], folder: Path) -> None:
        """Files of a checkpoint from :meth:`state`."""
        self.model.save_pretrained(folder / "model", state_dict=state["model"])
        torch.save(state["optimizer"], folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Take weights and optimiser state out of a checkpoint; on every rank."""
        saved = type(self.model).from_pretrained(folder / "model", dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())
        self.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))


def random_state() -> dict[str, Any]:
    """States of torch's generators in this process: the CPU's and every CUDA device's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: dict[str, Any]) -> None:
    """Go on from :func:`random_state`; devices that are no longer there are left out."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for device, device_state in enumerate(state["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(device_state, device)
