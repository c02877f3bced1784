"""Contrastive distillation (paper, stage 2): right against wrong attempts at one question, lessons out.

This file sorts the groups and counts; what a lesson says is up to the reflector.

    report = hiexp.distill(load_trajectories(["rollouts.jsonl.gz"]), ExtractiveReflector())
    hek.add(report.experiences)
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from hiexp.agent.trajectory import Trajectory
from hiexp.experience.record import Experience
from hiexp.progress import track

if TYPE_CHECKING:
    from hiexp.experience.store import HEK


class Reflector(Protocol):
    """Writes lessons from the attempts at one question."""

    def reflect(self, right: Sequence[Trajectory], wrong: Sequence[Trajectory]) -> list[Experience]:
        """E1 entries of one group, possibly none. With ``include_uniform`` one side may be empty."""
        ...


@dataclass(frozen=True, slots=True)
class RejectedReply:
    """A reflector's reply that could not be used: the raw text, why, and the question and rollouts it was about."""

    raw: str
    reason: str
    question_id: str
    sources: tuple[str, ...]


def keep_rejected(hek: HEK, rejected: Sequence[RejectedReply]) -> None:
    """Store ``rejected`` in the quarantine of ``hek``, which is open for writing; nothing is written for none."""
    for reply in rejected:
        hek.quarantine_reply(reply.raw, reply.reason, {"question": reply.question_id, "sources": list(reply.sources)})


@dataclass(frozen=True, slots=True)
class Reflection:
    """What a reflector made of one group."""

    experiences: list[Experience]
    rejected: list[RejectedReply] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Group:
    """The attempts at one question, by outcome."""

    right: tuple[Trajectory, ...]
    wrong: tuple[Trajectory, ...]


@runtime_checkable
class BatchReflector(Protocol):
    """A reflector that works on several groups at once, which language models do faster."""

    batch_size: int

    def reflect_many(self, groups: Sequence[Group]) -> list[Reflection]:
        """One reflection per group, in order."""
        ...


@dataclass
class DistillReport:
    """What distillation found.

    Attributes:
        experiences: the lessons, in the order of the groups.
        quarantined: replies that could not be used; :func:`keep_rejected` stores them.
        groups: how many groups came in. contrastive: with both outcomes. all_right, all_wrong: with one outcome.
        done: left out because they had been reflected on before.
        left: due, but beyond the limit.
        silent: reflected on, but nothing separated the attempts.
        trajectories: how many attempts came in.
    """

    experiences: list[Experience] = field(default_factory=list)
    quarantined: list[RejectedReply] = field(default_factory=list)
    groups: int = 0
    contrastive: int = 0
    all_right: int = 0
    all_wrong: int = 0
    done: int = 0
    left: int = 0
    silent: int = 0
    trajectories: int = 0

    def __str__(self) -> str:
        rows = [
            ("attempts", self.trajectories),
            ("questions", self.groups),
            ("  right and wrong attempts", self.contrastive),
            ("  all right", self.all_right),
            ("  all wrong", self.all_wrong),
            ("reflected on before", self.done),
            *([("left for another time", self.left)] if self.left else []),
            ("lessons", len(self.experiences)),
            ("nothing separates the attempts", self.silent),
            ("replies that could not be used", len(self.quarantined)),
        ]
        return "\n".join(f"{name:<32}{count:>8,}" for name, count in rows)


Save = Callable[[Sequence[Experience], Sequence[RejectedReply]], None]


def distill(
    groups: Sequence[Sequence[Trajectory]],
    reflector: Reflector | BatchReflector,
    *,
    include_uniform: bool = False,
    progress: bool = True,
    done: Container[str] = (),
    save: Save | None = None,
    limit: int | None = None,
) -> DistillReport:
    """Contrast right and wrong attempts, group by group.

    Args:
        groups: one sequence of judged trajectories per question, as ``load_trajectories`` returns them.
        reflector: writes the lessons.
        include_uniform: also reflect on groups that are all right or all wrong; by default they are only counted.
        progress: show a progress bar.
        done: rollout ids; a group with an attempt among them is counted and left out, to continue an earlier run.
        save: called with the lessons and rejected replies of each batch, so that an interrupted run loses one batch.
        limit: reflect on so many groups at most, the first ones that are due.

    Raises:
        ValueError: a limit below 1, an empty group, a trajectory without verdict, or a group with several questions.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1, got {limit}")
    checked = [_split(position, group) for position, group in enumerate(groups)]
    report = DistillReport(
        groups=len(checked),
        trajectories=sum(len(group) for group in groups),
        contrastive=sum(bool(one.right and one.wrong) for one in checked),
        all_right=sum(not one.wrong for one in checked),
        all_wrong=sum(not one.right for one in checked),
    )
    due = [one for one in checked if include_uniform or (one.right and one.wrong)]
    wanted = [one for one in due if not any(attempt.rollout_id in done for attempt in (*one.right, *one.wrong))]
    report.done = len(due) - len(wanted)
    report.left = len(wanted) - len(wanted[:limit])
    batches = list(_batches(wanted[:limit], getattr(reflector, "batch_size", 1)))
    for batch in track(batches, "reflecting") if progress else batches:
        found = _reflect(reflector, batch)
        experiences = [lesson for reflection in found for lesson in reflection.experiences]
        rejected = [reply for reflection in found for reply in reflection.rejected]
        if save is not None:
            save(experiences, rejected)
        report.silent += sum(not one.experiences and not one.rejected for one in found)
        report.experiences += experiences
        report.quarantined += rejected
    return report


def _reflect(reflector: Reflector | BatchReflector, batch: Sequence[Group]) -> list[Reflection]:
    if isinstance(reflector, BatchReflector):
        return reflector.reflect_many(batch)
    return [Reflection(reflector.reflect(group.right, group.wrong)) for group in batch]


def _split(position: int, group: Sequence[Trajectory]) -> Group:
    if not group:
        raise ValueError(f"groups[{position}]: expected at least one trajectory, got none")
    for one in group:
        if one.correct is None:
            raise ValueError(
                f"groups[{position}]: trajectory {one.rollout_id!r} has no verdict; set correct to True or False"
            )
        if one.question_id != group[0].question_id:
            raise ValueError(
                f"groups[{position}]: expected one question, got {group[0].question_id!r} and {one.question_id!r}"
            )
    return Group(tuple(one for one in group if one.correct), tuple(one for one in group if not one.correct))


def _batches(groups: Sequence[Group], size: int) -> Iterator[Sequence[Group]]:
    for start in range(0, len(groups), size):
        yield groups[start : start + size]
