"""All checks of one config, cheap ones first; nothing is written and no weights are loaded."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from hiexp.preflight.check import Check, as_json, as_text, gib

if TYPE_CHECKING:
    from hiexp.preflight.memory import MemoryEstimate
    from hiexp.rl.config import TrainConfig


def doctor_config(args: argparse.Namespace) -> int:
    """``hiexp doctor CONFIG``; 1 where a check ended in an error."""
    from hiexp.rl.config import TrainConfig

    checks = check_config(TrainConfig.from_yaml(args.config, args.set), args.memory, args.shards)
    print(as_json(checks) if args.json else as_text(checks))
    return int(any(check.status == "error" for check in checks))


def check_config(config: TrainConfig, memory_gib: float | None = None, shards: int = 1) -> list[Check]:
    """Every check of ``config``, in the order in which a run would come to it.

    Args:
        memory_gib: memory of the device to compare the estimate with; None takes this machine's.
        shards: processes over which the model is spread.
    """
    from hiexp.preflight.data import epoch_check, leak_checks, read_hek, read_questions, share_check
    from hiexp.preflight.services import directory_checks, plugin_checks, server_checks, tool_check
    from hiexp.preflight.settings import setting_checks
    from hiexp.rl.model import resolve_device

    device = resolve_device(config.model.device).type
    if memory_gib is not None and config.model.device != "cpu":
        device = "cuda"  # the machine that is asked about has a GPU, whatever this one has
    checks = setting_checks(config, device)
    training = read_questions(config, "train", checks)
    evaluation = read_questions(config, "evaluation", checks)
    if training:
        checks.append(epoch_check(config, len(training)))
    snapshot = read_hek(config, checks)
    shared = share_check(config, snapshot)
    checks += [] if shared is None else [shared]
    checks += leak_checks(training, evaluation, snapshot)
    weights = _model(config, [*training, *evaluation], snapshot, device, (memory_gib, shards), checks)
    checks.append(tool_check(config))
    checks += [*server_checks(config), *directory_checks(config, weights), *plugin_checks()]
    return checks


def _model(
    config: TrainConfig,
    questions: list[Any],
    snapshot: Any,
    device: str,
    machine: tuple[float | None, int],
    checks: list[Check],
) -> int | None:
    """Checks of memory and lengths; returns the bytes of the weights, None where the model cannot be read."""
    from hiexp.preflight.lengths import length_checks
    from hiexp.preflight.memory import estimate, model_shape
    from hiexp.rl.model import load_tokenizer, quiet_transformers

    quiet_transformers()
    try:
        shape, tokenizer = model_shape(config.model.path), load_tokenizer(config.model)
    except (ValueError, OSError, ImportError) as error:
        checks.append(Check("model", "error", str(error).splitlines()[0], "mend model.path, or fetch the model first"))
        return None
    checks.append(Check("model", "ok", f"{shape.parameters / 1e6:,.1f} M parameters, {config.model.dtype}"))
    memory_gib, shards = machine
    told = estimate(shape, config, device=device, shards=shards)
    checks.append(memory_check(told, device, memory_gib))
    checks += length_checks(config, tokenizer, questions, snapshot, shape.context)
    return told.weights * shards


def memory_check(told: MemoryEstimate, device: str, memory_gib: float | None) -> Check:
    """The estimate against the memory of the device."""
    parts = {
        "weights": told.weights, "gradients": told.gradients, "AdamW": told.moments, "reference": told.reference,
        "KV cache": told.kv_cache, "sampling": told.sampling, "activations": told.activations, "head": told.head,
    }  # fmt: skip
    named = ", ".join(f"{name} {gib(size)}" for name, size in parts.items() if size)
    available = None if memory_gib is None else memory_gib * 2**30
    where = "given"
    if available is None:
        available, where = _device_memory(device)
    text = f"about {gib(told.peak)} per process ({named}); {gib(available)} {where}"
    mend = _memory_mend(told)
    if told.peak > available:
        return Check("memory", "error", text, mend)
    if told.peak > 0.8 * available:
        return Check("memory", "warn", f"{text}: close, the estimate is not exact", mend)
    return Check("memory", "ok", text)


def _memory_mend(told: MemoryEstimate) -> str:
    """What takes most of what could be given back."""
    if told.rollouts > told.update:
        return "lower rollout.batch_rows: it changes no result"
    if told.update > told.static:
        return "lower algorithm.tokens_per_microbatch (no result changes), or model.gradient_checkpointing: true"
    return "a smaller model, algorithm.kl_coef: 0 (no reference model), or model.dtype: bfloat16"


def _device_memory(device: str) -> tuple[float, str]:
    import torch

    if device == "cuda":
        return float(torch.cuda.mem_get_info()[1]), "on the GPU"
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), "in this machine"
