"""Questions, experience and their overlap: what a run is trained and judged on must be there and must be apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hiexp.io import DataError
from hiexp.preflight.check import Check

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Snapshot
    from hiexp.rl.config import TrainConfig
    from hiexp.tasks.question import Question


def read_questions(config: TrainConfig, which: str, checks: list[Check]) -> list[Question]:
    """Questions of ``task.train`` or ``task.evaluation``; what was found goes to ``checks``."""
    from hiexp.rl.setup import check_task
    from hiexp.tasks.judged import MEND, mismatches
    from hiexp.tasks.qa import load_questions, repeated_texts

    task = config.task
    if which == "train":
        source, split, limit = task.train, task.train_split, task.train_limit
    else:  # all of them, however few the run itself looks at: `hiexp eval` will ask them all
        source, split, limit = task.evaluation, task.evaluation_split, None
    if which == "train":
        try:
            check_task(task)
        except ValueError as error:
            checks.append(Check("task.train", "error", str(error), "name a file or data set"))
            return []
    elif not source:
        checks.append(Check("task.evaluation", "warn", "no evaluation: nothing will tell learning from drift",
                            "name questions that are not trained on"))  # fmt: skip
        return []
    try:
        questions = load_questions(source, split, limit)
    except (ValueError, OSError, ImportError) as error:
        checks.append(
            Check(f"task.{which}", "error", str(error), "see the columns that hiexp reads: docs/evaluation.md")
        )
        return []
    used = (
        "" if which == "train" else f", the first {min(len(questions), config.evaluation.questions):,} during the run"
    )
    checks.append(Check(f"task.{which}", "ok", f"{len(questions):,} questions{used}"))
    problems = mismatches(source, split, task.kind)
    checks += [Check(f"task.{which}", "error", problem, MEND[task.kind]) for problem in problems]
    repeated = repeated_texts(questions)
    if repeated:
        first = " and ".join(repeated[0][:3])
        checks.append(
            Check(
                f"task.{which}",
                "warn",
                f"{len(repeated)} questions are asked more than once, first {first}",
                "leave the copies out: they count twice",
            )
        )
    return questions


def epoch_check(config: TrainConfig, count: int) -> Check:
    """How often the run goes through its training questions."""
    per_step, steps = config.run.questions_per_step, config.run.steps
    if per_step > count:
        return Check(
            "epochs",
            "error",
            f"{per_step} questions a step, but there are {count}",
            f"lower run.questions_per_step to {count}",
        )
    rollouts = per_step * config.rollout.group_size
    return Check(
        "epochs", "ok", f"{steps} steps of {per_step} questions x {config.rollout.group_size} rollouts = {rollouts:,} "
        f"rollouts a step; {steps * per_step / count:.2g} epochs",
    )  # fmt: skip


def leak_checks(training: Sequence[Question], evaluation: Sequence[Question], snapshot: Snapshot | None) -> list[Check]:
    """Evaluation questions among the training questions or in the HEK."""
    checks = [] if snapshot is None else _hek_leaks(training, evaluation, snapshot)
    if training and evaluation:
        checks.insert(0, _question_leaks(training, evaluation))
    return checks


def _question_leaks(training: Sequence[Question], evaluation: Sequence[Question]) -> Check:
    """Exact copies, and those that differ in case, punctuation, articles and spacing only."""
    from hiexp.tasks.scorers import normalize

    trained = {normalize(question.text, "hiexp"): question.id for question in training}
    both = [(one.id, trained[key]) for one in evaluation if (key := normalize(one.text, "hiexp")) in trained]
    if not both:
        return Check("leak: questions", "ok", "no evaluation question is among the training questions")
    exact = len({one.text for one in training} & {one.text for one in evaluation})
    first = " = ".join(both[0])
    return Check(
        "leak: questions", "error",
        f"{len(both)} evaluation questions are trained on ({exact} letter by letter), first {first}",
        "take them out of task.train, or evaluate on others",
    )  # fmt: skip


def _hek_leaks(training: Sequence[Question], evaluation: Sequence[Question], snapshot: Snapshot) -> list[Check]:
    from hiexp.experience.guard import leaking_entries

    checks = []
    sources = _distilled_from(snapshot, evaluation)
    if sources:
        text = f"the HEK was distilled from attempts at {sources} evaluation questions"
        mend = "distil from other questions; scores with this HEK are no test scores"
        checks.append(Check("leak: HEK", "warn", text, mend))
    leaks = leaking_entries(snapshot, [*training, *evaluation])
    if leaks:
        text = f"{len(leaks)} entries hold an answer, first {leaks[0][0]}: {leaks[0][1]}"
        mend = "hiexp distill ... --questions FILE [FILE ...] with these questions"
        checks.append(Check("leak: answers", "error", text, mend))
    else:
        checks.append(Check("leak: answers", "ok", f"{len(snapshot.entries)} entries hold no gold answer"))
    return checks


def _distilled_from(snapshot: Snapshot, questions: Sequence[Question]) -> int:
    """How many of ``questions`` entries were drawn from: those of equal text; by id where the text is not known.

    One file's ids are not another's: logs without ids name a question by its text, and many sets count from ``dev_0``.
    """
    from hiexp.experience.guard import text_key

    sources = {name for entry in snapshot.entries for name in entry.qa_groups}
    keys = {snapshot.aliases.get(name, name) for name in sources}
    unknown = sources - snapshot.aliases.keys()
    return sum(text_key(one.text) in keys or one.id in unknown for one in questions)


def read_hek(config: TrainConfig, checks: list[Check]) -> Snapshot | None:
    """The snapshot that a new run would use."""
    if config.experience.hek is None:
        checks.append(Check("HEK", "ok", "none: trained without experience"))
        return None
    from hiexp.experience.store import HEK

    try:
        with HEK.open(config.experience.hek, mode="r") as hek:
            snapshot = hek.snapshot()
    except (DataError, ValueError, OSError, ImportError) as error:
        checks.append(Check("HEK", "error", str(error), "hiexp distill makes one, hiexp build its levels"))
        return None
    levels = {level: sum(entry.level == level for entry in snapshot.entries) for level in ("E1", "E2", "E3")}
    text = f"{', '.join(f'{count} {level}' for level, count in levels.items())}; snapshot {snapshot.id[:16]}"
    missing = [level for level in config.experience.start_levels if not levels[level]]
    if not snapshot.entries:
        checks.append(Check("HEK", "error", "it holds no entry that may be shown", "hiexp distill, then hiexp build"))
    elif missing and config.experience.start_top_k:
        checks.append(
            Check("HEK", "warn", f"{text}; experience.start_levels asks for {', '.join(missing)}", "run hiexp build")
        )
    else:
        checks.append(Check("HEK", "ok", text))
    return snapshot


def share_check(config: TrainConfig, snapshot: Any) -> Check | None:
    """Rollouts of a group with and without experience."""
    size, share = config.rollout.group_size, config.experience.experience_share
    if snapshot is None:
        if share == 1.0:
            return None
        return Check("groups", "warn", f"experience.experience_share {share:g} has no effect without experience.hek",
                     "name a HEK or drop the setting")  # fmt: skip
    informed = round(share * size)
    text = f"{informed} of {size} rollouts see experience, {size - informed} are controls"
    if 0.0 < share < 1.0 and informed in (0, size):
        return Check("groups", "warn", f"experience_share {share:g} rounds away: {text}",
                     f"take a share between {1 / size:.2g} and {1 - 1 / size:.2g}")  # fmt: skip
    if 0 < size - informed < 2 or 0 < informed < 2:
        return Check(
            "groups", "warn", f"{text}: a single rollout has no variance of its own", "at least two of each kind"
        )
    return Check("groups", "ok", text)
