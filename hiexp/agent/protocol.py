"""Turn grammars: how an agent asks for a search, how documents come back, how it gives its answer.

A :class:`Dialect` is data plus three pure text functions: build a prompt, format documents, parse a turn. Tags are
those of the stacks the dialect comes from (``hiexp``: the paper's; ``search_r1`` and ``r1_searcher``: theirs), prompts
are ours. ``hiexp_compact`` has the tags of ``hiexp`` and no instructions: it is for tiny closed-vocabulary policies,
whose tokenizer splits at spaces, so it puts spaces around every tag and lower-cases what it inserts.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

ActionKind = Literal["search", "answer", "none"]

# Chat-template and instruction markers of common model families; none may reach a prompt through retrieved text.
_CHAT_TOKENS = re.compile(
    r"<\|[^|<>]{0,64}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
# Control characters; invisible ones that part or join what a reader sees (zero-width, bidirectional, "tag" characters);
# lone surrogates.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U000e0000-\U000e007f\ud800-\udfff]"
)

BOX_OPEN, BOX_CLOSE = "\\boxed{", "}"
COMPACT_TAGS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", BOX_OPEN, BOX_CLOSE,
)  # fmt: skip
# Every literal word that hiexp_compact writes besides its tags: a closed vocabulary must contain them.
COMPACT_WORDS = ("hint", ":", ";", "|", "nothing", "found")


class DocumentLike(Protocol):
    """What a dialect formats: see :class:`hiexp.agent.tools.Document`."""

    @property
    def title(self) -> str: ...
    @property
    def text(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Action:
    """What a turn asks for. ``kind`` "none": nothing that could be carried out. ``thought``: the text before it."""

    kind: ActionKind
    text: str
    thought: str = ""


class ToolReply(NamedTuple):
    """A tool response in three parts, so that the body can be cut to a token limit and the tags stay whole."""

    opening: str
    body: str
    closing: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """One turn grammar.

    Attributes:
        name: key in :data:`DIALECTS`.
        query_tags, reply_tags, answer_tags: opening and closing tag of a query, of a tool response, of the answer.
        template: prompt with the fields ``{instructions}``, ``{experience}`` and ``{question}``.
        instructions: what an instructed model is told; left out by ``build_prompt(..., instructions=False)``.
        document: one document, with the fields ``{rank}``, ``{title}`` and ``{text}``.
        separator: between documents, and between documents and experience.
        start_experience, tool_experience: what stands around ``{experience}`` in a prompt, in a tool response.
        empty, failed: body of a tool response without documents, after a failure of the tool.
        chat: whether the prompt is a user message where the tokenizer has a chat template.
        compact: lower-case inserted text, one space between words, spaces around tags.
        continuation: put behind every tool response, as the beginning of the next turn.
    """

    name: str
    query_tags: tuple[str, str]
    reply_tags: tuple[str, str]
    answer_tags: tuple[str, str]
    template: str
    document: str
    separator: str = "\n"
    instructions: str = ""
    start_experience: str = "Experience from earlier attempts at similar questions:\n{experience}\n\n"
    tool_experience: str = "Experience: {experience}"
    empty: str = "The search returned no documents."
    failed: str = "The search failed."
    think_tags: tuple[str, str] = ("<think>", "</think>")
    chat: bool = True
    compact: bool = False
    continuation: str = ""
    tags: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        pairs = (self.think_tags, self.query_tags, self.reply_tags, self.answer_tags)
        # A bare brace is part of ordinary text and mathematics; only the opening of the box makes it a tag.
        object.__setattr__(self, "tags", tuple(tag for pair in pairs for tag in pair if tag != BOX_CLOSE))

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn. One that ends in ``{}`` means: opened there, and all braces closed again."""
        answer = f"{BOX_OPEN}{BOX_CLOSE}" if self.answer_tags[1] == BOX_CLOSE else self.answer_tags[1]
        return (self.query_tags[1], answer)

    def sanitize(self, text: str, banned: Sequence[str] = ()) -> str:
        """Make foreign text harmless: no tag of this dialect, chat token, control character or ``banned`` string.

        Each is replaced by a space, so that what stood around it cannot close up to a new tag.
        """
        text = self.plain(_CONTROL.sub(" ", text))  # before the tags are looked for: it may write them
        found = True
        while found:  # what a replacement brings together is looked at again
            cleaned = _CHAT_TOKENS.sub(" ", text)
            for token in (*self.tags, *banned):
                # A tokenizer whose special tokens are blanks or single characters must not eat ordinary text.
                if len(token.strip()) > 1:
                    cleaned = cleaned.replace(token, " ")
            found, text = cleaned != text, cleaned
        # Tokenizers that fold compatibility forms (full-width letters and brackets) would read a tag where none stands.
        folded = unicodedata.normalize("NFKC", text)
        cleaned = self.sanitize(folded, banned) if folded != text else folded
        return self.plain(text if cleaned == self.plain(folded) else cleaned)

    def plain(self, text: str) -> str:
        """Lower-case and single-spaced in a compact dialect; unchanged in the others."""
        return " ".join(text.lower().split()) if self.compact else text

    def build_prompt(self, question: str, experience: str | None = None, *, instructions: bool = True) -> str:
        """The prompt of a question, with rendered experience lines (text, may span lines) or without."""
        lines = _fill(self.start_experience, {"experience": experience}) if experience else ""
        fields = {"instructions": self.instructions if instructions else "", "experience": lines, "question": question}
        prompt = _fill(self.template, fields)
        return prompt.strip() if self.compact else prompt

    def format_body(self, documents: Sequence[DocumentLike], banned: Sequence[str] = ()) -> str:
        """The sanitised documents alone; empty without documents."""
        return self.separator.join(
            _fill(self.document, {"rank": str(rank), "title": self._inline(document.title, banned),
                                  "text": self.sanitize(document.text, banned).strip()})
            for rank, document in enumerate(documents, start=1)
        )  # fmt: skip

    def enclose(self, body: str) -> ToolReply:
        """``body`` between the tags of a tool response."""
        gap, line = (" ", " ") if self.compact else ("\n\n", "\n")
        return ToolReply(
            f"{gap}{self.reply_tags[0]}{line}", body, f"{line}{self.reply_tags[1]}{gap}{self.continuation}"
        )

    def format_tool_experience(self, experience: str) -> str:
        """What is put between documents and closing tag for an experience line."""
        return self.separator + _fill(self.tool_experience, {"experience": experience})

    def _inline(self, title: str, banned: Sequence[str]) -> str:
        return " ".join(self.sanitize(title, banned).split())

    def format_documents(self, documents: Sequence[DocumentLike], experience: str | None = None) -> str:
        """The whole text of a tool response; the experience line stands after the documents, inside the tags."""
        reply = self.enclose(self.format_body(documents) or self.empty)
        extra = self.format_tool_experience(experience) if experience else ""
        return f"{reply.opening}{reply.body}{extra}{reply.closing}"

    def parse(self, turn: str) -> Action:
        """The first complete action of a turn (the one whose closing tag comes first), wherever it stands.

        Never raises: text without a complete, non-empty action gives ``Action("none", ...)``.
        """
        query, answer = _enclosed(turn, *self.query_tags), _enclosed(turn, *self.answer_tags)
        if query is None and answer is None:
            return Action("none", "", self._thought(turn))
        if answer is None or (query is not None and query[1] <= answer[1]):
            assert query is not None
            (start, end), kind = query, "search"
            text = _unwrap_call(turn[start:end])
            tag = self.query_tags[0]
        else:
            (start, end), kind = answer, "answer"
            text, tag = turn[start:end], self.answer_tags[0]
        thought = self._thought(turn[: start - len(tag)])
        text = " ".join(_CONTROL.sub(" ", _CHAT_TOKENS.sub(" ", text)).split())
        if not text:
            return Action("none", "", thought)
        return Action("search" if kind == "search" else "answer", text, thought)

    def _thought(self, text: str) -> str:
        for tag in self.think_tags:
            text = text.replace(tag, " ")
        return _CHAT_TOKENS.sub(" ", text).strip()


