"""Sentence encoders: text in, unit vectors out; the id says exactly which one made a vector.

A HEK stores vectors of one encoder only, because similarities of two encoders share no scale (multilingual-e5 puts
almost every pair above 0.7, the hashing encoder puts unrelated pairs near 0). ``HashingEncoder`` needs numpy alone and
is the default; ``SentenceTransformerEncoder`` wraps any sentence-transformers model (the paper uses
multilingual-e5-base).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from hiexp._extras import require

_WORD = re.compile(r"[^\W_]+")
# Words that carry the grammar of a question, not its subject; they keep a little weight so that "who" and "when"
# differ.
_FUNCTION_WORDS = frozenset(
    _WORD.findall(
        """
        a an and are as at be been but by did do does for from had has have he her his how if in into is it
        its more most of on or she so than that the their them then there they this to was we were what when
        where which who whom whose why will with would you
        """
    )
)
_FUNCTION_WEIGHT = 0.25
_BIGRAM_WEIGHT = 0.5
_GRAM_WEIGHT = 0.7  # of all character trigrams of one word together, so that inflected forms stay close
_CHUNK_ROWS = 4096  # bounds the float64 accumulator at _CHUNK_ROWS * dim * 8 bytes


@runtime_checkable
class Encoder(Protocol):
    """What the HEK needs of an encoder.

    Attributes:
        id: name, dimension and version; equal ids promise equal vectors.
        spec: what :func:`make_encoder` rebuilds it from; empty where only the caller can.
        dim: length d of a vector.
    """

    @property
    def id(self) -> str: ...
    @property
    def spec(self) -> str: ...
    @property
    def dim(self) -> int: ...
    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode n texts as an (n, d) float32 array of unit rows; a row depends on its own text alone."""
        ...


