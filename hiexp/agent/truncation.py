"""Documents that fit a number of tokens: whole ones, the last dropped first; of a single one, whole words.

The frame of a document (its rank, its title) and the tags around all of them are never cut.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from hiexp.agent.protocol import Dialect
from hiexp.agent.tools import Document


class Fitted(NamedTuple):
    """Text of the first ``shown`` documents and its tokens; the last one may be cut where it is the only one."""

    text: str
    token_ids: list[int]
    shown: int


def fit_documents(
    dialect: Dialect,
    documents: Sequence[Document],
    banned: Sequence[str],
    encode: Callable[[str], list[int]],
    room: int,
) -> Fitted:
    """As many of ``documents``, best first, as ``encode`` turns into at most ``room`` tokens.

    Where not even the first one fits its text is cut behind a word, or inside its first word. Documents without
    content are left out. Nothing at all where the frame alone is too long.
    """
    kept = [one for one in documents if _has_content(dialect, one, banned)]
    for count in range(len(kept), 0, -1):
        text = dialect.format_body(kept[:count], banned)
        token_ids = encode(text)
        if len(token_ids) <= room:
            return Fitted(text, token_ids, count)
    return _cut(dialect, kept[0], banned, encode, room) if kept else Fitted("", [], 0)


def _has_content(dialect: Dialect, document: Document, banned: Sequence[str]) -> bool:
    parts = [document.text] + ([document.title] if "{title}" in dialect.document else [])
    return any(dialect.sanitize(part, banned).strip() for part in parts)


def _cut(
    dialect: Dialect, document: Document, banned: Sequence[str], encode: Callable[[str], list[int]], room: int
) -> Fitted:
    text = dialect.sanitize(document.text, banned).strip()
    words = [match.end() for match in re.finditer(r"\S+", text)]
    # Inside the first word no character is parted from the marks that belong to it.
    letters = [i for i in range(1, words[0] if words else 0) if not unicodedata.combining(text[i])]
    for ends in (words, letters):
        best = Fitted("", [], 0)
        low, high = 0, len(ends)  # the first ``low`` places fit, of those behind ``high`` none does
        while low < high:
            middle = (low + high + 1) // 2
            body = dialect.format_body([replace(document, text=text[: ends[middle - 1]])], banned)
            token_ids = encode(body)
            if len(token_ids) <= room:
                low, best = middle, Fitted(body, token_ids, 1)
            else:
                high = middle - 1
        if best.shown:
            return best
    return Fitted("", [], 0)
