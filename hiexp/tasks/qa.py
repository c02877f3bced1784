"""Questions from local files and hub data sets: one table of column mappings, one loader.

Sources: a ``.jsonl``/``.jsonl.gz``/``.json`` file; a name of the table in data_sets.py (``hotpotqa``); a folder or hub
name that ``datasets`` can load, as ``owner/name``, ``owner/name:config`` or ``owner/name:path/in/repository.json``.
Several are joined by `` + ``, ids then begin with the name of their source (many sets count from ``dev_0``);
``SOURCE[:N]`` is the first N questions of one: ``train.jsonl + musique[:8000]``. ``aime24=FILE`` and ``maths=FILE`` say
how answers are judged (judged.py); it makes no difference to what is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hiexp._extras import require
from hiexp.io import DataError, read_jsonl
from hiexp.tasks.data_sets import find_data_set, split_label, unknown_name
from hiexp.tasks.maths import gsm8k_answer, number_text
from hiexp.tasks.question import Question

SPLITS = ("test", "dev", "validation", "train")
_FIRST = re.compile(r"(.*?)(?:\[:(\d+)\])?", re.DOTALL)
_FILE_ENDINGS = (".jsonl", ".jsonl.gz", ".json")
# Repositories that datasets >= 4 cannot load by name alone (they hold a loading script), and the file to read instead.
_HUB_FILES = {"alabnii/morehopqa": "data/with_human_verification.json"}


@dataclass(frozen=True, slots=True)
class Columns:
    """How one family of data sets names its columns; the first row decides which family it is.

    Attributes:
        question: column of the question.
        answers: column of the answer or the list of accepted answers.
        id: columns that may hold the id; without any of them the row number is the id.
        needs: columns that must be there besides, to tell families apart.
        meta: columns kept in ``Question.meta``.
        context: column of text that goes before the question where it is not empty.
        convert: turns the answer cell into the answer.
    """

    question: str
    answers: str
    id: tuple[str, ...] = ("id", "_id", "unique_id", "uuid")
    needs: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()
    context: str = ""
    convert: Callable[[Any], Any] = lambda cell: cell

    def fit(self, row: Mapping[str, Any]) -> bool:
        """Whether ``row`` has the columns of this family."""
        return {self.question, self.answers, *self.needs} <= row.keys()


def _solution_or_answer(cell: Any) -> Any:
    return gsm8k_answer(cell) if isinstance(cell, str) and "####" in cell else cell


# Order matters: the first family whose columns are all present wins.
COLUMNS: Mapping[str, Columns] = {
    # RUC-NLPIR/FlashRAG_datasets (nq, triviaqa, popqa, hotpotqa, 2wikimultihopqa, musique, bamboogle), R1-Searcher's
    "flashrag": Columns("question", "golden_answers", meta=("metadata",)),
    "morehopqa": Columns(
        "question", "answer", needs=("previous_question",), meta=("no_of_hops", "answer_type", "reasoning_type")
    ),
    # google/frames-benchmark
    "frames": Columns("Prompt", "Answer", id=("Unnamed: 0",), meta=("reasoning_types", "wiki_links")),
    # AIME, AMC, MATH-500, OpenR1-Math
    "competition": Columns("problem", "answer", meta=("url", "subject", "level")),
    # Hothan/OlympiadBench: the answer is a list of one
    "olympiad": Columns("question", "final_answer", meta=("subfield", "answer_type"), context="context"),
    # GSM8K, HotpotQA's own files, and anything else that speaks of question and answer
    "plain": Columns(
        "question", "answer", id=("id", "_id", "idx"), meta=("type", "level"), convert=_solution_or_answer
    ),
}


def load_questions(
    source: str | Path, split: str | None = None, limit: int | None = None, seed: int | None = None
) -> list[Question]:
    """Questions of ``source``, in its order, or in a random order that depends on ``seed`` alone.

    Texts and gold answers are kept as they are: the agent cleans what goes into a prompt, and gold answers are only
    compared.

    Args:
        source: file, folder or hub name (see the top of this module).
        split: split of a folder or hub data set; default: the first of test, dev, validation, train that exists.
        limit: at most that many questions, taken after shuffling.
        seed: shuffle with this seed; None keeps the order.

    Raises:
        DataError: missing or damaged file, unknown columns, a row without question or gold answer, an id used twice.
            The message names file and line (data set and row for hub data).
        ValueError: ``split`` for a single file, ``limit`` < 1.
        ImportError: ``datasets`` is needed and missing.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit: expected at least 1 or None, got {limit}")
    parts = split_sources(source)
    questions = _unique(located for part in parts for located in _part(*part, split, prefixed=len(parts) > 1))
    if seed is not None:
        questions = [questions[i] for i in np.random.default_rng(seed).permutation(len(questions))]
    return questions[:limit]


