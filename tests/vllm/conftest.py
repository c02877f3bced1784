"""A tiny random Llama over bytes, in plain transformers and in one vLLM engine that all tests share.

Starting vLLM takes most of a minute, so tests that change its weights put them back. Where vLLM is not installed
nothing is collected here: `make vllm-test` makes an environment that has it.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

_found = importlib.util.find_spec("vllm")
if _found is None or _found.origin is None:  # without origin it is a folder that happens to be called so
    collect_ignore_glob = ["test_*.py"]

os.environ.setdefault("OMP_NUM_THREADS", "1")
CONTEXT = 256


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer without merges: any text, 256 + 3 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def make_model(tokenizer):
    """``make_model(seed)``: weights large enough that distributions are far from flat."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, initializer_range=0.4, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip

    def make(seed):
        state = torch.random.get_rng_state()
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
        torch.random.set_rng_state(state)
        return model

    return make


@pytest.fixture(scope="session")
def folder(make_model, tokenizer, tmp_path_factory):
    """The model of seed 0 as ``save_pretrained`` writes it."""
    path = tmp_path_factory.mktemp("tiny-llama")
    make_model(0).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def local(make_model, tokenizer):
    """The transformers engine over the model of seed 0."""
    from hiexp.agent.engine_transformers import TransformersEngine

    return TransformersEngine(make_model(0), tokenizer, context_length=CONTEXT)


@pytest.fixture(scope="session")
def shared_vllm(folder, tokenizer):
    from hiexp.agent.engine_vllm import VllmEngine

    return VllmEngine(str(folder), tokenizer, context_length=CONTEXT, cache_gib=0.0625)


@pytest.fixture
def vllm_engine(shared_vllm, make_model):
    """The vLLM engine with the weights of seed 0 and nothing cached."""
    shared_vllm.reset_cache()
    shared_vllm.weights_changed = False
    yield shared_vllm
    if shared_vllm.weights_changed:
        shared_vllm.load_weights(make_model(0).state_dict())


@pytest.fixture(scope="session")
def miniature(tmp_path_factory):
    """The run in miniature of the trainer's tests, with heads wide enough for vLLM's CPU kernels."""
    import runpy
    from pathlib import Path

    rl = runpy.run_path(str(Path(__file__).parents[1] / "rl" / "conftest.py"))
    return rl["write_run"](tmp_path_factory.mktemp("miniature"), hidden_size=64)
