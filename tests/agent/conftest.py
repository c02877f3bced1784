"""Tiny models, a word tokenizer and a scripted engine for the agent's tests."""

from __future__ import annotations

import json
import re
import unicodedata
from types import SimpleNamespace

import pytest

from hiexp.agent.engine import EngineError, EngineMemoryError, Generation
from hiexp.agent.protocol import COMPACT_TAGS, COMPACT_WORDS
from hiexp.agent.tools import Document

WORDS = [f"w{i}" for i in range(40)]
DOCUMENTS = (Document("d1", "W1", "w1 w2 w3"), Document("d2", "W4", "w4 w5"))


class WordTokenizer:
    """Hugging Face's interface over a closed vocabulary of words; ids are places in the list."""

    bos_token_id = None
    chat_template = None
    all_special_tokens = ("<eos>", "<unk>")
    eos_token_id = 0

    def __init__(self):
        self.words = ["<eos>", "<unk>", *COMPACT_TAGS, *COMPACT_WORDS, "look", "for", ",", "not", *WORDS]
        self._ids = {word: i for i, word in enumerate(self.words)}

    def __len__(self):
        return len(self.words)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self._ids.get(word, 1) for word in text.split()]}

    def decode(self, ids, **_):
        return " ".join(self.words[i] for i in ids)


class ByteTokenizer:
    """Hugging Face's interface over bytes, with tags and chat tokens that are one token each wherever they stand.

    Like real fast tokenizers it finds those tokens in any text that it is given, and it folds compatibility forms.
    """

    bos_token_id, eos_token_id, chat_template = None, 256, None
    all_special_tokens = ("<|im_end|>", "<|im_start|>", "</s>")

    def __init__(self, tags=()):
        self.added = [*self.all_special_tokens, *tags]
        self._pattern = re.compile("|".join(map(re.escape, sorted(self.added, key=len, reverse=True))))

    def __len__(self):
        return 256 + len(self.added)

    def get_added_vocab(self):
        return {token: 256 + i for i, token in enumerate(self.added)}

    def __call__(self, text, add_special_tokens=True):
        text, ids, place = unicodedata.normalize("NFKC", text), [], 0
        for match in self._pattern.finditer(text):
            ids += [*text[place : match.start()].encode(), 256 + self.added.index(match[0])]
            place = match.end()
        return {"input_ids": [*ids, *text[place:].encode()]}

    def decode(self, ids, **_):
        data = b"".join(bytes([i]) if i < 256 else self.added[i - 256].encode() for i in ids)
        return data.decode("utf-8", "replace")


class ScriptedEngine:
    """Says given token ids: ``script[row]`` is a list of turns; a turn longer than its limit is cut.

    ``order`` chooses which of the turns under way end together: a function from their number to how many. ``dies``:
    calls of ``finished`` that raise EngineError instead, counted from 0 over the engine's life. ``room``: turns under
    way beyond which memory runs out.
    """

    def __init__(self, tokenizer, script, context_length=400, order=lambda count: count, dies=(), room=999):
        self.tokenizer, self.script, self.context_length = tokenizer, script, context_length
        self.order, self.dies, self.room = order, set(dies), room
        self.prompts, self.extended, self.opened, self.asked = [], [], [], 0
        self.released, self.most = set(), 0

    def open(self, prompts, seeds, drawn=None):
        self.prompts = [list(prompt) for prompt in prompts]
        self.rows = [list(prompt) for prompt in prompts]
        self.opened.append(([list(prompt) for prompt in prompts], list(seeds), drawn))
        self.turns, self.queue, self.released = [0] * len(prompts), [], set()
        return self

    def start(self, rows, max_new_tokens, stop, sampling):
        busy = {row for row, _ in self.queue} | self.released
        assert len(set(rows)) == len(rows)
        assert not busy & set(rows)
        self.queue += zip(rows, max_new_tokens, strict=True)
        self.most = max(self.most, len(self.queue))

    def finished(self, block=True):
        self.asked += 1
        if self.asked - 1 in self.dies:
            raise EngineError("the engine died")
        if len(self.queue) > self.room:
            raise EngineMemoryError(f"out of memory with {len(self.queue)} rows")
        count = max(1, self.order(len(self.queue)))
        ended, self.queue = self.queue[:count], self.queue[count:]
        return [(row, self._turn(row, limit)) for row, limit in ended]

    def release(self, rows):
        self.released |= set(rows)
        self.queue = [item for item in self.queue if item[0] not in self.released]

    def _turn(self, row, limit):
        turns = self.script[row % len(self.script)]
        said = turns[self.turns[row] % len(turns)] if turns else []
        self.turns[row] += 1
        reason = "length" if len(said) > limit else ("eos" if said[-1:] == [0] else "stop")
        said = said[: max(limit, 0)]
        self.rows[row] += said
        return Generation(list(said), [-0.5] * len(said), reason)

    def extend(self, rows, token_ids):
        for row, ids in zip(rows, token_ids, strict=True):
            self.rows[row] += ids
            self.extended.append((row, list(ids)))


