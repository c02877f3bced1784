"""Truncation: token-exact, whole documents first, frames and tags never cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.agent.protocol import DIALECTS
from hiexp.agent.tools import Document
from hiexp.agent.truncation import fit_documents

TEXTS = st.text(alphabet="ab \u4f60e\u0301.", max_size=30)


def encode(text):
    """Two characters a token, so that places in text and in tokens differ."""
    return [len(text[i : i + 2]) for i in range(0, len(text), 2)]


@pytest.mark.parametrize("name", sorted(DIALECTS))
@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4), room=st.integers(-2, 80))
def test_what_fits_is_whole_and_no_more_would_fit(name, texts, room):
    dialect = DIALECTS[name]
    documents = [Document(f"{i}", title, text) for i, (title, text) in enumerate(texts)]
    text, tokens, shown = fit_documents(dialect, documents, (), encode, room)
    assert tokens == encode(text)
    assert len(tokens) <= max(room, 0)
    content = [one for one in documents if one.text.strip() or ("{title}" in dialect.document and one.title.strip())]
    if shown and text == dialect.format_body(content[:shown]):
        # Whole documents: one more does not fit.
        assert shown == len(content) or len(encode(dialect.format_body(content[: shown + 1]))) > room
    elif shown:
        whole = dialect.format_body(content[:1])
        frame = whole[: len(whole) - len(dialect.sanitize(content[0].text).strip())]
        assert shown == 1
        assert whole.startswith(text)
        assert text.startswith(frame)
        assert len(encode(whole)) > room
        rest = whole[len(text) :]
        inside_first_word = " " not in text[len(frame) :].strip()
        assert rest[0] == " " or inside_first_word
        assert rest[0] != "\u0301"
    elif content:
        assert text == ""
        assert len(encode(dialect.format_body(content[:1]))) > room


def test_words_then_characters_are_cut():
    dialect = DIALECTS["search_r1"]
    document = Document("d", "The title", "first second third")
    frame = "Doc 1(Title: The title) "

    def fitted(characters):
        return fit_documents(dialect, [document, document], (), list, characters)

    assert fitted(200)[2] == 2
    assert fitted(len(frame) + 18)[::2] == (f"{frame}first second third", 1)
    assert fitted(len(frame) + 17)[::2] == (f"{frame}first second", 1)
    assert fitted(len(frame) + 5)[::2] == (f"{frame}first", 1)
    assert fitted(len(frame) + 3)[::2] == (f"{frame}fir", 1)
    assert fitted(len(frame)) == ("", [], 0)
    assert fitted(0) == ("", [], 0)
