"""The guard: what must never reach a prompt – gold answers, chat tokens, control characters, links, instructions.

It runs when an entry is written (a failing entry is kept as ``quarantine``, never served) and its cleaning half,
:func:`sanitise`, runs again when an entry is rendered. Gold answers are kept as salted hashes: that keeps them from
being read or copied by accident; it is no secrecy against guessing, answers are short.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from hiexp.experience.record import Experience

if TYPE_CHECKING:
    from hiexp.experience.retrieve import Snapshot
    from hiexp.tasks.question import Question

LIMITS = {"title": 1000, "description": 4000, "thinking": 20_000, "tags": 1000}  # characters

# A one-word answer that stands in this many known questions ("american", "film", "2012") is an ordinary word of the
# domain: it is checked only in entries of its own question. Without this, the answers of 10,000 real questions put one
# real lesson in five into quarantine.
COMMON_IN_QUESTIONS = 3

# Letters and digits from which an answer of several words is also looked for as one word: shorter ones ("in to") are
# words of their own.
JOINED_FROM = 6

# Markup of the dialects and of common chat templates. Matching is wide on purpose: a lesson needs no markup at all.
_MARKUP = re.compile(
    r"<\|[^<>|]{0,64}\|>"  # <|im_start|>, <|begin_of_query|>
    r"|</?[a-z][\w-]*(?:\s[^<>]{0,200})?/?>"  # <think>, </tool_call>, <s>
    r"|<<\s*/?\s*sys\s*>>|\[/?inst\]"
    r"|\\boxed\s*\{",
    re.IGNORECASE,
)
# A marker cut in two by another marker, or one that a template could complete.
_MARKUP_ENDS = re.compile(r"<\||\|>|</")
_LINK = re.compile(r"\b(?:https?|ftp)://\S+|\bwww\.\S+", re.IGNORECASE)
_INSTRUCTION = re.compile(
    r"\b(?:ignore|disregard|forget|override)\b[^.;]{0,40}\b(?:previous|prior|above|earlier|all|any|your|these|system)\b"
    r"[^.;]{0,40}\b(?:instruction|prompt|rule|message|guideline)s?\b"
    r"|\bsystem prompt\b|\b(?:developer|jailbreak) mode\b|\byou are now\b[^.;]{0,40}\b(?:assistant|model|ai)\b"
    r"|\b(?:always|just|simply) (?:answer|reply|respond) (?:with|that)\b",
    re.IGNORECASE,
)
_TOKEN = re.compile(r"[^\W_]+")
_SPELLED = re.compile(r"\b[^\W_](?:[\W_]{1,3}[^\W_]\b)+")  # "S a o", "P-a-u-l-o"
_DIGIT_GROUPS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_ARTICLES = frozenset({"a", "an", "the"})
# Answers that say nothing by themselves: any lesson may use these words.
_EMPTY_ANSWERS = frozenset(
    ["yes", "no", "true", "false", "both", "neither", "none", "unknown", "same", "different", "first", "second"]
)


def normalise_tokens(text: str) -> tuple[str, ...]:
    """Words for matching: compatibility form, no accents, lower case, ``1,000`` as ``1000``, no articles."""
    folded = text.casefold()
    if not text.isascii():
        folded = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text)).casefold()
        folded = "".join(c for c in folded if not unicodedata.combining(c))
    return tuple(word for word in _TOKEN.findall(_DIGIT_GROUPS.sub("", folded)) if word not in _ARTICLES)


def _token_forms(text: str) -> list[tuple[str, ...]]:
    """Words of ``text``; where it spells words out ("S a o Paulo"), a second time with these put together."""
    spelled = _SPELLED.sub(lambda run: "".join(_TOKEN.findall(run[0])), text)
    return [normalise_tokens(form) for form in dict.fromkeys((text, spelled))]


def text_key(text: str) -> str:
    """Key of a question's normalised text: questions with equal keys are duplicates of each other."""
    return "text:" + hashlib.sha256(" ".join(normalise_tokens(text)).encode()).hexdigest()[:24]


@dataclass(frozen=True, slots=True)
class AnswerHash:
    """One gold answer as the store keeps it.

    Attributes:
        digest: salted hash of all its words. first: of its first word, which lets a check skip most positions.
        n_tokens: how many words.
        question_id: whose answer it is; empty where unknown.
        own_only: too short to mean anything outside its own question; checked only in entries of that question.
    """

    digest: str
    first: str
    n_tokens: int
    question_id: str
    own_only: bool


