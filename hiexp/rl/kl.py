"""The KL coefficient: fixed, or adapted to a target (Ziegler et al. 2019, arXiv:1909.08593).

    e = clip((KL - target) / target, -0.2, 0.2),      coefficient <- coefficient * (1 + e * n / horizon)

n rollouts after the last change. The error e is section 2.2's; the gain there is a constant 0.1 a step, n / horizon is
that of the code released with the paper (openai/lm-human-preferences). KL is ``kl_ref``, the estimate per trained token
(theirs is per sequence), so the target does not depend on lengths.
"""

from __future__ import annotations

from typing import Any

_MOST = 0.2


class KLController:
    """Holds the coefficient; its state belongs into a checkpoint.

    Args:
        coefficient: the first value.
        target: nats per trained token; None keeps the coefficient.
        horizon: rollouts.
    """

    def __init__(self, coefficient: float, target: float | None = None, horizon: float = 10_000.0) -> None:
        self.coefficient, self.target, self.horizon = coefficient, target, horizon

    def update(self, kl: float | None, rollouts: int) -> None:
        """Take note of the ``kl`` measured over ``rollouts`` rollouts; None where nothing was trained."""
        if self.target is None or kl is None:
            return
        error = min(max((kl - self.target) / self.target, -_MOST), _MOST)
        # More rollouts than the horizon may change it by no more than the bounded error.
        self.coefficient *= 1.0 + error * min(rollouts / self.horizon, 1.0)

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` continues from."""
        return {"coefficient": self.coefficient}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; with a fixed coefficient the config's value stays."""
        if self.target is not None:
            self.coefficient = float(state["coefficient"])
