"""What ``hiexp quarantine`` does: what a HEK refused to serve, by reason, with examples to judge the refusal by."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hiexp.experience.store import HEK

_SHOWN = 160  # characters of an example


def quarantine_command(args: argparse.Namespace) -> int:
    """``hiexp quarantine``."""
    from hiexp.experience.store import HEK

    if args.examples < 0:
        raise ValueError(f"--examples: expected at least 0, got {args.examples}")
    with HEK.open(args.hek) as hek:
        rows = [_readable(hek, row) for row in hek.quarantined()]
    if args.json:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return 0
    if not rows:
        print(f"{args.hek}: nothing was refused")
    by_reason: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_reason[row["kind"], row["reason"]].append(row)
    for (kind, reason), found in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        print(f"{len(found):>6,}  {'entries' if kind == 'entry' else 'replies'}: {reason}")
        for row in found[: args.examples]:
            text = " ".join(row["text"].split())
            print(f"        {row['of']}: {text[:_SHOWN]}{'...' if len(text) > _SHOWN else ''}")
    return 0


def _readable(hek: HEK, row: dict[str, Any]) -> dict[str, Any]:
    """``kind``, ``reason``, ``of`` (entry or question), ``status`` of the entry now, and the refused ``text``."""
    if row["kind"] == "entry":
        entry, last = hek.get(row["exp_id"], row["rev"]), hek.get(row["exp_id"])
        text = f"{entry.title} -> {entry.description}"
        return {
            "kind": "entry", "reason": row["reason"], "of": entry.exp_id, "status": last.status, "text": text,
            "questions": list(entry.qa_groups), "sources": list(entry.sources),
        }  # fmt: skip
    body = json.loads(row["body"])
    context = body["context"]
    question = str(context.get("question", ""))
    return {
        "kind": "reply", "reason": row["reason"], "of": question or "summary", "status": "refused", "text": body["raw"],
        "questions": [question] if question else [], "sources": list(context.get("sources", [])),
    }  # fmt: skip
