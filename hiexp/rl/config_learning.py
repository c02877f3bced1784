"""How a policy learns from what it did: settings of the update, of credit and of alarms.

Part of :mod:`hiexp.rl.config`, which says where the sentences go and what the defaults are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from hiexp.rl.config_parse import setting
from hiexp.rl.losses import find_loss

ALARMS = ("kl", "entropy", "degenerate", "mask", "mismatch", "nan_reward")
ImportanceMode = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"]
AdvantagePreset = Literal["verl", "trl", "trl_async", "openrlhf", "slime", "prime_rl", "dr_grpo", "rloo"]


@dataclass(frozen=True, slots=True)
class AlgorithmConfig:
    """The policy update."""

    kind: str = "grpo"
    """Policy loss (paper: grpo; gspo also tried): grpo, dr_grpo, dapo, gspo, cispo, rloo, the name of a registered one,
    or one's own as ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION`` (docs/training_losses.md)."""
    loss_settings: dict[str, float] = field(default_factory=dict)
    """Numbers that a loss of one's own reads, by name."""
    aggregation: Literal["token", "sequence", "constant", "sum"] | None = None
    """How token losses become one number: mean over tokens, mean over rollouts of their token means, sum over tokens /
    (rollouts * most tokens a rollout may sample), or sum over tokens / rollouts; null is the kind's own."""
    lr: float = setting(1e-6, at_least=0.0)
    """Learning rate of AdamW."""
    warmup_steps: int = setting(0, at_least=0)
    """Steps over which the learning rate rises linearly to ``lr``."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the learning rate does after the warmup: stay, or fall along a line or half a cosine."""
    lr_decay_steps: int | None = setting(None, at_least=1)
    """Step at which a falling learning rate arrives and stays; it is no function of ``run.steps``, which may grow."""
    lr_final: float = setting(0.0, at_least=0.0, at_most=1.0)
    """Where it arrives, as a share of ``lr``."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = setting(0.0, at_least=0.0)
    """Decoupled weight decay."""
    clip_low: float | None = setting(None, above=0.0)
    """The importance ratio is clipped below 1 - clip_low; null is the kind's own: 3e-4 for gspo (of a rollout's mean
    ratio), 1, which is no bound, for cispo, 0.2 for the others."""
    clip_high: float | None = setting(None, above=0.0)
    """The importance ratio is clipped above 1 + clip_high; null is the kind's own: 0.28 for dapo, 4e-4 for gspo, 4 for
    cispo, 0.2 for the others. Where ``clip_low`` is given, null is that number, and 0.28 for dapo."""
    importance_cap: float | None = setting(None, above=0.0)
    """Weigh tokens by min(exp(old - engine log-prob), cap), for engines that differ; null is off, 2 is usual."""
    importance_mode: ImportanceMode = "token_truncate"
    """What ``importance_cap`` bounds, by cutting to it or by weight 0 beyond it: the ratio of a token, the product over
    a rollout, or (mask only) the geometric mean over a rollout, from below too; see hiexp/rl/importance.py."""
    old_logprobs: Literal["auto", "trainer", "engine"] = "auto"
    """Denominator of the ratio: the trainer's log-probs before the update, or those the engine sampled with; auto is
    the engine's where rollouts come from older weights and ``importance_cap`` is null; with engine it must be null."""
    kl_coef: float = setting(1e-3, at_least=0.0)
    """Weight of the KL term to the frozen starting model (paper: 1e-3); 0 needs no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL term in the loss (Schulman, http://joschu.net/blog/kl-approx.html). The gradient of k1 is the
    log-prob's, 0 on average over the policy's own samples: in the loss it penalises nothing; k2's is the KL's."""
    kl_target: float | None = setting(None, above=0.0)
    """Adapt ``kl_coef`` so that kl_ref, in nats per trained token, comes to this value; null keeps it fixed."""
    kl_horizon: float = setting(10_000.0, above=0.0)
    """Rollouts over which the adaptive coefficient may change by about a fifth."""
    advantage_preset: AdvantagePreset | None = None
    """Convention of hiexp.group_advantage; null is the kind's own: no division by the standard deviation for dr_grpo,
    leave-one-out for rloo, (r - mean) / (std + 1e-6) with ddof 1 for the others."""
    nan_reward: Literal["raise", "zero"] = "raise"
    """A NaN reward stops the run with the rollout's name, or leaves that rollout out of the update."""
    epochs: int = setting(1, at_least=1)
    """Passes over the rollouts of a step."""
    minibatches: int = setting(1, at_least=1)
    """Optimiser updates per pass."""
    tokens_per_microbatch: int = setting(8192, at_least=1)
    """Most tokens, padding included, per forward and backward pass; no influence on results beyond rounding. Halved
    where memory runs out."""
    max_grad_norm: float = setting(1.0, above=0.0)
    """The gradient is scaled down to this global norm."""

    @property
    def clip_range(self) -> tuple[float, float]:
        """``clip_low`` and ``clip_high`` with the kind's own where they are null."""
        return find_loss(self.kind).clip_range(self.clip_low, self.clip_high)

    def ratio_to_engine(self, stale: bool) -> bool:
        """Whether the ratio is taken to what the engine sampled with; ``stale``: rollouts come from older weights."""
        return self.old_logprobs == "engine" or (self.old_logprobs == "auto" and stale and self.importance_cap is None)

    def means(self, stored: dict[str, Any]) -> dict[str, Any]:
        """``stored`` settings of a run, in these settings' words where both mean the same clip range.

        Runs that began before the kinds had ranges of their own have the numbers in their files.
        """
        low, high = stored.get("clip_low"), stored.get("clip_high")
        if find_loss(self.kind).clip_range(low, high) != self.clip_range:
            return stored
        return {**stored, "clip_low": self.clip_low, "clip_high": self.clip_high}


