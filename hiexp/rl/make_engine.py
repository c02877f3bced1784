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
    from hiexp.agent.openai_server import OpenAIServer
    from hiexp.rl.weight_sync import Replica


def make_engine(config: TrainConfig) -> Engine:
    """The engine of ``rollout.server`` or ``rollout.engine`` with the weights of ``model.path``.

    That of a chat API needs nothing of the model but its name on the server.

    Raises:
        ValueError, OSError, DataError, ImportError: see :func:`hiexp.rl.model.load_policy`; EngineError: vLLM fails.
    """
    if config.rollout.server_api == "chat":
        from hiexp.agent.engine_chat import ChatEngine

        return ChatEngine(_server(config))
    from hiexp.rl.model import load_policy, load_tokenizer, model_source, resolve_device, vocabulary_size

    if config.rollout.server:
        return server_engine(config, load_tokenizer(config.model), vocabulary_size(config.model))
    if config.rollout.engine == "vllm":
        from hiexp.agent.engine_vllm import VllmEngine

        return VllmEngine(model_source(config.model.path), load_tokenizer(config.model), **_vllm_settings(config))
    from hiexp.agent.engine_transformers import TransformersEngine

    model, tokenizer = load_policy(config.model)
    return TransformersEngine(model, tokenizer, resolve_device(config.model.device), config.model.context_length)


def server_engine(config: TrainConfig, tokenizer: Any, vocabulary: int = 0) -> OpenAIEngine:
    """The engine behind ``rollout.server``; ``vocabulary`` as for :class:`hiexp.agent.engine_openai.OpenAIEngine`."""
    from hiexp.agent.engine_openai import OpenAIEngine

    context = _server_context(config)
    return OpenAIEngine(_server(config), tokenizer, context, vocabulary)


def _server(config: TrainConfig) -> OpenAIServer:
    from hiexp.agent.openai_server import OpenAIServer

    return OpenAIServer(config.rollout.server_model or config.model.path, config.rollout.server)


def _server_context(config: TrainConfig) -> int:
    if config.model.context_length is None:
        raise ValueError("model.context_length: expected the server's limit of tokens with rollout.server, got null")
    return config.model.context_length


def check_logprobs(config: TrainConfig, command: str) -> None:
    """Refuse an engine without log-probs where ``command`` records them.

    Raises:
        ValueError: ``rollout.server_api`` is chat.
    """
    if config.rollout.server_api == "chat":
        raise ValueError(
            f"rollout.server_api: expected completions for {command}: a chat API gives no log-probs; chat is for "
            "hiexp eval, whose --out keeps rollouts that hiexp distill reads"
        )


def check_engine(config: TrainConfig, processes: int = 1) -> None:
    """Refuse settings of the engine under which nothing can be trained.

    Raises:
        ValueError: the engine would sample from other weights, or at another temperature, than the trainer scores with;
            a server without a folder for weights or a limit of tokens, or with the chat API; an engine that needs one
            process, in several.
    """
    check_logprobs(config, "training")
    server, vllm = bool(config.rollout.server), config.rollout.engine == "vllm" and not config.rollout.server
    if processes > 1 and (config.rollout.staleness > 0 or vllm):
        raise ValueError(
            f"rollout.engine, rollout.staleness: vLLM in process and rollouts ahead need one process, got {processes}; "
            "sample from a server instead"
        )
    if not server:
        return
    _server_context(config)
    if not config.rollout.weights_dir:
        raise ValueError("rollout.weights_dir: expected a folder in training: new weights must reach the server")
    if config.rollout.temperature != 1.0:
        raise ValueError(
            "rollout.temperature: expected 1 in training with rollout.server, whose log-probs are at temperature 1, "
            f"got {config.rollout.temperature:g}"
        )


def training_engine(config: TrainConfig, model: Any, tokenizer: Any) -> tuple[Engine, Replica | None]:
    """What samples while ``model`` is trained, and where its weights must be pushed; None: it samples from ``model``.

    The config passed :func:`check_engine`. An engine of its own starts with weights that mean nothing: push before the
    first rollout.
    """
    if config.rollout.server:
        from hiexp.rl.weight_sync import ServerReplica

        remote = server_engine(config, tokenizer, getattr(model.config, "vocab_size", 0))
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