class HashingEncoder:
    """Signed feature hashing of words, word pairs and character trigrams: no model, the same in every process.

    Args:
        dim: length of a vector, 16 to 65536. Fewer than about 256 makes unrelated texts collide.
    """

    def __init__(self, dim: int = 512) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or not 16 <= dim <= 65536:
            raise ValueError(f"dim: expected an integer from 16 to 65536, got {dim!r}")
        self.dim = dim
        self.spec = f"hashing:{dim}"
        self.id = f"hashing-v1-d{dim}"

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode n texts as an (n, d) float32 array of unit rows."""
        texts = _check_texts(texts)
        vocabulary: dict[str, int] = {}
        words = [np.array([vocabulary.setdefault(w, len(vocabulary)) for w in _words(text)]) for text in texts]
        features = _word_features(vocabulary)
        vectors = np.empty((len(texts), self.dim), np.float32)
        for start in range(0, len(texts), _CHUNK_ROWS):
            chunk = words[start : start + _CHUNK_ROWS]
            vectors[start : start + len(chunk)] = self._encode_chunk(chunk, features)
        return vectors

    def _encode_chunk(self, texts: Sequence[NDArray[np.int64]], features: _WordFeatures) -> NDArray[np.float64]:
        words = np.concatenate(texts)  # every word of the chunk, in order
        rows = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
        # Each word stands for counts[word] features: expand ragged ranges without a Python loop.
        repeat = features.counts[words]
        offsets = np.arange(repeat.sum()) - np.repeat(np.cumsum(repeat) - repeat, repeat)
        picked = np.repeat(features.starts[words], repeat) + offsets
        pair = rows[1:] == rows[:-1]
        left, right = features.words[words[:-1]][pair], features.words[words[1:]][pair]
        pair_hash = _mix(left * np.uint64(0x9E3779B97F4A7C15) + right)
        all_hashes = np.concatenate([features.hashes[picked], pair_hash])
        all_rows = np.concatenate([np.repeat(rows, repeat), rows[1:][pair]])
        values = np.concatenate([features.values[picked], np.full(len(pair_hash), _BIGRAM_WEIGHT)])

        signs = np.where(all_hashes >> np.uint64(63), -1.0, 1.0)
        columns = (all_hashes % np.uint64(self.dim)).astype(np.int64)
        flat = np.bincount(all_rows * self.dim + columns, values * signs, minlength=len(texts) * self.dim)
        vectors = flat.reshape(len(texts), self.dim)  # (rows, d)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        # Features can cancel only by a hash collision; such a row becomes a basis vector so that every row is a unit
        # row.
        cancelled = norms[:, 0] < 1e-9
        vectors[cancelled] = np.eye(1, self.dim)
        return np.asarray(vectors / np.where(cancelled[:, None], 1.0, norms))


def _words(text: str) -> list[str]:
    folded = unicodedata.normalize("NFKC", text).casefold()
    # A text of signs only is its own single word, so that "?" and "!" differ and no row is empty.
    return _WORD.findall(folded) or [folded]


class _WordFeatures(NamedTuple):
    """Features of V words: word v owns the ``counts[v]`` hashes, and values, that begin at ``starts[v]``."""

    words: NDArray[np.uint64]  # (V,) hash of the word itself
    counts: NDArray[np.int64]  # (V,)
    starts: NDArray[np.int64]  # (V,)
    hashes: NDArray[np.uint64]
    values: NDArray[np.float64]


def _word_features(vocabulary: Iterable[str]) -> _WordFeatures:
    hashes: list[int] = []
    values: list[float] = []
    counts: list[int] = []
    for word in vocabulary:
        padded = f"<{word}>"
        grams = [padded[i : i + 3] for i in range(len(padded) - 2)] if len(word) > 1 else []
        weight = _FUNCTION_WEIGHT if word in _FUNCTION_WORDS else 1.0
        hashes.extend([_hash("w:" + word), *(_hash("g:" + gram) for gram in grams)])
        # Squares add up to (weight * _GRAM_WEIGHT)²: a long word is not louder than a short one.
        values.extend([weight, *[weight * _GRAM_WEIGHT / max(1, len(grams)) ** 0.5] * len(grams)])
        counts.append(1 + len(grams))
    count_array, hash_array = np.array(counts, np.int64), np.array(hashes, np.uint64)
    starts = np.cumsum(count_array) - count_array
    return _WordFeatures(hash_array[starts], count_array, starts, hash_array, np.array(values, np.float64))


def _hash(token: str) -> int:
    return int.from_bytes(hashlib.blake2b(token.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of splitmix64: spreads a sum of two hashes over all bits (wrap-around is meant)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SentenceTransformerEncoder:
    """A sentence-transformers model, frozen, on the CPU unless ``device`` says otherwise; loaded on construction.

    Args:
        name_or_path: local folder (no network is touched) or a hub name.
        prefix: put before every text, e.g. ``"query: "`` for the E5 family.
        device: torch device name; None lets sentence-transformers choose.

    The id holds a fingerprint of the weights instead of the path, so a model is the same encoder on every machine.
    """

    def __init__(self, name_or_path: str, prefix: str = "", device: str | None = "cpu") -> None:
        sentence_transformers = require("sentence_transformers", "train", "SentenceTransformerEncoder")
        local = Path(name_or_path).is_dir()
        if not local and (name_or_path.startswith((".", "/", "~")) or not name_or_path.strip()):
            raise ValueError(f"encoder: no such model folder: {name_or_path!r}")
        self._model: Any = sentence_transformers.SentenceTransformer(
            name_or_path, device=device, local_files_only=local
        )
        self._prefix = prefix
        self.dim = int(self._model.get_embedding_dimension())
        self.spec = f"st:{name_or_path}" + (f"?prefix={prefix}" if prefix else "")
        self.id = f"st-{_weights_fingerprint(self._model)}-d{self.dim}" + (f"-{prefix.strip()}" if prefix else "")

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Encode n texts as an (n, d) float32 array of unit rows."""
        texts = _check_texts(texts)
        if not texts:
            return np.empty((0, self.dim), np.float32)
        vectors = self._model.encode(
            [self._prefix + text for text in texts],
            convert_to_numpy=True,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        return np.ascontiguousarray(vectors, dtype=np.float32)


def _weights_fingerprint(model: Any) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(np.ascontiguousarray(tensor.detach().float().cpu().numpy()).data)
    return digest.hexdigest()


def make_encoder(spec: str | Encoder, *, device: str = "cpu") -> Encoder:
    """Build an encoder from its spec; an encoder is passed through.

    Args:
        spec: ``"hashing"``, ``"hashing:DIM"`` or ``"st:FOLDER_OR_NAME"``, the last with ``?prefix=TEXT`` where the
            model wants one.
        device: torch device of an ``st:`` model.

    Raises:
        ValueError: an unknown spec. ImportError: ``st:`` without sentence-transformers.
    """
    if not isinstance(spec, str):
        if isinstance(spec, Encoder):
            return spec
        raise TypeError(
            f"encoder: expected a spec or an object with id, spec, dim and encode(), got {type(spec).__name__}"
        )
    kind, _, rest = spec.partition(":")
    if kind == "hashing" and (not rest or rest.isdecimal()):
        return HashingEncoder(int(rest)) if rest else HashingEncoder()
    if kind == "st" and rest:
        name, _, prefix = rest.partition("?prefix=")
        return SentenceTransformerEncoder(name, prefix, device)
    raise ValueError(f"encoder: expected 'hashing', 'hashing:DIM' or 'st:FOLDER_OR_NAME', got {spec!r}")


def _check_texts(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str):
        raise TypeError("texts: expected a sequence of strings, got one string")
    texts = list(texts)
    for position, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{position}]: expected a string, got {type(text).__name__}")
    return texts