def hash_answers(gold_answers: Mapping[str, Sequence[str]], salt: str) -> list[AnswerHash]:
    """Hash the answers of each question id (``""`` for answers whose question is unknown).

    ``yes``, ``no`` and the like are dropped. One word of fewer than four letters or digits counts only in entries of
    its own question: ``2`` or ``red`` stand in too many lessons. Several words with six letters or digits or more are
    hashed a second time as one word, so that ``SaoPaulo`` is known for ``São Paulo``.
    """
    hashed = []
    for question_id, answers in gold_answers.items():
        if isinstance(answers, str):
            raise TypeError(f"gold_answers[{question_id!r}]: expected a sequence of answers, got one string")
        for answer in answers:
            tokens = normalise_tokens(answer)
            if not tokens or (len(tokens) == 1 and tokens[0] in _EMPTY_ANSWERS):
                continue
            own_only = len(tokens) == 1 and len(tokens[0]) < 4
            joined = ("".join(tokens),)
            for form in dict.fromkeys((tokens, joined) if len(joined[0]) >= JOINED_FROM else (tokens,)):
                first = _digest(form[:1], salt)
                hashed.append(AnswerHash(_digest(form, salt), first, len(form), question_id, own_only))
    return hashed


def _digest(tokens: Sequence[str], salt: str) -> str:
    return hashlib.blake2b(" ".join(tokens).encode(), digest_size=16, salt=salt.encode()[:16]).hexdigest()


