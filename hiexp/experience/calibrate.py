"""Similarity thresholds that fit an encoder: quantiles over random pairs of titles, stored with the HEK.

A fixed cosine means nothing across encoders (E5 puts most pairs between 0.7 and 1.0), so every threshold here is
"closer than this share of random pairs". The quantiles are this library's defaults, settable, and not the paper's: it
states a cosine of 0.8 for its own encoder and no clustering threshold.

E1 entries are looked up with search queries, which are shorter than the questions that are titles and so less similar
to any title. Where queries are known, the E1 threshold comes from pairs of a query and a title of another question.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from hiexp.experience.encoder import Encoder
from hiexp.experience.guard import text_key

E1_QUANTILE = 0.99  # an E1 entry is served if it is closer to the query than 99% of random pairs are to each other
# Quantiles of pair distances below which clusters merge. Ward's heights grow with the clusters, so the exact value
# matters little: on miniworld the clusters were 0.8 to 0.9 pure for any E2 quantile from 0.01 to 0.2, but at 0.01 half
# of the lessons stayed alone.
CLUSTER_QUANTILES: Mapping[str, float] = {"E2": 0.05, "E3": 0.2}
# Bounds for corpora that are all duplicates (threshold 1 would serve nothing) or all unrelated.
E1_BOUNDS = (0.1, 0.95)
MIN_TEXTS = 50  # distinct titles before a store's own titles replace the built-in reference
_N_PAIRS = 20_000
_GRID = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class Calibration:
    """Thresholds and the distribution they came from.

    Attributes:
        encoder_id: whose similarities these are. dim: length of its vectors.
        source: ``reference`` (built-in questions), ``texts`` (given by the caller) or ``titles`` (the store's own).
        n_texts: distinct texts. n_pairs: random pairs drawn from them.
        similarity: quantile (as text) -> cosine similarity of random pairs.
        thresholds: ``E1``: cosine at and above which an E1 entry is served. ``E2``, ``E3``: Ward height below which E1
            (E2) entries merge; unit: euclidean distance between unit vectors, 0 to 2 for two single entries.
        n_queries: distinct search queries behind the E1 threshold; 0: it comes from pairs of titles.
    """

    encoder_id: str
    dim: int
    source: str
    n_texts: int
    n_pairs: int
    similarity: dict[str, float]
    thresholds: dict[str, float]
    n_queries: int = 0

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dict; :meth:`from_json` is its inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, row: Any) -> Calibration:
        """Rebuild a calibration from :meth:`to_json`. ValueError: keys or thresholds that are missing or unusable."""
        names = [one.name for one in fields(cls)]
        needed = {one.name for one in fields(cls) if one.default is MISSING}  # older files lack what came later
        if not isinstance(row, dict) or not needed <= set(row) <= set(names):
            raise ValueError(f"calibration: expected an object with the keys {', '.join(names)}; got {row!r:.80}")
        thresholds = row["thresholds"]
        for level in ("E1", "E2", "E3"):
            value = thresholds.get(level) if isinstance(thresholds, dict) else None
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"calibration: thresholds[{level!r}]: expected a finite number, got {value!r}")
        return cls(**row)


def calibrate(
    encoder: Encoder,
    texts: Sequence[str] | None = None,
    *,
    source: str = "texts",
    e1_quantile: float = E1_QUANTILE,
    cluster_quantiles: Mapping[str, float] = CLUSTER_QUANTILES,
    seed: int = 0,
) -> Calibration:
    """Derive the thresholds of ``encoder`` from up to 20,000 random pairs of distinct ``texts``.

    Args:
        texts: titles of the domain; None takes the built-in reference questions, which tell what the encoder says about
            unrelated texts but nothing about the domain.
        e1_quantile: share of random pairs that must be less similar than a served E1 entry.
        cluster_quantiles: per level, the quantile of pair distances that is the Ward threshold.

    Raises:
        ValueError: fewer than two distinct texts, or a quantile outside [0, 1].
    """
    for name, quantile in {"e1_quantile": e1_quantile, **cluster_quantiles}.items():
        if not 0.0 <= quantile <= 1.0:
            raise ValueError(f"{name}: expected a quantile from 0 to 1, got {quantile!r}")
    if texts is None:
        texts, source = REFERENCE_QUESTIONS, "reference"
    distinct = sorted(set(texts))
    n = len(distinct)
    if n < 2:
        raise ValueError(f"calibrate: expected at least two distinct texts, got {n}")
    # Encode only what the pairs can touch: two texts a pair at most.
    rng = np.random.Generator(np.random.Philox(seed))
    n_pairs = min(_N_PAIRS, n * (n - 1) // 2)
    left, right = _pairs(rng, n, n_pairs)
    used, inverse = np.unique(np.concatenate([left, right]), return_inverse=True)
    vectors = encoder.encode([distinct[i] for i in used]).astype(np.float64)
    similarity = np.einsum("ij,ij->i", vectors[inverse[:n_pairs]], vectors[inverse[n_pairs:]])
    distance = np.sqrt(np.maximum(0.0, 2.0 - 2.0 * similarity))  # between unit vectors
    thresholds = {"E1": float(np.clip(np.quantile(similarity, e1_quantile), *E1_BOUNDS))}
    thresholds |= {level: float(np.quantile(distance, q)) for level, q in cluster_quantiles.items()}
    return Calibration(
        encoder_id=encoder.id,
        dim=encoder.dim,
        source=source,
        n_texts=n,
        n_pairs=n_pairs,
        # Six decimals: enough for a cosine, and equal on every BLAS.
        similarity={str(q): round(float(np.quantile(similarity, q)), 6) for q in _GRID},
        thresholds={level: round(value, 6) for level, value in thresholds.items()},
    )


def calibrate_search(
    calibration: Calibration,
    encoder: Encoder,
    titles: Sequence[str],
    asked: Iterable[tuple[str, str]],
    *,
    e1_quantile: float = E1_QUANTILE,
    seed: int = 0,
) -> Calibration:
    """``calibration`` with the E1 threshold taken from 20,000 random pairs of a query and another question's title.

    Args:
        titles: E1 titles (questions, as a rule).
        asked: (question, query) for each search; a title that is the question itself, but for spelling, makes no pair.
        e1_quantile: share of those pairs that must be less similar than a served E1 entry.

    Returns:
        The calibration unchanged where there are fewer than 50 distinct queries or titles: too few to say anything.

    Raises:
        ValueError: a quantile outside [0, 1], or another encoder than the calibration's.
    """
    if not 0.0 <= e1_quantile <= 1.0:
        raise ValueError(f"e1_quantile: expected a quantile from 0 to 1, got {e1_quantile!r}")
    if encoder.id != calibration.encoder_id:
        raise ValueError(f"encoder: expected {calibration.encoder_id!r}, which was calibrated, got {encoder.id!r}")
    distinct = sorted({(text_key(question), query) for question, query in asked if query.strip()})
    rows = sorted(set(titles))
    n_queries = len({query for _, query in distinct})
    if min(n_queries, len(rows)) < MIN_TEXTS:
        return calibration
    rng = np.random.Generator(np.random.Philox(seed))
    left, right = rng.integers(0, len(distinct), _N_PAIRS), rng.integers(0, len(rows), _N_PAIRS)
    keys = [text_key(title) for title in rows]
    other = np.array([distinct[i][0] != keys[j] for i, j in zip(left, right, strict=True)])
    if not other.any():
        return calibration
    queries = encoder.encode([query for _, query in distinct])[left[other]].astype(np.float64)
    similarity = np.einsum("ij,ij->i", queries, encoder.encode(rows)[right[other]].astype(np.float64))
    threshold = float(np.clip(np.quantile(similarity, e1_quantile), *E1_BOUNDS))
    thresholds = {**calibration.thresholds, "E1": round(threshold, 6)}
    return replace(calibration, thresholds=thresholds, n_queries=n_queries)


def _pairs(rng: np.random.Generator, n: int, n_pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """``n_pairs`` pairs i != j of 0..n-1: all of them where they are few, random ones otherwise."""
    if n_pairs == n * (n - 1) // 2:
        left, right = np.triu_indices(n, 1)
        return left, right
    left = rng.integers(0, n, n_pairs)
    right = (left + rng.integers(1, n, n_pairs)) % n
    return left, right


# Unrelated questions of everyday and encyclopaedic kinds: the distribution of an encoder before any domain is known.
REFERENCE_QUESTIONS: tuple[str, ...] = (
    "What year did the author of the novel win the national prize?",
    "Who directed the film that premiered at the festival in Venice?",
    "Which river flows through the capital of Hungary?",
    "How many students attend the university founded by the railway owner?",
    "When was the bridge across the strait opened to traffic?",
    "Are both of these flowering plants native to South America?",
    "What is the population of the town where the painter was born?",
    "Which of the two magazines was published first?",
    "Who composed the music for the ballet about the firebird?",
    "What nationality was the inventor of the pressure cooker?",
    "In which county is the medieval castle with the round tower?",
    "Which football club did the goalkeeper join after leaving Madrid?",
    "What is the largest moon of the planet discovered in 1781?",
    "Who was the wife of the general that lost the battle?",
    "Which company acquired the maker of the video game?",
    "How high is the mountain on the border of Nepal?",
    "What language is spoken by the people of the northern islands?",
    "When did the second season of the television drama begin?",
    "Which singer recorded the duet that topped the charts?",
    "What does the chemical symbol Na stand for?",
    "Find the sum of all positive integers less than fifty divisible by seven.",
    "Who is the current president of the chess federation?",
    "Which airport serves the city known for its carnival?",
    "What breed of dog was used to guard monasteries in the Alps?",
    "In what battle was the admiral wounded?",
    "Which enzyme breaks down starch in saliva?",
    "What is the name of the band's third studio album?",
    "Who succeeded the chancellor after the election?",
    "Where was the treaty that ended the war signed?",
    "What position did the basketball player hold in college?",
    "Which actress voiced the princess in the animated movie?",
    "How long is the tunnel beneath the channel?",
    "What is the middle name of the astronaut's brother?",
    "Which newspaper first reported the scandal?",
    "If a train leaves at noon at sixty kilometres per hour, when does it arrive?",
    "Who designed the opera house in the harbour?",
    "Which beer brand is brewed in the oldest brewery?",
    "What are the two official languages of the republic?",
    "When was the patent for the telephone granted?",
    "Which school did the senator's mother attend?",
)
