"""What the experience commands do; commands.py holds their arguments. Heavy modules load when a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hiexp.experience.record import LEVELS, STATUSES, Experience

if TYPE_CHECKING:
    from hiexp.agent.engine import Engine
    from hiexp.agent.trajectory import Trajectory
    from hiexp.experience.complete import Complete
    from hiexp.experience.distill import BatchReflector, Reflector, RejectedReply
    from hiexp.experience.ledger import Tally
    from hiexp.experience.store import HEK
    from hiexp.experience.summarise import Summariser
    from hiexp.tasks.question import Question


def distill_command(args: argparse.Namespace) -> int:
    """``hiexp distill``."""
    from hiexp.agent.command_config import check_counts
    from hiexp.experience.distill import distill, keep_rejected
    from hiexp.experience.importers import F1_THRESHOLD, load_trajectories
    from hiexp.experience.ledger import Meter, Prices, Tally, add_to_ledger, read_ledger
    from hiexp.tasks.qa import load_questions

    prices = None if args.price is None else Prices(*args.price)
    check_counts({"--limit": args.limit})
    threshold = F1_THRESHOLD if args.f1_threshold is None else args.f1_threshold
    questions = [question for source in args.questions for question in load_questions(source)]
    groups = load_trajectories(
        args.files, args.format, correct_by=args.correct_by, f1_threshold=threshold, questions=questions
    )
    engine = None if args.reflector == "extractive" else _model("reflector", args.reflector)
    with _open_or_create(Path(args.out), args.encoder, [group[0].question for group in groups]) as hek:
        hek.register_questions(_questions(groups, questions))
        before, reflector = len(hek), _reflector(engine, hek)
        earlier = read_ledger(hek).get(args.reflector, Tally())
        meter = Meter(getattr(reflector, "complete", None), prices)

        def save(lessons: Sequence[Experience], rejected: Sequence[RejectedReply]) -> None:
            with hek.transaction():
                known = hek.database.count(STATUSES)
                hek.add(lessons)
                keep_rejected(hek, rejected)
                new = hek.database.count(STATUSES) - known
                tally = replace(meter.read(), lessons=new, duplicates=len(lessons) - new, rejected=len(rejected))
                add_to_ledger(hek, args.reflector, tally)

        try:
            report = distill(
                groups, reflector, include_uniform=args.include_uniform, done=_done(hek, groups), save=save,
                limit=args.limit,
            )  # fmt: skip
        finally:  # what a batch cost that ended in an error is paid as well
            unsaved = meter.read()
            if unsaved.requests:
                add_to_ledger(hek, args.reflector, unsaved)
        hek.calibrate_search((one.question, query) for group in groups for one in group for query in one.queries())
        print(report)
        _print_stored(hek, len(hek) - before)
        _print_cost(read_ledger(hek).get(args.reflector, Tally()), earlier)
    print(f"next: hiexp build {args.out}")
    return 0


def build_command(args: argparse.Namespace) -> int:
    """``hiexp build``."""
    from hiexp.experience.ledger import Meter, Prices, add_to_ledger
    from hiexp.experience.remember import RememberedSummaries
    from hiexp.experience.store import HEK
    from hiexp.report.dendrogram import check_picture, draw_hierarchy

    prices = None if args.price is None else Prices(*args.price)
    if args.picture is not None:
        check_picture(args.picture)
    with HEK.open(args.hek, "w") as hek:
        summariser = _summariser(args.summariser, hek)
        meter = Meter(getattr(getattr(summariser, "inner", None), "complete", None), prices)
        given = {"E2": args.threshold_e2, "E3": args.threshold_e3}
        thresholds = {level: value for level, value in given.items() if value is not None}
        if not hek.entries("E1", "active"):
            raise ValueError(
                f"{args.hek}: no lessons (E1) to build on; distil questions with right and wrong attempts first"
            )
        try:
            report = hek.build_hierarchy(thresholds=thresholds, summariser=summariser, embed=args.embed)
        finally:
            tally = meter.read()
            if tally.requests:
                add_to_ledger(hek, f"summariser {args.summariser}", tally)
        print(report)
        if isinstance(summariser, RememberedSummaries):
            print(
                f"summaries from {summariser.file.name}: {summariser.remembered:,}; requests {tally.requests:,}, "
                f"prompt tokens {tally.prompt_tokens:,}, reply tokens {tally.completion_tokens:,}"
                + ("" if prices is None else f", cost {tally.cost:,.4f}")
            )
        if args.picture is not None:
            draw_hierarchy(hek, report.thresholds, args.picture, embed=args.embed)
            print(f"picture: {args.picture}")
    print(f'next: hiexp query {args.hek} "a question"')
    return 0


def query_command(args: argparse.Namespace) -> int:
    """``hiexp query``."""
    from hiexp.experience.store import HEK

    if not args.text.strip():
        raise ValueError("text: expected a question or a query, got an empty string")
    with HEK.open(args.hek) as hek:
        hits = [
            hit
            for level in LEVELS
            if level in (args.level or LEVELS)
            for hit in hek.retrieve(args.text, level=level, top_k=args.top_k, threshold=args.threshold)
        ]
        threshold = hek.calibration.thresholds["E1"]
    for hit in hits:
        entry = hit.experience
        if args.json:
            row = {"score": hit.score, "exp_id": entry.exp_id, "rev": entry.rev, "level": entry.level}
            print(json.dumps({**row, "title": entry.title, "description": entry.description}, ensure_ascii=False))
        else:
            print(
                f"{hit.score:.3f}  {entry.level}  {entry.exp_id}\n       {entry.title}\n       -> {entry.description}"
            )
    if not hits:
        asked = f"{threshold:.3f}, calibrated" if args.threshold is None else f"{args.threshold:.3f}"
        print(f"nothing reaches the threshold ({asked}); --threshold -1 shows the nearest entries", file=sys.stderr)
    return 0


def explain_command(args: argparse.Namespace) -> int:
    """``hiexp explain``."""
    from hiexp.experience.store import HEK

    with HEK.open(args.hek) as hek:
        entry = _find(hek, args.entry)
        fields = {
            "entry": f"{entry.exp_id} revision {entry.rev}, {entry.level}, {entry.type}, {entry.status}",
            "title": entry.title,
            "description": entry.description,
            "tags": ", ".join(entry.tags),
            "thinking": entry.thinking,
            "refused": str(entry.meta.get("quarantine_reason", "")),
            "questions": ", ".join(entry.qa_groups),
            "sources": ", ".join(entry.sources),
            "policy step": "" if entry.policy_step is None else str(entry.policy_step),
        }
        for name, text in fields.items():
            if text:
                print(f"{name:<12} {text}")
        for name, ids in (("parents", entry.parents), ("children", entry.children)):
            for exp_id in ids:
                linked = hek.database.last(exp_id)  # None: links of an import may lead to entries that are not here
                shown = f"{exp_id}  (missing)" if linked is None else f"{linked.level} {exp_id}  {linked.title}"
                print(f"{name:<12} {shown}")
        for revision in hek.revisions(entry.exp_id):
            print(f"{'revision':<12} {revision.rev}: {revision.status}, content {revision.content_hash()[:12]}")
    return 0


def _find(hek: HEK, name: str) -> Experience:
    entries = [entry for entry in hek.entries(status=STATUSES) if entry.exp_id.startswith(name)]
    exact = [entry for entry in entries if entry.exp_id == name]
    if len(exact or entries) == 1:
        return (exact or entries)[0]
    if not entries:
        raise ValueError(f"{hek.path}: no entry whose id starts with {name!r}; hiexp query shows ids")
    shown = ", ".join(entry.exp_id for entry in entries[:5])
    raise ValueError(
        f"{hek.path}: {len(entries)} entries start with {name!r}: {shown}{', ...' if len(entries) > 5 else ''}"
    )


def _open_or_create(path: Path, encoder: str | None, questions: Sequence[str]) -> HEK:
    from hiexp.experience.calibrate import MIN_TEXTS
    from hiexp.experience.store import HEK

    if path.exists():
        return HEK.open(path, "w", encoder=encoder)
    distinct = list(dict.fromkeys(questions))
    # A few questions of one kind say nothing about how alike unrelated texts are.
    return HEK.create(path, encoder or "hashing", calibrate=distinct if len(distinct) >= MIN_TEXTS else None)


def _questions(groups: Sequence[Sequence[Trajectory]], extra: Sequence[Question]) -> list[Question]:
    from hiexp.tasks.question import Question

    found = [Question(group[0].question_id, group[0].question, group[0].golden_answers) for group in groups]
    return [*extra, *found]


def _done(hek: HEK, groups: Sequence[Sequence[Trajectory]]) -> set[str]:
    """Attempts that have led to a lesson or to a rejected reply."""
    seen = {source for row in hek.quarantined() if row["kind"] == "reply" for source in _sources(row["body"])}
    return seen | {one.rollout_id for group in groups for one in group if hek.entries_from(one.rollout_id)}


def _sources(body: str) -> list[str]:
    found: list[str] = json.loads(body)["context"].get("sources", [])
    return found


def _print_stored(hek: HEK, added: int) -> None:
    refused = Counter(str(row["reason"]) for row in hek.quarantined() if row["kind"] == "entry")
    print(f"{'lessons added to the HEK':<32}{added:>8,}")
    for reason, count in refused.most_common():
        print(f"{'  quarantined in all':<32}{count:>8,}  {reason}")
    print(f"{hek.path}: {len(hek):,} entries in use")


def _print_cost(total: Tally, earlier: Tally) -> None:
    """Duplicates, and where a language model reflected its tokens: of this command, and of all runs of it."""
    print(f"{'equal to a lesson stored before':<32}{total.duplicates - earlier.duplicates:>8,}")
    if not total.requests:
        return
    for name in ("requests", "prompt_tokens", "completion_tokens", "seconds", "cost"):
        now, all_runs = getattr(total, name) - getattr(earlier, name), getattr(total, name)
        shown = "{:,}" if isinstance(now, int) else "{:,.4f}" if name == "cost" else "{:,.1f}"
        if name != "cost" or all_runs:
            print(f"{name.replace('_', ' '):<32}{shown.format(now):>8}  ({shown.format(all_runs)} in all runs)")


def _reflector(engine: Engine | Complete | None, hek: HEK) -> Reflector | BatchReflector:
    if engine is None:
        from hiexp.experience.reflect_extractive import ExtractiveReflector

        return ExtractiveReflector(guard=hek.guard)
    from hiexp.experience.reflect_llm import LLMReflector

    return LLMReflector(engine)


def _summariser(spec: str, hek: HEK) -> Summariser:
    if spec == "extractive":
        from hiexp.experience.summarise import ExtractiveSummariser

        return ExtractiveSummariser()
    from hiexp.experience.reflect_llm import LLMSummariser
    from hiexp.experience.remember import RememberedSummaries

    file = hek.path.with_name(hek.path.name + ".summaries.jsonl")
    return RememberedSummaries(LLMSummariser(_model("summariser", spec)), spec, file)


def _model(argument: str, spec: str) -> Engine | Complete:
    kind, _, name = spec.partition(":")
    if kind not in ("llm", "openai") or not name:
        raise ValueError(f"--{argument}: expected extractive, llm:MODEL or openai:MODEL, got {spec!r}")
    if kind == "openai":
        from hiexp.agent.openai_server import OpenAIChat, OpenAIServer

        return OpenAIChat(OpenAIServer(name))
    from hiexp._extras import require

    require("torch", "train", f"--{argument} {spec}")
    from hiexp.agent.engine_transformers import TransformersEngine
    from hiexp.rl.config import ModelConfig
    from hiexp.rl.model import load_policy, quiet_transformers

    quiet_transformers()
    model, tokenizer = load_policy(ModelConfig(path=name))
    engine: Engine = TransformersEngine(model, tokenizer)
    return engine
