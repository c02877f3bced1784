"""The trainer's weights in an engine that holds its own: pushed after an update, and checked on probe sequences.

A weight that does not arrive (another name, another layout, a cache of the old policy) shows in no error, only in
rollouts of a policy that is not the trained one. So after every push trainer and engine score the same tokens.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import save_file

from hiexp.agent.http_json import post_json
from hiexp.agent.http_rules import ServiceError
from hiexp.agent.openai_server import OpenAIServer

PROBE_TOKENS = 256  # of one probe sequence


class Replica(Protocol):
    """Something that holds a copy of the policy."""

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Replace the weights by these, named as in the model that is held, and forget what was cached under the old.

        That is a plain model with the names of transformers; :class:`LocalReplica` has adapter layers besides.
        """
        ...

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities at temperature 1 of the tokens of each sequence, from its second one on."""
        ...


class WeightSyncError(RuntimeError):
    """After a push the engine scores tokens differently from the trainer; its rollouts would be another policy's."""


class WeightSync:
    """Pushes weights to a replica and compares.

    Args:
        replica: where the weights go.
        probes: token sequences, 2 or more tokens each.
        tolerance: most mean |trainer - replica log-prob| in nats over the tokens of the probes.
    """

    def __init__(self, replica: Replica, probes: Sequence[Sequence[int]], tolerance: float) -> None:
        self.replica, self.tolerance = replica, tolerance
        self.probes = [list(probe[:PROBE_TOKENS]) for probe in probes if len(probe) > 1]
        if not self.probes:
            raise ValueError("probes: expected at least one sequence of two or more tokens, got none")

    def push(self, weights: Mapping[str, Any]) -> float:
        """Give the replica these weights; returns the seconds it took."""
        begin = time.perf_counter()
        self.replica.load_weights(weights)
        return time.perf_counter() - begin

    def expected(self, model: Any) -> np.ndarray[Any, Any]:
        """Log-probs of the probes' tokens under ``model``, one after the other."""
        return np.concatenate([sequence_logprobs(model, probe) for probe in self.probes])

    def check(self, expected: np.ndarray[Any, Any]) -> dict[str, float]:
        """``sync_gap_mean`` and ``sync_gap_max``: |expected log-prob - log-prob of the replica| over the probes.

        Raises:
            WeightSyncError: the mean is above the tolerance, or a log-prob is not finite.
        """
        theirs = np.concatenate([np.asarray(values) for values in self.replica.prompt_logprobs(self.probes)])
        gaps = np.abs(expected - theirs)
        mean, most = float(gaps.mean()), float(gaps.max())
        if not mean <= self.tolerance:
            raise WeightSyncError(
                f"engine: log-probs of {len(gaps)} probe tokens are {mean:.3g} nats from the trainer's on average (at "
                f"most {most:.3g}), expected at most rollout.sync_tolerance = {self.tolerance}: the new weights did "
                "not arrive, or the engine computes another model"
            )
        return {"sync_gap_mean": mean, "sync_gap_max": most}


class LocalReplica:
    """A copy of the model in this process, for rollouts that are made while the model itself is trained."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Copy the weights."""
        self.model.load_state_dict(weights)

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the tokens of each sequence, from its second one on."""
        return [sequence_logprobs(self.model, sequence).tolist() for sequence in sequences]


@torch.no_grad()
def sequence_logprobs(model: Any, token_ids: Sequence[int]) -> np.ndarray[Any, Any]:
    """Log-probs (T - 1,) float64 at temperature 1 of the tokens (T,) from the second one on."""
    ids = torch.tensor([list(token_ids)], device=next(model.parameters()).device)  # (1, T)
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # (T - 1, V)
    chosen = torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return np.asarray(chosen.double().cpu().numpy())


class ServerReplica:
    """The policy inside ``vllm serve``: weights travel through a folder that both sides see.

    The server must run with ``VLLM_SERVER_DEV_MODE=1``, which opens the endpoints for this; keep it off public
    networks.

    Args:
        server: the server, as an OpenAIEngine has it.
        folder: written here, read by the server under the same path.
        config: the model's transformers config, which belongs to the weights.
    """

    def __init__(self, server: OpenAIServer, folder: str | Path, config: Any) -> None:
        self.server, self.folder, self.config = server, Path(folder).absolute(), config
        self.root = server.url.removesuffix("/v1")

    def load_weights(self, weights: Mapping[str, Any]) -> None:
        """Write the weights, have the server load them, and forget its prefix cache.

        Raises:
            ServiceError: the server is down, refuses, or does not offer these endpoints.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.config.save_pretrained(self.folder)
        # Clones, because the file format refuses shared storage: tied weights go under both names. vLLM may keep a
        # packed copy of the head on its own, which would stay as it was if only the embedding came.
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}
        save_file(tensors, self.folder / "model.safetensors")
        self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}})
        if self._post("/reset_prefix_cache", {}) != {"success": True}:
            raise ServiceError(f"{self.root}/reset_prefix_cache: the server did not reset its prefix cache")

    def prompt_logprobs(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Log-probabilities of the tokens of each sequence, from its second one on."""
        return self.server.map(self._score, sequences)

    def _score(self, sequence: Sequence[int]) -> list[float]:
        body = {"prompt": list(sequence), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        given = self.server.post("/completions", body).get("prompt_logprobs")
        try:
            places = zip(sequence, given or [], strict=True)
            return [float(place[str(token)]["logprob"]) for token, place in list(places)[1:]]
        except (KeyError, TypeError, ValueError) as error:
            expected = f"prompt_logprobs of the {len(sequence)} tokens sent"
            got = self.server.shown(given)
            raise ServiceError(f"{self.server.url}/completions: expected {expected}, got {got}") from error

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        try:
            return post_json(
                self.root + path, body, timeout_s=self.server.timeout_s, retries=self.server.retries,
                headers=self.server.headers(),
            )  # fmt: skip
        except ServiceError as error:
            hint = "; start it with VLLM_SERVER_DEV_MODE=1" if "404" in str(error) else ""
            raise ServiceError(f"new weights did not reach the server: {error}{hint}") from error


def write_model_config(model: Any, folder: Path) -> None:
    """What vLLM must read of a model whose weights come later: its config and generation config."""
    model.config.save_pretrained(folder)
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings["architectures"] = [type(model).__name__]
    file.write_text(json.dumps(settings), encoding="utf-8")
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
