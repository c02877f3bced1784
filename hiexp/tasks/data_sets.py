"""The evaluation sets by name: where each lies on the hub, how its answers are judged, how it is usually reported.

``task.evaluation: hotpotqa`` and ``hiexp eval --questions hotpotqa 2wiki`` go through this table; a local file or any
other hub name works as well (hiexp.tasks.qa). Columns are mapped by hiexp.tasks.qa.COLUMNS.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from hiexp.io import DataError

Kind = Literal["qa", "maths"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_LABEL = re.compile(r"([\w-]+)=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class DataSet:
    """One named evaluation set.

    Attributes:
        title: its usual spelling.
        hub: repository on the hub.
        part: configuration, or file inside the repository; empty for neither.
        columns: key of :data:`hiexp.tasks.qa.COLUMNS`, for the reader: the loader looks at the rows.
        metric: the score its results are usually compared by; ``judge`` needs ``--judge``.
        kind: ``maths`` answers are compared as expressions, ``qa`` answers as normalised text.
        samples: answers per question that its published results average over.
        note: what to know before comparing.
    """

    title: str
    hub: str
    part: str = ""
    columns: str = "flashrag"
    metric: Literal["em", "f1", "cem", "accuracy", "judge"] = "cem"
    kind: Kind = "qa"
    samples: int = 1
    note: str = ""

    @property
    def source(self) -> str:
        """The name under which ``datasets`` finds it: ``owner/name`` or ``owner/name:part``."""
        return f"{self.hub}:{self.part}" if self.part else self.hub


_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"


def _maths(title: str, hub: str, part: str = "", columns: str = "competition", samples: int = 1) -> DataSet:
    return DataSet(title, hub, part, columns, "accuracy", "maths", samples)


# cem and Avg@32 are what the paper reports (arXiv 2604.08124); em is Search-R1's figure for the three open sets.
DATA_SETS: Mapping[str, DataSet] = {
    "hotpotqa": DataSet("HotpotQA", _FLASHRAG, "hotpotqa"),
    "2wiki": DataSet("2WikiMultihopQA", _FLASHRAG, "2wikimultihopqa"),
    "musique": DataSet("MuSiQue", _FLASHRAG, "musique"),
    "bamboogle": DataSet("Bamboogle", _FLASHRAG, "bamboogle"),
    "nq": DataSet("Natural Questions", _FLASHRAG, "nq", metric="em"),
    "triviaqa": DataSet("TriviaQA", _FLASHRAG, "triviaqa", metric="em"),
    "popqa": DataSet("PopQA", _FLASHRAG, "popqa", metric="em"),
    "morehopqa": DataSet("MoreHopQA", "alabnii/morehopqa", "data/with_human_verification.json", "morehopqa"),
    "frames": DataSet(
        "FRAMES", "google/frames-benchmark", columns="frames", metric="judge", note="long answers: em and f1 say little"
    ),
    "aime24": _maths("AIME 2024", "HuggingFaceH4/aime_2024", samples=32),
    "aime25": _maths("AIME 2025", "math-ai/aime25", samples=32),
    "amc23": _maths("AMC 2023", "math-ai/amc23", columns="plain", samples=32),
    "math500": _maths("MATH-500", "HuggingFaceH4/MATH-500"),
    "minerva": _maths("Minerva Math", "math-ai/minervamath", columns="plain"),
    "olympiadbench": _maths("OlympiadBench", "Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "olympiad"),
    "gsm8k": _maths("GSM8K", "openai/gsm8k", "main", "plain"),
}

# Other spellings that people write, without case and punctuation.
_ALIASES = {
    "2wikimultihopqa": "2wiki", "naturalquestions": "nq", "trivia": "triviaqa", "hotpot": "hotpotqa",
    "aime2024": "aime24", "aime2025": "aime25", "amc": "amc23", "amc2023": "amc23", "minervamath": "minerva",
    "olympiad": "olympiadbench",
}  # fmt: skip


def find_data_set(name: str) -> tuple[str, DataSet] | None:
    """Key and entry of a named set (case and punctuation do not matter), or None."""
    key = "".join(char for char in name.lower() if char.isalnum())
    key = _ALIASES.get(key, key)
    return (key, DATA_SETS[key]) if key in DATA_SETS else None


def split_label(source: str) -> tuple[str, str]:
    """What a source is judged as and the source itself: ``aime24=FILE``, ``maths=FILE``; without a label ("", source).

    Raises:
        DataError: a label that is neither a named set nor a kind.
    """
    match = None if Path(source).exists() else _LABEL.fullmatch(source)
    if match is None:
        return "", source
    if match[1] not in KINDS and find_data_set(match[1]) is None:
        raise DataError(f"{source}: expected qa, maths or a name of hiexp eval --list-sets before '='")
    return match[1], match[2]


def unknown_name(name: str) -> DataError:
    """The error for a bare name that is no file, no folder and not in the table; it offers the nearest ones."""
    near = difflib.get_close_matches(name.lower(), [*DATA_SETS, *_ALIASES], n=3, cutoff=0.5)
    near = list(dict.fromkeys(_ALIASES.get(each, each) for each in near))
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return DataError(
        f"{name}: neither a file or folder nor a known data set; {hint}hiexp eval --list-sets lists the names, other "
        "hub data sets are written owner/name"
    )


def data_set_table() -> str:
    """The table as text, one line a set."""
    rows = [("name", "data set", "source", "metric", "judged as", "answers", "")]
    rows += [
        (key, each.title, each.source, each.metric, each.kind, str(each.samples), each.note)
        for key, each in DATA_SETS.items()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join([*map(str.ljust, row[:6], widths), row[6]]).rstrip() for row in rows)
