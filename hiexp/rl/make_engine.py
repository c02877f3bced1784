"""From config to engine: who samples, for the commands that only act and for the trainer."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hiexp.rl.config import TrainConfig

if TYPE_CHECKING:
    from hiexp.agent.engine import Engine
    from hiexp.agent.engine_openai import OpenAIEngine
    from hiexp.rl.weight_sync import Replica


def make_engine(config: TrainConfig) -> Engine:
    """The engine of ``rollout.server`` or ``rollout.engine`` with the weights of ``model.path``.

    Raises:
        ValueError, OSError, DataError, ImportError: see :func:`hiexp.rl.model.load_policy`; EngineError: vLLM fails.
    """
    from hiexp.rl.model import load_policy, load_tokenizer, model_source, resolve_device

    if config.rollout.server:
        return server_engine(config, load_tokenizer(config.model))
    if config.rollout.engine == "vllm":
        from hiexp.agent.engine_vllm import VllmEngine

        return VllmEngine(model_source(config.model.path), load_tokenizer(config.model), **_vllm_settings(config))
    from hiexp.agent.engine_transformers import TransformersEngine

    model, tokenizer = load_policy(config.model)
    return TransformersEngine(model, tokenizer, resolve_device(config.model.device), config.model.context_length)


def server_engine(config: TrainConfig, tokenizer: Any) -> OpenAIEngine:
    """The engine behind ``rollout.server``."""
    from hiexp.agent.engine_openai import OpenAIEngine
    from hiexp.agent.openai_server import OpenAIServer

    if config.model.context_length is None:
        raise ValueError("model.context_length: expected the server's limit of tokens with rollout.server, got null")
    server = OpenAIServer(config.rollout.server_model or config.model.path, config.rollout.server)
    return OpenAIEngine(server, tokenizer, config.model.context_length)


def training_engine(config: TrainConfig, model: Any, tokenizer: Any) -> tuple[Engine, Replica | None]:
    """What samples while ``model`` is trained, and where its weights must be pushed; None: it samples from ``model``.

    An engine of its own starts with weights that mean nothing: push before the first rollout.

    Raises:
        ValueError: settings under which the engine would sample from other weights, or at another temperature, than
            the trainer scores with.
    """
    if config.rollout.server and config.rollout.temperature != 1.0:
        raise ValueError(
            "rollout.temperature: expected 1 in training with rollout.server, whose log-probs are at temperature 1, "
            f"got {config.rollout.temperature:g}"
        )
    if config.rollout.server:
        from hiexp.rl.weight_sync import ServerReplica

        remote = server_engine(config, tokenizer)
        return remote, ServerReplica(remote.server, config.rollout.weights_dir, model.config)
    if config.rollout.engine == "vllm":
        from hiexp.agent.engine_vllm import VllmEngine
        from hiexp.rl.weight_sync import write_model_config

        with tempfile.TemporaryDirectory(prefix="hiexp-vllm-") as folder:
            write_model_config(model, Path(folder))
            engine = VllmEngine(folder, tokenizer, random_weights=True, **_vllm_settings(config))
        return engine, engine
    from hiexp.agent.engine_transformers import TransformersEngine

    context = config.model.context_length
    if config.rollout.staleness == 0:
        return TransformersEngine(model, tokenizer, context_length=context), None
    from hiexp.rl.weight_sync import LocalReplica

    twin = copy.deepcopy(model).requires_grad_(False)
    return TransformersEngine(twin, tokenizer, context_length=context), LocalReplica(twin)


def _vllm_settings(config: TrainConfig) -> dict[str, Any]:
    return {
        "context_length": config.model.context_length,
        "dtype": config.model.dtype,
        "cache_gib": config.rollout.vllm_cache_gib,
    }