@dataclass(frozen=True, slots=True)
class CreditConfig:
    """From rewards to advantages: which rollouts are trained on, and how length counts."""

    sampling_rounds: int = setting(1, at_least=1)
    """Rounds of rollouts a step may take to replace groups that the filters below drop, or whose rewards are all equal,
    by those of further questions (DAPO's dynamic sampling); 1 replaces none."""
    filter_std: float | None = setting(None, at_least=0.0)
    """Leave out groups whose rewards deviate by at most this; null leaves out those where all are equal."""
    filter_low: float | None = None
    """Leave out groups whose mean reward is this or less, e.g. 0 for all wrong; null is off."""
    filter_high: float | None = None
    """Leave out groups whose mean reward is this or more, e.g. 1 for all right; null is off."""
    drop_truncated: bool = False
    """Leave rollouts that ran out of tokens or context out of the loss; their rewards still count in their group."""
    overlong_length: int | None = setting(None, at_least=1)
    """Sampled tokens beyond which a rollout pays the whole length penalty; null is the most it can sample."""
    overlong_buffer: int = setting(0, at_least=0)
    """Tokens before ``overlong_length`` over which the penalty rises linearly (DAPO's soft punishment); 0 is off."""
    overlong_penalty: float = setting(1.0, at_least=0.0)
    """The whole length penalty, taken off the reward."""
    kl_in_reward: bool = False
    """Take ``algorithm.kl_coef`` * (the rollout's sum of k1) off its reward instead of adding a KL term to the loss."""


@dataclass(frozen=True, slots=True)
class AlarmConfig:
    """When a step raises an alarm; alarms are printed, kept in alarms.jsonl and shown in the report."""

    stop: tuple[str, ...] = ()
    """Alarms that end the run after a checkpoint: kl, entropy, degenerate, mask, mismatch, nan_reward."""
    kl: float = setting(1.0, above=0.0)
    """kl: kl_ref or approx_kl above this many nats per token."""
    entropy_share: float = setting(0.1, at_least=0.0)
    """entropy: below this share of its mean over the first ``entropy_steps`` steps."""
    entropy_steps: int = setting(5, at_least=1)
    """Steps that say what entropy is normal."""
    degenerate_steps: int = setting(5, at_least=1)
    """degenerate: all groups without reward variance for this many steps in a row."""
    mismatch: float = setting(0.1, above=0.0)
    """mismatch: mean |trainer - engine log-prob| above this many nats."""
    mismatch_share: float = setting(0.1, above=0.0)
    """mismatch: share of tokens whose log-probs differ by more than 0.1 nats above this."""