class ListTool:
    """Returns the same documents for every query and remembers the queries."""

    name = "list"

    def __init__(self, documents=DOCUMENTS):
        self.documents, self.queries = list(documents), []

    def search(self, queries, top_k):
        self.queries += queries
        return [self.documents[:top_k] for _ in queries]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models here are far too small for two threads to pay; on a busy machine two are many times slower."""
    try:
        import torch
    except ImportError:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def word_tokenizer():
    return WordTokenizer()


@pytest.fixture(scope="session")
def fakes():
    return SimpleNamespace(ScriptedEngine=ScriptedEngine, ByteTokenizer=ByteTokenizer, ListTool=ListTool, WORDS=WORDS)


@pytest.fixture(scope="session")
def fast_tokenizer():
    """The same vocabulary as a real tokenizer of transformers."""
    tiny_policy = pytest.importorskip("hiexp.rl.tiny_policy", reason="torch and transformers are not installed")
    return tiny_policy.make_tokenizer([*COMPACT_TAGS, *COMPACT_WORDS, *WORDS])


@pytest.fixture(scope="session")
def tiny_models(fast_tokenizer):
    """Random float32 models by name; weights large enough that distributions are far from flat."""
    torch = pytest.importorskip("torch")
    import transformers

    from hiexp.rl.tiny_policy import TinyConfig, TinyPolicy

    size = {
        "vocab_size": len(fast_tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, "initializer_range": 0.4, "eos_token_id": 3,
        "bos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    shared = {**size, "num_key_value_heads": 2}
    torch.manual_seed(0)
    windowed = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    return {
        "mistral": transformers.MistralForCausalLM(transformers.MistralConfig(**shared, sliding_window=7)).eval(),
        "qwen2-windowed": transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shared, **windowed)).eval(),
        "llama": transformers.LlamaForCausalLM(transformers.LlamaConfig(**shared)).eval(),
        "qwen2": transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shared)).eval(),
        "tiny": TinyPolicy(TinyConfig(**size)).eval(),
    }


@pytest.fixture
def given(tmp_path, tiny_models, fast_tokenizer, monkeypatch):
    """Flags of a model, five questions and a corpus."""
    monkeypatch.setenv("HIEXP_CACHE", str(tmp_path / "cache"))
    tiny_models["tiny"].save_pretrained(tmp_path / "model")
    fast_tokenizer.save_pretrained(tmp_path / "model")
    questions = [{"id": f"q{i}", "question": f"w{i} w{i + 1}", "golden_answers": [f"w{i}"]} for i in range(5)]
    passages = [{"id": f"d{i}", "title": f"w{i}", "text": f"w{i} w{i + 2}"} for i in range(9)]
    for name, rows in (("q.jsonl", questions), ("c.jsonl", passages)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [
        "--model", tmp_path / "model", "--questions", tmp_path / "q.jsonl", "--corpus", tmp_path / "c.jsonl",
        "--dialect", "hiexp_compact", "--set", "rollout.max_new_tokens=8", "--set", "rollout.max_total_tokens=60",
        "--set", "model.device=cpu",
    ]  # fmt: skip