def split_sources(source: str | Path) -> list[tuple[str, int | None]]:
    """The sources joined by `` + `` and how many questions each is to give: N of ``SOURCE[:N]``, else None for all."""
    parts = []
    for part in str(source).split(" + "):
        match = _FIRST.fullmatch(part.strip())
        assert match is not None  # the pattern matches every string
        parts.append((match[1], None if match[2] is None else int(match[2])))
    return parts


def _part(name: str, count: int | None, split: str | None, *, prefixed: bool) -> Iterator[tuple[str, Question]]:
    name = split_label(name)[1]
    stem = source_name(name)
    for place, question in islice(_questions(_rows(name, split), stem), count):
        yield place, replace(question, id=f"{stem}:{question.id}") if prefixed else question


def first_row(source: str, split: str | None) -> dict[str, Any]:
    """The first row of one source as it stands there; empty where there is none. Errors as in load_questions."""
    return next((row for _, _, row in _rows(source, split)), {})


def source_name(source: str | Path) -> str:
    """Short name of one source: prefix of generated ids, name of its table."""
    return Path(str(source).replace(":", "/")).name.split(".")[0]


def is_hub_source(source: str) -> bool:
    """Whether ``source``, one part of :func:`split_sources`, would be loaded from the hub."""
    path = Path(source)
    if path.exists() or (source.endswith(_FILE_ENDINGS) and ":" not in source):
        return False
    return not re.fullmatch(r"[\w-]+", source) or find_data_set(source) is not None


