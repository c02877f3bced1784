"""Run by test_distributed.py in a process of its own: one rank of a training run, with what the test wants to see.

Reads CONFIG (dict), RANK, SIZE, PORT, FOLDER, and optional FSDP (bool), ZERO (stage), BF16 (bool), KILL (rank, step),
RAISE (rank, step), SPOIL (bool).
"""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch


def environment(rank: int, size: int, port: int) -> None:
    """What ``accelerate launch`` sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"})
    os.environ["DS_ACCELERATOR"] = "cpu"


def record(trainer: Any, folder: Path) -> None:
    """Save the clipped gradients of every update, just before the optimiser uses them."""
    stepper = trainer.policy.scorer if hasattr(trainer.policy.scorer, "zero_optimization") else trainer.optimizer
    step, count = stepper.step, 0

    def recorded(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        gradient = torch.cat([whole_gradient(p).flatten() for p in trainer.model.parameters() if p.requires_grad])
        if stepper is trainer.policy.scorer:
            # DeepSpeed clips inside of its step.
            gradient *= min(1.0, trainer.config.algorithm.max_grad_norm / (float(gradient.norm()) + 1e-6))
        torch.save(gradient.clone(), folder / f"gradient_{count}_rank{trainer.ranks.rank}.pt")
        return step(*args, **kwargs)

    stepper.step = recorded


def whole_gradient(parameter: Any) -> Any:
    """The gradient of a parameter, gathered where it is sharded."""
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        import deepspeed

        return deepspeed.utils.safe_get_full_grad(parameter).float()
    return parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad


def fail(trainer: Any, place: tuple[int, int], how: Any) -> None:
    """Call ``how`` before the rollouts of step ``place[1]`` on rank ``place[0]``."""
    run, rank = trainer._actor.run, trainer.ranks.rank

    def failing(*rows: Any, **settings: Any) -> Any:
        if (rank, settings["policy_step"] + 1) == tuple(place):
            trainer._actor._agent = lambda *args: how()
        return run(*rows, **settings)

    trainer._actor.run = failing


def spoil(gradients: Any) -> None:
    """Make every gradient infinite or NaN, while the loss stays finite."""
    backward = gradients.backward
    gradients.backward = lambda loss: backward(loss * float("inf"))


def broken_tool() -> None:
    """An engine or tool that breaks."""
    raise RuntimeError("the corpus caught fire")


def sharding_accelerator(**settings: Any) -> Any:
    """accelerate offers FSDP to GPUs only, torch also to CPUs: tell it what the launcher would on GPUs."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

    accelerator = Accelerator(**settings)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False,
        reshard_after_forward=True,
    )  # fmt: skip
    return accelerator


def zero_accelerator(stage: int, bf16: bool, **settings: Any) -> Any:
    """accelerate offers DeepSpeed to GPUs only as well, and DeepSpeed would compile an exchange in shared memory."""
    import deepspeed.ops
    from accelerate import Accelerator, DeepSpeedPlugin, DistributedType, PartialState

    deepspeed.ops.__compatible_ops__ = {}
    accelerator = Accelerator(**settings)
    # A threshold of 0 shards every weight of a model this small.
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": zero}, zero3_init_flag=False)
    accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.DEEPSPEED
    accelerator.state.deepspeed_plugins = {"default": plugin}
    accelerator.deepspeed_engine_wrapped = None
    plugin.set_mixed_precision("bf16" if bf16 else "no")
    plugin.select(_from_accelerator_state=True)
    return accelerator


def main(names: dict[str, Any]) -> None:
    """Train as one rank; the outcome is left in FOLDER."""
    rank, folder = names["RANK"], Path(names["FOLDER"])
    environment(rank, names["SIZE"], names["PORT"])
    torch.set_num_threads(1)
    from hiexp.rl import trainer as module
    from hiexp.rl.config import TrainConfig
    from hiexp.rl.trainer import GRPOTrainer

    if names.get("FSDP"):
        module.Accelerator = sharding_accelerator
    if names.get("ZERO"):
        module.Accelerator = partial(zero_accelerator, names["ZERO"], names.get("BF16", False))
    trainer = GRPOTrainer(TrainConfig.from_dict(names["CONFIG"]))
    if names.get("FSDP"):
        assert all(hasattr(weight, "full_tensor") for weight in trainer.model.parameters())
    record(trainer, folder)
    if names.get("KILL"):
        fail(trainer, names["KILL"], lambda: os.kill(os.getpid(), signal.SIGKILL))
    if names.get("RAISE"):
        fail(trainer, names["RAISE"], broken_tool)
    if names.get("SPOIL"):
        spoil(trainer._update._gradients)
    try:
        row = trainer.train()
    except Exception as error:
        (folder / f"error_rank{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        if names.get("SPOIL"):
            torch.save({name: tensor.clone() for name, tensor in trainer.policy.weights()}, folder / f"left_{rank}.pt")
        os._exit(3)
    torch.save({key: value for key, value in row.items() if "seconds" not in key}, folder / f"row_rank{rank}.pt")


main(globals())
