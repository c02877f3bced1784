"""All checks of one config, cheap ones first; nothing is written and no weights are loaded."""

from __future__ import annotations

import argparse
import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from hiexp.preflight.check import Check, as_json, as_text, gib

if TYPE_CHECKING:
    from hiexp.preflight.memory import MemoryEstimate
    from hiexp.rl.config import TrainConfig


def doctor_config(args: argparse.Namespace) -> int:
    """``hiexp doctor CONFIG``; 1 where a check ended in an error."""
    from hiexp.rl.config import TrainConfig

    checks = _other_command(args)
    if not checks:
        checks = check_config(TrainConfig.from_yaml(args.config, args.set), args.memory, args.shards)
    print(as_json(checks) if args.json else as_text(checks))
    return int(any(check.status == "error" for check in checks))


def _other_command(args: argparse.Namespace) -> list[Check]:
    """One check of a file that is for another command than ``hiexp train``; none of any other file.

    Raises:
        DataError, ValueError, TypeError: such a file that its command would refuse, or ``--set`` with it.
    """
    from hiexp.evidence.config import EvidenceConfig
    from hiexp.quickstart.config import QuickstartConfig
    from hiexp.rl.config import TrainConfig
    from hiexp.rl.config_parse import build, read_yaml

    values = read_yaml(args.config, [])
    keys = set(values) - _names(TrainConfig)
    if not keys & (_names(QuickstartConfig) | _names(EvidenceConfig)):
        return []
    if args.set:
        raise ValueError(f"--set: expected a config of hiexp train with it, {args.config} is for another command")
    nothing = "it needs no model, data or server, so there is nothing else to check"
    if keys & (_names(EvidenceConfig) - _names(QuickstartConfig)):
        build(EvidenceConfig, values, args.config)
        return [Check("config", "ok", f"the settings of a study of hiexp evidence, readable; {nothing}")]
    QuickstartConfig.from_yaml(args.config)
    return [Check("config", "ok", f"for hiexp quickstart --config {args.config}, readable; {nothing}")]


def _names(config: type[Any]) -> set[str]:
    return {field.name for field in fields(config)}


def check_config(config: TrainConfig, memory_gib: float | None = None, shards: int = 1) -> list[Check]:
    """Every check of ``config``, in the order in which a run would come to it.

    Args:
        memory_gib: memory of the device to compare the estimate with; None takes this machine's.
        shards: processes over which the model is spread.
    """
    from hiexp.preflight.hub import bounded_hub
    from hiexp.preflight.services import plugin_checks, server_checks
    from hiexp.preflight.settings import setting_checks
    from hiexp.rl.model import resolve_device

    device = resolve_device(config.model.device).type
    if memory_gib is not None and config.model.device != "cpu":
        device = "cuda"  # the machine that is asked about has a GPU, whatever this one has
    checks = [*_refusals(config, shards), *setting_checks(config, device)]
    with bounded_hub(config, checks):
        _check_parts(config, device, (memory_gib, shards), checks)
    return [*checks, *server_checks(config), *plugin_checks()]


def _refusals(config: TrainConfig, processes: int) -> list[Check]:
    """What ``hiexp train`` refuses before it loads anything, by the same functions.

    A warning for a server without a folder for weights or with the chat API: it is enough for evaluations.
    """
    from hiexp.rl.setup import check_training

    try:
        check_training(config, processes)
    except (ValueError, ImportError) as error:
        rollout = config.rollout
        acts_only = rollout.server_api == "chat" or (
            rollout.server and config.model.context_length is not None and not rollout.weights_dir
        )
        text, mend = f"hiexp train refuses this config: {error}", "mend the setting that is named"
        return [Check("settings", "warn" if acts_only else "error", text, mend)]
    return []


def _check_parts(config: TrainConfig, device: str, machine: tuple[float | None, int], checks: list[Check]) -> None:
    """Questions, experience, model, search tool and directory; what was found goes to ``checks``."""
    from hiexp.preflight.data import epoch_check, leak_checks, read_hek, read_questions, share_check
    from hiexp.preflight.services import directory_checks, tool_check

    training = read_questions(config, "train", checks)
    evaluation = read_questions(config, "evaluation", checks)
    if training:
        checks.append(epoch_check(config, len(training)))
    snapshot = read_hek(config, checks)
    shared = share_check(config, snapshot)
    checks += [] if shared is None else [shared]
    checks += leak_checks(training, evaluation, snapshot)
    checkpoint = _model(config, [*training, *evaluation], snapshot, device, machine, checks)
    checks += [tool_check(config), *directory_checks(config, checkpoint)]


def _model(
    config: TrainConfig,
    questions: list[Any],
    snapshot: Any,
    device: str,
    machine: tuple[float | None, int],
    checks: list[Check],
) -> int | None:
    """Checks of memory and lengths; returns the bytes of a checkpoint, None where the model cannot be read."""
    from hiexp.preflight.hub import is_hub_model, is_offline
    from hiexp.preflight.lengths import length_checks
    from hiexp.preflight.memory import checkpoint_bytes, estimate, model_shape
    from hiexp.rl.model import load_tokenizer, quiet_transformers

    if config.rollout.server_api == "chat":
        checks.append(Check("model", "ok", "behind a chat API: neither its weights nor its tokenizer are needed"))
        return None
    quiet_transformers()
    try:
        shape, tokenizer = model_shape(config.model.path), load_tokenizer(config.model)
    except (ValueError, OSError, ImportError) as error:
        away = is_offline() and is_hub_model(config.model.path)
        missing = f"{config.model.path}: not a folder here, not in the cache, and the hub cannot be reached"
        text = missing if away and isinstance(error, OSError) else str(error).splitlines()[0]
        checks.append(Check("model", "error", text, "mend model.path, or fetch the model first"))
        return None
    checks.append(Check("model", "ok", f"{shape.parameters / 1e6:,.1f} M parameters, {config.model.dtype}"))
    memory_gib, shards = machine
    told = estimate(shape, config, device=device, shards=shards)
    checks.append(memory_check(told, device, memory_gib))
    checks += length_checks(config, tokenizer, questions, snapshot, shape.context)
    return checkpoint_bytes(shape, config)


def memory_check(told: MemoryEstimate, device: str, memory_gib: float | None) -> Check:
    """The estimate against the memory of the device."""
    parts = {
        "weights": told.weights, "gradients": told.gradients, "AdamW": told.moments, "reference": told.reference,
        "weights on their way": told.copies, "the engine's weights and cache": told.engine,
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
    if told.copies + told.engine > told.static / 2:
        return "rollout.server on another device; else lower rollout.vllm_cache_gib or rollout.staleness"
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