def _fill(template: str, fields: dict[str, str]) -> str:
    """Replace ``{name}`` in one pass, so that braces inside the values stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: fields[match.group(1)], template)


def _enclosed(text: str, opening: str, closing: str) -> tuple[int, int] | None:
    """``(start, end)`` of what stands between the first opening tag that gets closed and its closing tag."""
    start = text.find(opening)
    while start >= 0:
        inside = start + len(opening)
        end = closing_brace(text, inside) if closing == BOX_CLOSE else text.find(closing, inside)
        if end >= 0:
            # Of repeated opening tags the last one before the closing tag counts.
            nested = text.rfind(opening, inside, end) if closing != BOX_CLOSE else -1
            return (nested + len(opening) if nested >= 0 else inside, end)
        start = text.find(opening, inside)
    return None


def closing_brace(text: str, start: int) -> int:
    """Index of the brace that closes a group whose inside begins at ``start``; -1 if none. ``\\{`` does not count."""
    depth, position = 1, start
    while position < len(text):
        char = text[position]
        if char == "\\":
            position += 1
        elif char == "{":
            depth += 1
        elif char == "}":
            depth -= 1
            if depth == 0:
                return position
        position += 1
    return -1


def _unwrap_call(text: str) -> str:
    """The query of a JSON function call (``{"arguments": {"query": ...}}``), or the text itself where it is none."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return text
    arguments = call.get("arguments", call) if isinstance(call, dict) else call
    query = arguments.get("query") if isinstance(arguments, dict) else None
    if isinstance(query, list):
        query = " ".join(part for part in query if isinstance(part, str))
    return query if isinstance(query, str) else text


_HIEXP = Dialect(
    name="hiexp",
    query_tags=("<tool_call>", "</tool_call>"),
    reply_tags=("<tool_response>", "</tool_response>"),
    answer_tags=(BOX_OPEN, BOX_CLOSE),
    instructions=(
        "Answer the question below. Reason step by step between <think> and </think>. Whenever you need a fact, write "
        "one search query between <tool_call> and </tool_call> and stop: the results are given to you between "
        "<tool_response> and </tool_response>. You may search several times. When you are sure, write the final "
        "answer, as short as possible, inside \\boxed{}.\n\n"
    ),
    template="{instructions}{experience}Question: {question}\n",
    document="[{rank}] {title}\n{text}",
)

_COMPACT = Dialect(
    name="hiexp_compact",
    query_tags=_HIEXP.query_tags,
    reply_tags=_HIEXP.reply_tags,
    answer_tags=_HIEXP.answer_tags,
    template="{question} {experience}",
    document="{text}",
    separator=" | ",
    start_experience="hint : {experience} ;",
    tool_experience="hint : {experience}",
    empty="nothing found",
    failed="nothing found",
    chat=False,
    compact=True,
)

_SEARCH_R1 = Dialect(
    name="search_r1",
    query_tags=("<search>", "</search>"),
    reply_tags=("<information>", "</information>"),
    answer_tags=("<answer>", "</answer>"),
    instructions=(
        "Answer the question below. First reason between <think> and </think>, and do so again after every new piece "
        "of information. If a fact is missing, ask the search engine with <search> your query </search>; what it finds "
        "comes back between <information> and </information>. Search as often as you like. Once nothing is missing, "
        "give the answer alone, without explanation, between <answer> and </answer>.\n\n"
    ),
    template="{instructions}{experience}Question: {question}\n",
    document="Doc {rank}(Title: {title}) {text}",
)

_R1_SEARCHER = Dialect(
    name="r1_searcher",
    query_tags=("<|begin_of_query|>", "<|end_of_query|>"),
    reply_tags=("<|begin_of_documents|>", "<|end_of_documents|>"),
    answer_tags=("<answer>", "</answer>"),
    instructions=(
        "A user asks a question and an assistant answers it. The assistant first thinks it through between <think> and "
        "</think>, then gives the final answer between <answer> and </answer>. While thinking it can look facts up: it "
        "writes <|begin_of_query|> keywords <|end_of_query|> and receives <|begin_of_documents|> passages "
        "<|end_of_documents|>. One query asks for one fact.\n\n"
    ),
    template="{instructions}{experience}User: {question}\nAssistant: <think>",
    document="({rank})Title: {title} Text: {text}",
    chat=False,
)

DIALECTS: dict[str, Dialect] = {d.name: d for d in (_HIEXP, _COMPACT, _SEARCH_R1, _R1_SEARCHER)}


def get_dialect(name: str | Dialect) -> Dialect:
    """A dialect by name; a :class:`Dialect` is passed through. Raises ValueError for an unknown name."""
    if isinstance(name, Dialect):
        return name
    if name not in DIALECTS:
        raise ValueError(f"dialect: expected one of {sorted(DIALECTS)}, got {name!r}")
    return DIALECTS[name]


_OPENINGS = {
    closing: opening for dialect in DIALECTS.values() for opening, closing in (dialect.query_tags, dialect.answer_tags)
}


def opening_tag(closing: str) -> str:
    """The tag that ``closing`` closes: as a dialect above has it, ``<x>`` for ``</x>``, empty where there is none."""
    return _OPENINGS.get(closing) or (f"<{closing[2:]}" if closing.startswith("</") else "")
