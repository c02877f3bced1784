"""Tiny policy: cached decoding with holes equals one full pass; it is a real transformers model."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from hiexp.rl.config import ModelConfig
from hiexp.rl.model import load_policy
from hiexp.rl.tiny_policy import TinyConfig, TinyPolicy, make_tokenizer

VOCABULARY = 60


@pytest.fixture(scope="module")
def policy() -> TinyPolicy:
    torch.manual_seed(0)
    return TinyPolicy(
        TinyConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, intermediate_size=48, initializer_range=0.3
        )
    ).eval()


def test_default_size_is_about_a_million():
    n = sum(p.numel() for p in TinyPolicy(TinyConfig(vocab_size=400)).parameters())
    assert 0.6e6 < n < 1.3e6


@pytest.mark.parametrize("seed", range(4))
def test_blocks_with_holes_equal_one_full_pass(policy: TinyPolicy, seed: int):
    """Ragged rows, fed in right-aligned blocks of random sizes with junk in the holes, some dropped half-way."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    rows = [draw(4, VOCABULARY, 24) for _ in range(5)]
    expected = [policy(row[None]).logits[0] for row in rows]
    cache, done = DynamicCache(), torch.zeros(5, dtype=torch.long)
    mask, kept = torch.zeros(5, 0, dtype=torch.long), list(range(5))
    for block in range(7):
        takes = draw(1 if block == 0 else 0, 4, len(kept))
        width = max(1, int(takes.max()))
        ids, real = draw(4, VOCABULARY, len(kept), width), torch.zeros(len(kept), width, dtype=torch.long)
        for i, row in enumerate(kept):
            take = int(takes[i])
            if take:
                ids[i, width - take :] = rows[row][done[i] : done[i] + take]
                real[i, width - take :] = 1
        positions = (done[:, None] + real.cumsum(1) - 1).clamp_min(0)
        mask = torch.cat([mask, real], dim=1)
        logits = policy(ids, mask, positions, cache, use_cache=True).logits
        for i, row in enumerate(kept):
            take = int(takes[i])
            torch.testing.assert_close(
                logits[i, width - take :], expected[row][done[i] : done[i] + take], atol=1e-5, rtol=1e-4
            )
        done = done + takes
        if block == 3:
            index = torch.tensor([4, 0, 2])
            cache.batch_select_indices(index)
            kept, done, mask = index.tolist(), done[index], mask[index]


def test_padding_on_either_side_changes_nothing(policy: TinyPolicy):
    row = torch.randint(4, VOCABULARY, (9,), generator=torch.Generator().manual_seed(1))
    expected = policy(row[None]).logits[0]
    for pad in ((3, 0), (0, 3), (2, 2)):
        ids = torch.nn.functional.pad(row, pad, value=17)[None]
        mask = torch.nn.functional.pad(torch.ones(9, dtype=torch.long), pad)[None]
        logits = policy(ids, mask).logits[0, pad[0] : pad[0] + 9]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_a_token_sees_its_two_predecessors_and_no_successor(policy: TinyPolicy):
    ids = torch.randint(4, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 4] = 5 if ids[0, 4] != 5 else 6
    same = torch.isclose(policy(ids).logits, policy(changed).logits, atol=1e-6).all(-1)[0]
    assert same[:4].all()
    assert not same[4:].any()


def test_last_logits_only(policy: TinyPolicy):
    ids = torch.randint(4, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(policy(ids, logits_to_keep=1).logits, policy(ids).logits[:, -1:])


def test_saved_and_loaded_by_the_auto_classes(policy: TinyPolicy, tmp_path):
    tokenizer = make_tokenizer(["one", "two", "\\boxed{", "}"])
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, loaded_tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.randint(4, VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(4))
    assert torch.equal(loaded(ids).logits, policy(ids).logits)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded_tokenizer("one three } two")["input_ids"] == tokenizer("one three } two")["input_ids"] == [4, 1, 7, 5]


def test_accepted_as_a_policy(policy: TinyPolicy, tmp_path):
    policy.save_pretrained(tmp_path)
    make_tokenizer(["one", "two"]).save_pretrained(tmp_path)
    model, tokenizer = load_policy(ModelConfig(path=str(tmp_path), device="cpu"))
    assert isinstance(model, TinyPolicy)
    assert tokenizer("two")["input_ids"] == [5]


def test_tokenizer_round_trip_and_refusals():
    tokenizer = make_tokenizer(["<think>", "may", "1950", ",", "\\boxed{", "}"])
    text = "<think> may , 1950 \\boxed{ may 1950 }"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    with pytest.raises(ValueError, match=r"vocabulary: .*'two words'"):
        make_tokenizer(["two words"])
    with pytest.raises(ValueError, match="repeated word"):
        make_tokenizer(["a", "a"])
