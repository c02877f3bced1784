"""Alarms: what in the metrics of a step says that a run goes wrong, in one sentence with the bound and what to do.

An alarm is raised in the step in which its condition begins to hold, and not again before it has ended. It is a
function of the rows of metrics.jsonl alone, so a resumed run raises the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hiexp.io import append_lines, atomic_write, read_jsonl
from hiexp.rl.config import AlarmConfig, TrainConfig

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Alarm:
    """``name`` is one of :data:`hiexp.rl.config.ALARMS`."""

    step: int
    name: str
    message: str


class AlarmError(RuntimeError):
    """An alarm of ``alarms.stop`` ended the run, after a checkpoint; the same command continues it."""

    def __init__(self, alarms: Sequence[Alarm]) -> None:
        super().__init__(
            f"step {alarms[0].step}: stopped by alarm (alarms.stop): {' / '.join(alarm.message for alarm in alarms)}. "
            "A checkpoint was written; the same command continues"
        )
        self.alarms = list(alarms)


def blind(config: TrainConfig) -> list[str]:
    """A sentence for each alarm that has nothing to look at under ``config`` and so can never ring."""
    algorithm, stale = config.algorithm, config.rollout.staleness > 0
    found = []
    single = algorithm.epochs * algorithm.minibatches == 1
    if algorithm.kl_coef == 0 and single and not algorithm.ratio_to_engine(stale):
        found.append(
            "alarm kl has nothing to look at: algorithm.kl_coef is 0, so there is no reference model, and with one "
            "update a step the policy is the one that acted"
        )
    if stale:
        found.append(
            "alarm mismatch has nothing to look at once rollouts are stale (rollout.staleness > 0): their log-probs "
            "differ because the weights do"
        )
    return found


def raised(rows: Sequence[Row], config: AlarmConfig) -> list[Alarm]:
    """The alarms that begin with the last of ``rows``."""
    if not rows:
        return []
    now, before = _holding(rows, config), _holding(rows[:-1], config) if len(rows) > 1 else {}
    return [Alarm(rows[-1]["step"], name, message) for name, message in now.items() if name not in before]


def _holding(rows: Sequence[Row], config: AlarmConfig) -> dict[str, str]:
    """Name -> message of the conditions that hold in the last of ``rows``."""
    found = {
        "kl": _kl(rows[-1], config),
        "entropy": _entropy(rows, config),
        "degenerate": _degenerate(rows, config),
        "mask": _mask(rows[-1]),
        "mismatch": _mismatch(rows[-1], config),
        "nan_reward": _nan_reward(rows[-1]),
    }
    return {name: message for name, message in found.items() if message is not None}


def _kl(row: Row, config: AlarmConfig) -> str | None:
    for key, to in (("kl_ref", "the starting model"), ("approx_kl", "the policy that acted")):
        if _number(row, key) > config.kl:
            return (
                f"KL explosion: {row[key]:.3g} nats per token from {to} ({key}), bound {config.kl:g} (alarms.kl). "
                "Lower algorithm.lr, raise algorithm.kl_coef, or go back to an earlier checkpoint"
            )
    return None


def _entropy(rows: Sequence[Row], config: AlarmConfig) -> str | None:
    known = [row["entropy"] for row in rows[: config.entropy_steps] if row.get("entropy") is not None]
    if len(rows) <= config.entropy_steps or not known or rows[-1].get("entropy") is None:
        return None
    normal = sum(known) / len(known)
    bound = config.entropy_share * normal
    if rows[-1]["entropy"] >= bound:
        return None
    return (
        f"entropy collapse: {rows[-1]['entropy']:.3g} nats per token, bound {bound:.3g}, which is "
        f"{config.entropy_share:g} of the first steps' {normal:.3g} (alarms.entropy_share). Groups will hardly "
        "differ any more: raise algorithm.clip_high or rollout.temperature, or lower algorithm.lr"
    )


def _degenerate(rows: Sequence[Row], config: AlarmConfig) -> str | None:
    last = rows[-config.degenerate_steps :]
    if len(last) < config.degenerate_steps or any(row.get("zero_variance_share") != 1 for row in last):
        return None
    reward = _number(rows[-1], "reward_mean")
    return (
        f"all groups degenerate: for {config.degenerate_steps} steps (alarms.degenerate_steps) no group had rewards "
        f"that differ (mean reward {reward:.3g}), so nothing is learnt. Take {'easier' if reward < 0.5 else 'harder'} "
        "questions, a larger rollout.group_size, or a finer task.metric"
    )


def _mask(row: Row) -> str | None:
    if row.get("response_tokens") == 0:
        return (
            "mask covers everything: no rollout has a sampled token. The engine generates nothing, or prompts fill "
            "rollout.max_total_tokens"
        )
    if "trained_tokens" not in row or row["trained_tokens"] or row.get("zero_variance_share") in (None, 1):
        return None
    return (
        f"mask covers everything: {1 - row['zero_variance_share']:.0%} of the groups differ in reward, but no token is "
        "trained. Filters of credit.*, drop_truncated or the loss mask leave nothing"
    )


def _mismatch(row: Row, config: AlarmConfig) -> str | None:
    # Log-probs of rollouts from older weights differ because the weights do.
    if _number(row, "staleness") > 0:
        return None
    advice = (
        "Check that the engine got the last weights and that dtype, temperature and top_p agree; "
        "algorithm.importance_cap bounds the damage"
    )
    if _number(row, "engine_mismatch") > config.mismatch:
        return (
            f"engine/trainer mismatch: log-probs differ by {row['engine_mismatch']:.3g} nats on average, bound "
            f"{config.mismatch:g} (alarms.mismatch). {advice}"
        )
    if _number(row, "engine_mismatch_share") > config.mismatch_share:
        return (
            f"engine/trainer mismatch: log-probs of {row['engine_mismatch_share']:.1%} of the tokens differ by "
            f"more than 0.1 nats, bound {config.mismatch_share:.1%} (alarms.mismatch_share). {advice}"
        )
    return None


def _nan_reward(row: Row) -> str | None:
    count = _number(row, "nan_rewards")
    if count == 0:
        return None
    return f"NaN reward: {count:g} rollouts were left out of the update (algorithm.nan_reward). The scorer is at fault"


def _number(row: Row, key: str) -> float:
    value = row.get(key)
    return 0.0 if value is None else float(value)


class AlarmLog:
    """``alarms.jsonl`` in the run directory, made with the first alarm."""

    def __init__(self, directory: Path, config: AlarmConfig) -> None:
        self.path, self.config = directory / "alarms.jsonl", config

    def rewind(self, step: int) -> None:
        """Forget the alarms of steps after ``step``: those are made again."""
        if self.path.is_file():
            kept = [alarm for alarm in read_alarms(self.path.parent) if alarm.step <= step]
            atomic_write(self.path, "".join(map(_line, kept)))

    def check(self, rows: Sequence[Row]) -> list[Alarm]:
        """Write down and return the alarms that begin with the last row."""
        alarms = raised(rows, self.config)
        if alarms:
            append_lines(self.path, "".join(map(_line, alarms)))
        return alarms

    def stopping(self, alarms: Sequence[Alarm]) -> list[Alarm]:
        """Those that ``alarms.stop`` names."""
        return [alarm for alarm in alarms if alarm.name in self.config.stop]


def read_alarms(directory: Path) -> list[Alarm]:
    """The alarms of a run, in the order they were raised; none where there is no file."""
    path = directory / "alarms.jsonl"
    if not path.is_file():
        return []
    rows = [row for _, row in read_jsonl(path, ["step", "name", "message"], torn_tail=True)]
    return [Alarm(int(row["step"]), str(row["name"]), str(row["message"])) for row in rows]


def _line(alarm: Alarm) -> str:
    return json.dumps(asdict(alarm)) + "\n"
