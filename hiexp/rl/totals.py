"""Token-weighted means and maxima over the micro-batches of a step, in a form that adds up over micro-batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hiexp.ops._policy_terms import _kl

if TYPE_CHECKING:
    from hiexp.ops.token_logprobs import TokenLogprobs

# Metric of a step -> metric of the loss, a mean over its tokens.
REPORTED = {
    "kl_ref": "kl_ref",
    "approx_kl": "approx_kl",
    "clip_fraction": "clip_fraction",
    "clip_fraction_low": "clip_fraction_low",
    "clip_fraction_high": "clip_fraction_high",
    "entropy": "entropy",
}
# Log-probs further apart than this many nats count as mismatched: the ratio is off by more than a tenth.
MISMATCH_BOUND = 0.1


class Totals:
    """Sums over tokens by metric, how many tokens each is over, and maxima."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.tokens: dict[str, int] = {}
        self.maxima: dict[str, float] = {}

    def add_loss(self, metrics: dict[str, float], *, truncates: bool = False) -> None:
        """Metrics of a PolicyLoss, the ``loss/...`` of a registered one included.

        ``truncates``: the loss cuts the weights of single tokens; other losses report that none was cut.
        """
        tokens = int(metrics["tokens"])
        named = {name: metrics[key] for name, key in REPORTED.items() if key in metrics}
        if truncates:
            named["importance_cut"] = metrics["truncated_fraction"]
        named |= {name: value for name, value in metrics.items() if name.startswith("loss/")}
        for name, value in named.items():
            self._add(name, value * tokens, tokens)

    def add_mismatch(self, trainer: Any, engine: Any) -> None:
        """|trainer - engine log-prob| of (N,) tokens."""
        gaps = (trainer.double() - engine.double()).abs()
        self._add("engine_mismatch", float(gaps.sum()), len(gaps))
        self._add("engine_mismatch_share", float((gaps > MISMATCH_BOUND).sum()), len(gaps))
        self._maximum("engine_mismatch_max", float(gaps.max()) if len(gaps) else 0.0)

    def add_scores(self, scores: TokenLogprobs, reference: Any, engine: Any, estimator: str) -> None:
        """What a loss and :meth:`add_mismatch` would count of (N,) tokens that are not trained."""
        assert scores.entropy is not None
        self._add("entropy", float(scores.entropy.double().sum()), len(engine))
        self.add_mismatch(scores.logprobs, engine)
        if reference is not None:
            self._add("kl_ref", float(_kl(scores.logprobs - reference, estimator)[0].double().sum()), len(engine))

    def add_cut(self, cut: Any) -> None:
        """Which (N,) tokens' importance weights were cut."""
        self._add("importance_cut", float(cut.sum()), len(cut))

    def merge(self, other: Totals) -> None:
        """Add what ``other`` counted."""
        for name, value in other.sums.items():
            self._add(name, value, other.tokens[name])
        for name, value in other.maxima.items():
            self._maximum(name, value)

    def metrics(self) -> dict[str, float]:
        """Means and maxima."""
        return {name: total / max(self.tokens[name], 1) for name, total in self.sums.items()} | self.maxima

    def _add(self, name: str, total: float, tokens: int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.tokens[name] = self.tokens.get(name, 0) + tokens

    def _maximum(self, name: str, value: float) -> None:
        self.maxima[name] = max(self.maxima.get(name, value), value)
