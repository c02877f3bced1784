"""LoRA (Hu et al. 2021, arXiv:2106.09685) through peft: small trained matrices inside a frozen model.

The reference of the KL term is the same model with the adapter off, so no second copy is held. The adapter's layers sit
inside the base model; scoring, rollouts and packing use that, and never see peft's wrapper. Engines with weights of
their own get a plain model: the adapter is added to copies of the weights, the trained ones are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from hiexp._extras import require
from hiexp.rl.batch import MicroBatch
from hiexp.rl.config import ModelConfig

ADAPTER = "adapter_model.safetensors"


def add_adapter(model: Any, config: ModelConfig, seed: int) -> Any:
    """The PeftModel around ``model``: an adapter of ``config.lora_rank`` in the layers ``config.lora_targets``.

    Raises:
        ImportError: peft is missing. ValueError: no layer has such a name, or it is the LM head's.
    """
    peft = require("peft", "train", "model.lora_rank")
    targets = "all-linear" if config.lora_targets == ("all-linear",) else list(config.lora_targets)
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, target_modules=targets,
        bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        # The first matrices are random; a new run must begin with the same ones whatever happened before.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = peft.get_peft_model(model, settings).eval()
    except ValueError as error:
        raise ValueError(f"model.lora_targets: {error}") from error
    # Scoring reads the head's own matrix: an adapter on it would act in rollouts and never learn.
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if _is_adapted(head) or (_is_adapted(embedding) and head.weight is embedding.weight):
        raise ValueError("model.lora_targets: expected no LM head, nor an embedding that shares its matrix")
    return adapted


def _is_adapted(layer: Any) -> bool:
    return hasattr(layer, "get_delta_weight")


class PlainWeights(Mapping[str, Any]):
    """The state dict of ``model`` with adapters added to the weights, as peft's ``merge_and_unload`` would leave it.

    A model without adapters is given as it is. Sums are made when they are asked for and not kept, so that a reader who
    takes one tensor after the other never holds a second model.
    """

    def __init__(self, model: Any) -> None:
        self._layers = {f"{name}.weight": layer for name, layer in model.named_modules() if _is_adapted(layer)}
        inside = tuple(name.removesuffix("weight") for name in self._layers)
        self._weights: dict[str, Any] = {}
        for name, tensor in model.state_dict().items():
            plain = name.replace(".base_layer.", ".")
            if plain != name or not name.startswith(inside):
                self._weights[plain] = tensor

    @torch.no_grad()
    def __getitem__(self, name: str) -> Any:
        weight = self._weights[name]
        layer = self._layers.get(name)
        return weight if layer is None else (weight + layer.get_delta_weight("default")).to(weight.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def write_adapter(adapted: Any, weights: dict[str, Any], folder: Path, *, merged: bool) -> None:
    """``model/`` with the adapter alone and, where asked for, ``merged/``, a plain model with the adapter added in.

    ``weights``: the trained ones, whole, named as in the base model.
    """
    named = {f"base_model.model.{name}": weight for name, weight in weights.items()}
    adapted.save_pretrained(folder / "model", state_dict=named)
    if merged:
        base = adapted.get_base_model()
        plain = type(base).from_pretrained(base.name_or_path, dtype=base.dtype)
        peft = require("peft", "train", "model.lora_rank")
        peft.PeftModel.from_pretrained(plain, folder / "model").merge_and_unload().save_pretrained(folder / "merged")


def read_adapter(folder: Path) -> dict[str, Any]:
    """Weights of an adapter by their names in the base model."""
    from safetensors.torch import load_file

    # Files leave out the adapter's name, "default".
    return {
        name.removeprefix("base_model.model.").removesuffix(".weight") + ".default.weight": weight
        for name, weight in load_file(folder / ADAPTER).items()
    }


class BaseScorer:
    """The reference policy of an adapted one: its scorer with the adapter switched off."""

    def __init__(self, scorer: Any, adapted: Any) -> None:
        self._scorer, self._adapted = scorer, adapted

    def __call__(self, batch: MicroBatch) -> Any:
        """TokenLogprobs of the batch's trained tokens."""
        with self._adapted.disable_adapter():
            return self._scorer(batch)