class Guard:
    """Checks entries before they are written.

    Answers are found whatever their case, accents, punctuation and articles, run together (``SaoPaulo``) and with their
    words spelled out (``S a o Paulo``). Not found: abbreviations, misspellings, translations, and answers cut at places
    where they have no space (``Zan zibar``).

    Args:
        gold_answers: answers of all known train and test questions: question id -> answers, or plain answers.
        question_texts: question id -> text, of the questions that entries may come from.
    """

    def __init__(
        self,
        gold_answers: Mapping[str, Sequence[str]] | Iterable[str] = (),
        question_texts: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(gold_answers, str):
            raise TypeError("gold_answers: expected a mapping or a sequence of answers, got one string")
        by_question = gold_answers if isinstance(gold_answers, Mapping) else {"": list(gold_answers)}
        self._salt = ""
        self._question_texts = dict(question_texts or {})
        self._index(hash_answers(by_question, self._salt))

    @classmethod
    def from_hashes(cls, answers: Iterable[AnswerHash], salt: str, question_texts: Mapping[str, str]) -> Guard:
        """Rebuild a guard from what a HEK stores."""
        guard = cls((), question_texts)
        guard._salt = salt
        guard._index(answers)
        return guard

    def _index(self, answers: Iterable[AnswerHash]) -> None:
        self._anywhere: set[str] = set()
        self._own: dict[str, set[str]] = {}  # digest -> ids of the questions it answers
        self._lengths: dict[str, set[int]] = {}  # digest of a first word -> lengths of the answers that start with it
        self._first_of: dict[str, str] = {}  # word -> its digest; entries repeat their words
        common = self._common_words()
        for answer in answers:
            if not answer.own_only and answer.digest not in common:
                self._anywhere.add(answer.digest)
            self._own.setdefault(answer.digest, set()).add(answer.question_id)
            self._lengths.setdefault(answer.first, set()).add(answer.n_tokens)

    def _common_words(self) -> set[str]:
        """Digests of the words that several questions use: as one-word answers they say nothing outside their own."""
        counts = Counter(word for text in self._question_texts.values() for word in set(normalise_tokens(text)))
        return {_digest((word,), self._salt) for word, count in counts.items() if count >= COMMON_IN_QUESTIONS}

    def check(self, experience: Experience, question_texts: Sequence[str] | None = None) -> str | None:
        """Why ``experience`` must not be served, or None. The reason never repeats the offending text.

        Args:
            question_texts: texts of the questions it came from, besides those the guard knows. An answer that stands in
                its own question's text ("which is older, A or B?") is no leak.
        """
        fields = {
            "title": experience.title,
            "description": experience.description,
            "tags": " ; ".join(experience.tags),
            "thinking": experience.thinking,
        }
        for name in ("title", "description"):
            if not fields[name].strip():
                return f"{name}: empty"
        for name, text in fields.items():
            reason = lint(text, LIMITS[name])
            if reason is not None:
                return f"{name}: {reason}"
        return self._check_answers(experience, fields, question_texts or ())

    def _check_answers(self, experience: Experience, fields: Mapping[str, str], extra: Sequence[str]) -> str | None:
        if not self._own:
            return None
        own = self._own_questions(experience.qa_groups)
        known = [self._question_texts[q] for q in sorted(own) if q in self._question_texts]
        questions: list[str] | None = None  # normalised only once an answer was found
        for name, text in fields.items():
            for found in (answer for tokens in _token_forms(text) for answer in self._answers_in(tokens, own)):
                if questions is None:
                    questions = [f" {' '.join(form)} " for t in (*known, *extra) for form in _token_forms(t)]
                if not any(f" {' '.join(found)} " in question for question in questions):
                    return f"{name}: holds a gold answer of a known question"
        return None

    def _own_questions(self, names: Sequence[str]) -> set[str]:
        """``names`` and all known questions with the same text: one question has another id in every file."""
        keys = {text_key(self._question_texts[name]) if name in self._question_texts else name for name in names}
        return {*names, *(other for key in keys for other in self._same_text.get(key, ()))}

    @cached_property
    def _same_text(self) -> dict[str, list[str]]:
        """Key of a text -> ids of the questions with that text."""
        found: dict[str, list[str]] = {}
        for name, text in self._question_texts.items():
            found.setdefault(text_key(text), []).append(name)
        return found

    def _answers_in(self, tokens: tuple[str, ...], own: set[str]) -> Iterable[tuple[str, ...]]:
        for start, word in enumerate(tokens):
            first = self._first_of.get(word)
            if first is None:
                first = self._first_of[word] = _digest((word,), self._salt)
            for length in self._lengths.get(first, ()):
                candidate = tokens[start : start + length]
                if len(candidate) < length:
                    continue
                digest = _digest(candidate, self._salt)
                if digest in self._anywhere or not own.isdisjoint(self._own.get(digest, ())):
                    yield candidate


def leaking_entries(snapshot: Snapshot, questions: Iterable[Question]) -> list[tuple[str, str]]:
    """Entries of ``snapshot`` that must not be shown to an agent that is asked ``questions``: exp_id and reason.

    A snapshot may come from a HEK that never heard of these questions; before a run this tells whether it holds their
    answers. It is the check of :class:`Guard`: an answer in the text of an entry's own question is no leak, so pass the
    questions that the entries were drawn from along with the others. One file's ids are not another's: an entry's
    question is known by its text as well.
    """
    asked = list(questions)
    guard = Guard({one.id: one.golden_answers for one in asked}, {one.id: one.text for one in asked})
    reasons = []
    for entry in snapshot.entries:
        keys = tuple(snapshot.aliases.get(name, name) for name in entry.qa_groups)
        reasons.append((entry.exp_id, guard.check(replace(entry, qa_groups=(*entry.qa_groups, *keys)))))
    return [(exp_id, reason) for exp_id, reason in reasons if reason is not None]


def lint(text: str, limit: int) -> str | None:
    """The first thing in ``text`` that has no place in a lesson, or None."""
    if len(text) > limit:
        return f"longer than {limit} characters"
    if not text.isprintable() and any(map(_is_control, text)):  # the first test is fast and seldom fails
        return "control characters"
    if _MARKUP.search(text) or _MARKUP_ENDS.search(text):
        return "chat tokens or tags"
    if _LINK.search(text):
        return "a link"
    if _INSTRUCTION.search(text):
        return "an instruction to the model"
    return None


def sanitise(text: str, limit: int = LIMITS["description"]) -> str:
    """``text`` as one plain line of at most ``limit`` characters: no control characters, chat tokens, tags, links."""
    # Format characters (zero-width and the like) go first: they could split a marker and hide it from the patterns.
    text = "".join(" " if c.isspace() else c for c in text if c.isspace() or not _is_control(c))
    previous = None
    while text != previous:  # what is left of a removed marker may form another
        previous = text
        for pattern in (_MARKUP, _MARKUP_ENDS, _LINK):
            text = pattern.sub(" ", text)
        text = " ".join(text.split())
    return text[:limit].rstrip()


def _is_control(character: str) -> bool:
    # Cc control, Cf format (zero-width, text direction), Cs surrogate, Co private use; line breaks and tabs are
    # harmless.
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co") and character not in "\n\t"
