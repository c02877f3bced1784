"""One finding about a config, and how findings are told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

Status = Literal["ok", "warn", "error"]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of ``hiexp doctor CONFIG``.

    Attributes:
        name: what was looked at.
        status: ``error`` will stop or spoil the run, ``warn`` may be meant so.
        text: what was found, with numbers.
        mend: what to do about it; empty where nothing is to be done.
    """

    name: str
    status: Status
    text: str
    mend: str = ""


def as_text(checks: Sequence[Check]) -> str:
    """One line a check, the mend beneath it."""
    width = max((len(check.name) for check in checks), default=0)
    lines = []
    for check in checks:
        lines.append(f"{check.status:<5}  {check.name:<{width}}  {check.text}")
        if check.mend:
            lines.append(f"{'':5}  {'':<{width}}  mend: {check.mend}")
    counts = {status: sum(check.status == status for check in checks) for status in ("error", "warn")}
    lines.append(f"{counts['error']} errors, {counts['warn']} warnings, {len(checks)} checks")
    return "\n".join(lines)


def as_json(checks: Iterable[Check]) -> str:
    """A JSON array of objects with name, status, text and mend."""
    return json.dumps([asdict(check) for check in checks], indent=1)


def gib(size: float) -> str:
    """Bytes in GiB, or in MiB where they are few."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
