"""The streamed build gives bm25s's own matrix, whatever the blocks."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiexp.agent.bm25 import _WORD, tokenize
from hiexp.agent.bm25_build import count_words, remove_temporaries, score_matrix
from hiexp.agent.tools import Document

texts = st.lists(st.text("abc dé", max_size=30), min_size=1, max_size=12)


@settings(deadline=None, max_examples=40)
@given(texts=texts, block=st.integers(1, 5))
def test_scores_are_those_of_bm25s(tmp_path_factory, texts, block):
    bm25s = pytest.importorskip("bm25s")
    tokens = [tokenize(text) for text in texts]
    if not any(tokens):
        return
    folder = tmp_path_factory.mktemp("b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hiexp.agent.bm25_build._BLOCK", block)
        postings = count_words([Document(str(i), "", text) for i, text in enumerate(texts)], folder, tokenize)
        found = score_matrix(postings, folder, 0.9, 0.4)
    index = bm25s.BM25(k1=0.9, b=0.4)
    ids = [[postings.vocabulary[word] for word in words] for words in tokens]
    index.index((ids, dict(postings.vocabulary)), create_empty_token=False, show_progress=False)
    want = index.scores
    assert found["num_docs"] == want["num_docs"]
    for name in ("indptr", "indices"):
        np.testing.assert_array_equal(found[name], want[name])
    np.testing.assert_allclose(found["data"], want["data"], rtol=1e-6)
    assert found["data"].dtype == want["data"].dtype
    assert found["indices"].dtype == want["indices"].dtype
    remove_temporaries(folder)
    assert list(folder.iterdir()) == []


@given(st.text())
def test_words_have_no_accents_in_any_script(text):
    plain = unicodedata.normalize("NFKD", text.lower())
    assert tokenize(text) == _WORD.findall("".join(char for char in plain if not unicodedata.combining(char)))
