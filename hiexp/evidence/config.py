"""Settings of the evidence study: which arms there are, and how long everything takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from hiexp.quickstart.config import QuickstartConfig, SourceConfig, WorldConfig
from hiexp.rl.config import ExperienceConfig, TrainConfig
from hiexp.rl.config_parse import check_ranges, setting, to_plain
from hiexp.rl.warm_start import WarmStartConfig
from hiexp.tasks.miniworld_demos import DemonstrationMix

Store = Literal["hek", "placebo", "shuffled", "oracle", "plain", "teacher"]
# No similarity reaches it: no E1 entry is served.
_NO_E1 = 2.0


@dataclass(frozen=True, slots=True)
class Arm:
    """What tells one way of training from the others.

    Attributes:
        about: what it is, for tables.
        store: which experience is shown.
        share: of each group's rollouts that are shown it.
        start: whether E2 and E3 entries stand in the prompt. tool: whether E1 entries come with documents.
        kind: policy loss. minibatches: updates per step.
    """

    about: str
    store: Store = "hek"
    share: float = 1.0
    start: bool = True
    tool: bool = True
    kind: Literal["grpo", "gspo"] = "grpo"
    minibatches: int = 1

    def condition(self, name: str) -> str:
        """The test condition in which the arm ``name`` is shown what it was trained with."""
        if self.share == 0.0:
            return "without"
        in_full = self.store in ("hek", "teacher") and self.start and self.tool
        return self.store if in_full else name

    def experience(self, base: ExperienceConfig) -> ExperienceConfig:
        """``base`` as this arm shows it."""
        return replace(
            base,
            experience_share=self.share,
            start_top_k=base.start_top_k if self.start else 0,
            e1_threshold=base.e1_threshold if self.tool else _NO_E1,
        )


# GRPO and GSPO differ only where the policy moves within a step: with one update all ratios are 1, and the two losses
# have the same gradient (the first runs of this study ended in identical weights). So they are compared at four.
_UPDATES = 4
# In the order in which they are trained; the oracle comes first because its policy is the teacher.
ARMS: dict[str, Arm] = {
    "oracle": Arm("the true lesson in every rollout", store="oracle"),
    "none": Arm("no HEK in training", share=0.0),
    "all": Arm("frozen HEK in every rollout"),
    "half": Arm("frozen HEK in half of each group", share=0.5),
    "e1": Arm("E1 at tool responses only", start=False),
    "e23": Arm("E2 and E3 at the start only", tool=False),
    "placebo": Arm("lessons of equal length about other attributes", store="placebo"),
    "shuffled": Arm("the HEK's lessons under each other's titles", store="shuffled"),
    "plain": Arm("one line of general instruction", store="plain"),
    "teacher": Arm("HEK distilled from the oracle-trained policy", store="teacher"),
    "grpo4-none": Arm("no HEK, 4 updates a step, GRPO", share=0.0, minibatches=_UPDATES),
    "gspo4-none": Arm("no HEK, 4 updates a step, GSPO", share=0.0, kind="gspo", minibatches=_UPDATES),
    "grpo4-half": Arm("HEK in half of each group, 4 updates a step, GRPO", share=0.5, minibatches=_UPDATES),
    "gspo4-half": Arm(
        "HEK in half of each group, 4 updates a step, GSPO", share=0.5, kind="gspo", minibatches=_UPDATES
    ),
    "grpo4-all": Arm("HEK in every rollout, 4 updates a step, GRPO", minibatches=_UPDATES),
    "gspo4-all": Arm("HEK in every rollout, 4 updates a step, GSPO", kind="gspo", minibatches=_UPDATES),
}
# The warm start before any RL, tested like the arms: "warm start + final HEK without RL".
UNTRAINED = "untrained"


def _train_defaults() -> TrainConfig:
    train = QuickstartConfig().train
    return replace(
        train,
        evaluation=replace(train.evaluation, questions=0),
        run=replace(train.run, steps=60, trackers=()),
    )


@dataclass(frozen=True, slots=True)
class EvidenceConfig:
    """All settings; every seed and arm shares them."""

    trapped: float = setting(0.7, at_least=0.0, at_most=1.0)
    """Share of the demonstrators' unaided choices that fall for the trap; the rest are coin flips, so that the policy
    starts out right in (1 - trapped) / 2 of the questions."""
    lessons_at_start: float = setting(0.8, at_least=0.0, at_most=1.0)
    """Share of demonstrations with lesson lines in the prompt."""
    unseen_pairs: int = setting(3, at_least=1, at_most=10)
    """Of the 11 pairs of attributes, how many occur neither in training nor in the store; every seed draws its own."""
    test_seen: int = setting(160, at_least=1)
    """Test questions of trained families in the trained wordings."""
    test_reworded: int = setting(160, at_least=1)
    """Test questions of trained families in wordings that neither training nor the store has met."""
    test_unseen: int = setting(96, at_least=1)
    """Test questions of families that neither training nor the store has met."""
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    source: SourceConfig = field(default_factory=lambda: SourceConfig(questions=320))
    worlds: WorldConfig = field(default_factory=WorldConfig)
    train: TrainConfig = field(default_factory=_train_defaults)

    def __post_init__(self) -> None:
        check_ranges(self)

    def to_dict(self) -> dict[str, Any]:
        """Nested dicts of plain YAML types."""
        return to_plain(self)

    def short(self) -> EvidenceConfig:
        """Runs every stage in about two minutes; too short to learn, so its numbers mean nothing."""
        train = self.train
        return replace(
            self,
            test_seen=16,
            test_reworded=16,
            test_unseen=12,
            warm_start=replace(self.warm_start, steps=40),
            source=replace(self.source, questions=32, group_size=4),
            train=replace(
                train,
                rollout=replace(train.rollout, group_size=4),
                run=replace(train.run, steps=2, questions_per_step=4, checkpoint_every=1),
            ),
        )

    def mix(self) -> DemonstrationMix:
        """What the demonstrations of the warm start hold: all wordings, lessons of random direction."""
        return DemonstrationMix(start=self.lessons_at_start, trapped=self.trapped, wordings=4)

    def arm(self, name: str, seed: int, folder: Path, policy: Path) -> TrainConfig:
        """The training config of one arm, run in ``folder`` from the warm-started ``policy``."""
        train, arm = self.train, ARMS[name]
        # The GSPO arms began with GRPO's clip range, before the kind had its own.
        clip_low = 0.2 if arm.kind == "gspo" else train.algorithm.clip_low
        return replace(
            train,
            model=replace(train.model, path=str(policy)),
            experience=arm.experience(train.experience),
            algorithm=replace(train.algorithm, kind=arm.kind, minibatches=arm.minibatches, clip_low=clip_low),
            run=replace(train.run, dir=str(folder), seed=seed),
        )


def check_arms(names: list[str]) -> list[str]:
    """``names`` in training order; ValueError for an unknown one, or a pupil without its teacher."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise ValueError(f"--arms: expected names among {', '.join(ARMS)}; got {', '.join(unknown)}")
    if "teacher" in names and "oracle" not in names:
        raise ValueError("--arms: teacher needs oracle, whose policy is the teacher")
    return [name for name in ARMS if name in names]
