"""The policy as it is trained: prepared by accelerate, scored, optimised, saved and loaded whole.

What a checkpoint holds does not depend on how the run is spread over processes: ``model/`` loads with from_pretrained,
optimizer.pt numbers parameters as one process would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from hiexp.rl.config import TrainConfig
from hiexp.rl.lora import BaseScorer, add_adapter, read_adapter, write_adapter
from hiexp.rl.scorer import PolicyScorer
from hiexp.rl.sharding import Shards


class Policy:
    """Model and optimiser of a run.

    Args:
        model: causal language model, on its device; becomes part of the policy.
        config: all settings.
        accelerator: the engine that trains it.

    Attributes:
        scorer: the model as accelerate wraps it, see :class:`hiexp.rl.scorer.PolicyScorer`.
        optimizer: AdamW over the trained parameters.
        model: the trained model itself, adapter layers included.
        acting: the model that rollouts are sampled from; a copy with whole weights where the trained one is sharded,
            because ranks that sample at their own pace cannot gather weights together.
        reference: scorer of the frozen starting policy; None without KL term.

    Raises:
        ValueError: an engine of accelerate that this cannot run on.
    """

    def __init__(self, model: Any, config: TrainConfig, accelerator: Accelerator) -> None:
        zero_stage = _check_engine(accelerator, config, model)
        self._config, self._dtype = config, model.dtype
        self._adapted = add_adapter(model, config.model, config.run.seed) if config.model.lora_rank else None
        self._sharded = accelerator.is_fsdp2 or zero_stage == 3
        self._gathered = self._sharded or zero_stage > 0
        acting = copy.deepcopy(model).requires_grad_(False) if self._sharded else None
        frozen = None
        if config.algorithm.kl_coef > 0 and self._adapted is None:
            frozen = copy.deepcopy(model).requires_grad_(False).to(accelerator.device)
        if config.model.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            # Behind frozen embeddings the inputs of a layer need a gradient for its recomputation to have one.
            if self._adapted is not None:
                model.enable_input_require_grads()
        scorer = PolicyScorer(model, config.rollout.temperature)
        # Where FSDP cuts: accelerate asks the module it is given.
        scorer._no_split_modules = list(getattr(model, "_no_split_modules", None) or [])
        self.scorer, self.optimizer = accelerator.prepare(scorer, _adamw(model, config))
        self.model = accelerator.unwrap_model(self.scorer).model
        self._shards = _make_shards(self.model, self.optimizer, zero_stage)
        self.acting = self.model if acting is None else _copy_like(acting, self.model, accelerator.device)
        self.reference: Any = None
        if frozen is not None:
            self.reference = PolicyScorer(frozen, config.rollout.temperature)
        elif config.algorithm.kl_coef > 0:
            self.reference = BaseScorer(self.scorer, self._adapted)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and whole tensor of every parameter and buffer; every rank has to take them all."""
        return self._shards.weights()

    def refresh(self) -> None:
        """Bring the acting model up to date; every rank has to call this after an update."""
        if self._sharded:
            targets = dict([*self.acting.named_parameters(remove_duplicate=False), *self.acting.named_buffers()])
            with torch.no_grad():
                for name, tensor in self.weights():
                    targets[name].copy_(tensor)

    def state(self) -> dict[str, Any]:
        """Whole weights and optimiser state for :meth:`write`; every rank has to call this."""
        weights = self._shards.weights(trained_only=self._adapted is not None)
        kept = {name: tensor.cpu() if self._gathered else tensor for name, tensor in weights}
        return {"model": kept, "optimizer": self._shards.optimizer_state()}

    def write(self, state: dict[str, Any], folder: Path) -> None:
        """Files of a checkpoint from :meth:`state`."""
        if self._adapted is not None:
            write_adapter(self._adapted, state["model"], folder, merged=self._config.model.lora_merged)
        else:
            persistent = self.model.state_dict().keys()
            weights = {name: tensor for name, tensor in state["model"].items() if name in persistent}
            self.model.save_pretrained(folder / "model", state_dict=weights)
        torch.save(state["optimizer"], folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Take weights and optimiser state out of a checkpoint; on every rank."""
        if self._adapted is not None:
            weights = read_adapter(folder / "model")
        else:
            weights = type(self.model).from_pretrained(folder / "model", dtype=self._dtype).state_dict()
        self._shards.set_weights(weights)
        self._shards.set_optimizer_state(torch.load(folder / "optimizer.pt", weights_only=True))
        self.refresh()


def _adamw(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    settings = config.algorithm
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay)


def _copy_like(acting: Any, model: Any, device: torch.device) -> Any:
    """``acting`` on the device, its parameters of the type of ``model``; buffers (rotary frequencies) keep theirs."""
    for parameter in acting.parameters():
        parameter.data = parameter.data.to(model.dtype)
    return acting.to(device)


def _check_engine(accelerator: Accelerator, config: TrainConfig, model: Any) -> int:
    """DeepSpeed's ZeRO stage, 0 for any other engine."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED:
        from hiexp.rl.zero import configure

        return configure(accelerator, config, model)
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if kind not in known and not accelerator.is_fsdp2:
        raise ValueError(f"accelerate: expected one process, DDP, FSDP version 2 or DeepSpeed, got {kind.value}")
    return 0


def _make_shards(model: Any, optimizer: Any, zero_stage: int) -> Shards:
    if zero_stage == 0:
        return Shards(model, optimizer)
    from hiexp.rl.zero import ZeroShards, keep_head_whole

    if zero_stage == 3:
        keep_head_whole(model, optimizer)
    return ZeroShards(model, optimizer)


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