def _rows(source: str | Path, split: str | None) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Yield ``(place for error messages, row number, row)``."""
    path = Path(source)
    named_as_file = str(source).endswith(_FILE_ENDINGS) and ":" not in str(source)
    if path.is_file() or (named_as_file and not path.is_dir()):
        if split is not None:
            raise ValueError(f"split: {path} is one file and has no splits, got split={split!r}")
        if path.name.endswith(".json"):
            yield from _json_rows(path)
            return
        for line, row in read_jsonl(path):
            yield f"{path}:{line}", line, row
        return
    named = None if path.is_dir() else find_data_set(str(source))
    if named is None and not path.is_dir() and re.fullmatch(r"[\w-]+", str(source)):
        raise unknown_name(str(source))
    yield from _dataset_rows(str(source) if named is None else named[1].source, split)


def _json_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Rows of a file that holds one JSON array."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not valid UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(rows, list) or not rows:
        raise DataError(f"{path}: expected a non-empty JSON array of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: expected a JSON object, got {type(row).__name__}")
        yield f"{path}, row {number}", number, row


def _dataset_rows(source: str, split: str | None) -> Iterator[tuple[str, int, dict[str, Any]]]:
    datasets = require("datasets", "train", f"loading questions from {source!r}")
    name, _, part = source.partition(":")
    part = part or _HUB_FILES.get(name, "")
    try:
        if part.endswith(_FILE_ENDINGS):
            file = str(Path(name) / part) if Path(name).is_dir() else f"hf://datasets/{name}/{part}"
            # The json builder calls the only split of one file "train".
            loaded = {split or "test": datasets.load_dataset("json", data_files=file, split="train")}
        else:
            loaded = datasets.load_dataset(name, part or None)
    except Exception as error:  # datasets raises anything from OSError to its own classes; all mean the same to a user
        if isinstance(error, ConnectionError):
            raise DataError(
                f"{source}: neither a local file or folder nor a data set in the cache of `datasets`, and the hub "
                "cannot be reached"
            ) from error
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"{source}: neither a local file or folder nor a data set that `datasets` can load "
            f"({type(error).__name__}: {reason})"
        ) from error
    chosen = _choose_split(source, list(loaded), split)
    for number, row in enumerate(loaded[chosen], start=1):
        yield f"{source}[{chosen}], row {number}", number, row


def _choose_split(source: str, available: list[str], split: str | None) -> str:
    wanted = SPLITS if split is None else (split,)
    for name in wanted:
        if name in available:
            return name
    raise DataError(f"{source}: expected one of the splits {', '.join(wanted)}; it has {', '.join(available)}")


def _questions(rows: Iterable[tuple[str, int, dict[str, Any]]], stem: str) -> Iterator[tuple[str, Question]]:
    columns: Columns | None = None
    for place, number, row in rows:
        columns = columns or _columns_of(place, row)
        yield place, _question(place, row, columns, f"{stem}-{number}")


def _columns_of(place: str, row: dict[str, Any]) -> Columns:
    for columns in COLUMNS.values():
        if columns.fit(row):
            return columns
    known = "; ".join(f"{name}: {', '.join((c.question, c.answers, *c.needs))}" for name, c in COLUMNS.items())
    raise DataError(f"{place}: unknown columns {sorted(row)}; expected one of these sets ({known})")


def _question(place: str, row: dict[str, Any], columns: Columns, fallback_id: str) -> Question:
    text = row.get(columns.question)
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{place}: expected text in column {columns.question!r}, got {text!r}")
    identifier = next((str(row[key]) for key in columns.id if row.get(key) not in (None, "")), fallback_id)
    meta = {key: row[key] for key in columns.meta if row.get(key) is not None}
    context = row.get(columns.context)
    if isinstance(context, str) and context.strip():
        text = f"{context.strip()}\n{text.strip()}"
    return Question(identifier, text.strip(), _answers(place, row.get(columns.answers), columns), meta)


def _answers(place: str, cell: Any, columns: Columns) -> tuple[str, ...]:
    try:
        cell = columns.convert(cell)
    except ValueError as error:
        raise DataError(f"{place}: column {columns.answers!r}: {error}") from error
    answers = [_answer_text(place, answer, columns.answers) for answer in (cell if isinstance(cell, list) else [cell])]
    # dict.fromkeys: no accepted answer twice, order kept
    answers = [answer for answer in dict.fromkeys(answers) if answer]
    if not answers:
        raise DataError(f"{place}: expected at least one gold answer in column {columns.answers!r}, got {cell!r}")
    return tuple(answers)


def _answer_text(place: str, answer: Any, column: str) -> str:
    if answer is None:
        return ""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    if isinstance(answer, (int, float)):
        return number_text(answer)
    if isinstance(answer, str):
        return answer.strip()
    raise DataError(f"{place}: expected text or a number in column {column!r}, got {type(answer).__name__}")


def _unique(located: Iterable[tuple[str, Question]]) -> list[Question]:
    """Refuse an id used twice: rollouts group by id, so two questions would silently become one group."""
    places: dict[str, str] = {}
    questions = []
    for place, question in located:
        if question.id in places:
            raise DataError(f"{place}: id {question.id!r} was used before, at {places[question.id]}")
        places[question.id] = place
        questions.append(question)
    return questions


def questions_digest(questions: Iterable[Question]) -> str:
    """SHA-256 of ids, texts and gold answers in their order: tells whether a file still holds what it held."""
    content = [[one.id, one.text, one.golden_answers] for one in questions]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def repeated_texts(questions: Sequence[Question]) -> list[tuple[str, ...]]:
    """Ids of questions that ask the same thing, letter case and spacing apart; one tuple a question.

    Ids must differ (:func:`load_questions` sees to it), texts need not: a repeated question counts twice in a mean, and
    its copies must not be taken for independent of each other.
    """
    by_text: dict[str, list[str]] = {}
    for question in questions:
        by_text.setdefault(" ".join(question.text.casefold().split()), []).append(question.id)
    return [tuple(ids) for ids in by_text.values() if len(ids) > 1]
