"""DeepSpeed's ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054), stages 1 to 3: all that is particular to it.

Its engine is driven here and not through accelerate, whose backward also steps: between the last backward and the next
update, the norm has to be looked at. DeepSpeed itself clips, and skips a step whose norm is not finite.

The float32 weights that the optimiser steps on lie apart from those of the model, spread over the ranks. Checkpoints
hold them, in the format of one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import distributed

from hiexp._extras import require
from hiexp.rl.config import TrainConfig
from hiexp.rl.gradients import Gradients
from hiexp.rl.model import lm_head
from hiexp.rl.sharding import Shards

_MOMENTS = ("exp_avg", "exp_avg_sq")


def configure(accelerator: Any, config: TrainConfig, model: Any) -> int:
    """Check DeepSpeed's settings and set those that training depends on, before accelerator.prepare; the stage.

    Raises:
        ValueError: what this cannot run, or was never tried. ImportError: deepspeed is missing.
    """
    require("deepspeed", "deepspeed", "distributed_type: DEEPSPEED")
    plugin = accelerator.state.deepspeed_plugin
    settings = plugin.deepspeed_config
    zero = settings["zero_optimization"]
    stage = zero.get("stage")
    if stage not in (1, 2, 3):
        raise ValueError(f"deepspeed: expected zero_stage 1, 2 or 3, got {stage}; DDP is the equal of stage 0")
    if accelerator.num_processes == 1:
        raise ValueError("deepspeed: expected two or more processes to spread the state over, got one")
    for name in ("offload_optimizer", "offload_param"):
        if zero.get(name, {}).get("device", "none") not in ("none", None):
            raise ValueError(f"deepspeed: expected {name} none, got {zero[name]['device']}: it was never tried")
    if plugin.zero3_init_flag:
        raise ValueError("deepspeed: expected zero3_init_flag false: the model is loaded whole, then spread")
    if settings.get("fp16", {}).get("enabled") is True:
        raise ValueError("deepspeed: expected mixed_precision no or bf16, got fp16, which skips steps by design")
    if model.dtype != torch.float32:
        raise ValueError(
            f"model.dtype: expected float32 with DeepSpeed, got {model.dtype}; mixed_precision: bf16 in accelerate's "
            "file computes in bfloat16 and keeps float32 weights in the optimiser"
        )
    # transformers looks at this object, and with stage 3 would give every model it loads empty weights.
    plugin.dschf = None
    settings |= {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": config.algorithm.max_grad_norm,
    }  # fmt: skip
    return int(stage)


def keep_head_whole(model: Any, optimizer: Any) -> None:
    """Stage 3 gathers a module's weights around its forward; the loss reads the head's weight outside of that.

    So it stays whole on every rank. ``optimizer``: prepared by accelerate.
    """
    zero = optimizer.optimizer
    for parameter in lm_head(model):
        if parameter is not None and not parameter.ds_persist:
            parameter.ds_persist = True
            zero.persistent_parameters.append(parameter)
            parameter.all_gather([parameter])


class ZeroGradients(Gradients):
    """Gradients under DeepSpeed. A run has two ranks or more, so no update is tried again after :meth:`drop`."""

    def adding(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; DeepSpeed is told which one is the last."""
        self._scorer.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Any) -> None:
        """Add the gradient of ``loss``; DeepSpeed averages over ranks."""
        self._scorer.backward(loss)

    def step(self) -> float:
        """Clip and step. Returns the norm before; infinity where it was not finite, and nothing has changed then."""
        self._scorer.step()
        return float(self._scorer.get_global_grad_norm())

    def drop(self) -> None:
        """Forget what was added."""
        self._scorer.optimizer.zero_grad(set_to_none=True)


class ZeroShards(Shards):
    """What this process holds of a model and its AdamW under ZeRO; see :class:`hiexp.rl.sharding.Shards`."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        super().__init__(model, optimizer.optimizer)
        self._deepspeed: Any = require("deepspeed", "deepspeed", "distributed_type: DEEPSPEED")

    def optimizer_state(self) -> dict[str, Any]:
        """The state_dict that AdamW would have in one process, on the CPU."""
        adamw = self._optimizer.optimizer
        # All its flat partitions made the same steps.
        steps = [row["step"] for row in adamw.state.values()][:1]
        rows = {
            number: {"step": step.clone(), **{key: self._moment(parameter, key) for key in _MOMENTS}}
            for step in steps
            for number, parameter in enumerate(self._trained())
        }
        # DeepSpeed keeps notes of its own in the groups.
        group = {key: adamw.param_groups[0][key] for key in adamw.defaults}
        return {"state": rows, "param_groups": [{**group, "params": list(range(len(self._trained())))}]}

    def set_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load a state_dict of one process."""
        if not state["state"]:
            return
        self._open_state(state["state"][0]["step"])
        for number, parameter in enumerate(self._trained()):
            for key in _MOMENTS:
                self._set_own(parameter, state["state"][number][key], key)

    def _trained(self) -> list[Any]:
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _moment(self, parameter: Any, key: str) -> torch.Tensor:
        moment: torch.Tensor = self._deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        return moment.detach().cpu()

    def _open_state(self, step: torch.Tensor) -> None:
        """AdamW makes its state at its first step, and DeepSpeed links parameters to it after that."""
        zero = self._optimizer
        stage_3 = hasattr(zero, "fp32_partitioned_groups_flat")
        for flat in zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = {
                "step": step.clone(),
                **{key: torch.zeros_like(flat, requires_grad=False) for key in _MOMENTS},
            }
        if not stage_3:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def _whole(self, parameter: Any) -> torch.Tensor:
        if parameter.requires_grad:
            weight: torch.Tensor = self._deepspeed.utils.safe_get_full_fp32_param(parameter)
            return weight.detach()
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    def _set(self, parameter: Any, value: torch.Tensor) -> None:
        with self._deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(value)
        if parameter.requires_grad:
            self._set_own(parameter, value, None)

    def _set_own(self, parameter: Any, value: torch.Tensor, key: str | None) -> None:
        """Copy this rank's part of the whole ``value`` into the float32 weight, or into the moment ``key``."""
        utils = self._deepspeed.utils
        value = value.to(device=parameter.device, dtype=torch.float32)
        if not hasattr(parameter, "ds_id"):
            if key is None:
                utils.safe_set_full_fp32_param(parameter, value)
            else:
                utils.safe_set_full_optimizer_state(parameter, value, key)
            return
        # DeepSpeed's own setter fails where the parts are padded because the ranks do not divide the size.
        if key is None:
            local = utils.safe_get_local_fp32_param(parameter)
        else:
            local = utils.safe_get_local_optimizer_state(parameter, key)
        part = value.flatten()[local.numel() * distributed.get_rank() :][: local.numel()]
        local.data[: part.numel()].copy_(part)
