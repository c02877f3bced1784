"""What an agent writes with its own hand: prompts with experience lines, as text and as tokens.

What is inserted is tokenised alone, part by part, so that every experience line has tokens of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hiexp.agent.protocol import get_dialect
from hiexp.experience.prompt import render_start, render_tool
from hiexp.tasks.question import Question

if TYPE_CHECKING:
    from hiexp.agent.rollout import SearchAgent
    from hiexp.experience.retrieve import Hit

_SLOT = "\x00"  # marks where experience goes in a prompt; cleaned text cannot contain it


class Writer:
    """Prompts of one agent. ``limit``: most tokens of a rollout; ``context``: those of the engine."""

    def __init__(self, agent: SearchAgent) -> None:
        self.tokenizer = agent.engine.tokenizer
        self.dialect = get_dialect(agent.dialect)
        self.context = agent.engine.context_length
        self.limit = min(agent.max_total_tokens or self.context, self.context)
        self.banned = reserved_tokens(self.tokenizer)
        self.chat = self.dialect.chat if agent.chat_template is None else agent.chat_template
        self.chat = self.chat and getattr(self.tokenizer, "chat_template", None) is not None
        self._instructions = agent.instructions
        self._prompts: dict[tuple[str, bool], list[list[int]]] = {}  # rows of a group share theirs

    def check_prompts(self, questions: Sequence[Question]) -> None:
        """Raise ValueError for the first question whose prompt, without experience, leaves no room in the limit."""
        for question in questions:
            text = "".join(self._prompt_parts(question.text, False))
            # A token is at least a byte: nearly all prompts are short enough not to be tokenised.
            if len(text.encode()) + len(self._beginning) >= self.limit:
                self.fitting(question.id, question.text, [])

    def fitting(
        self, question_id: str, question: str, entries: Sequence[Hit]
    ) -> tuple[list[list[int]], list[tuple[Hit, list[int]]]]:
        """Tokens of the prompt's parts, and of the best entries that leave room in the limit for a token to sample.

        Raises:
            ValueError: the prompt does not fit even without experience.
        """
        for count in range(len(entries), -1, -1):
            parts = self._prompt_tokens(question, count > 0)
            lines = [(hit, self.encode(line)) for hit, line in self._start_lines(entries[:count])]
            length = sum(map(len, parts)) + sum(len(token_ids) for _, token_ids in lines)
            if length < self.limit:
                return parts, lines
        raise ValueError(
            f"question {question_id!r}: its prompt has {length} tokens and leaves no room in the limit of "
            f"{self.limit} tokens (context {self.context})"
        )

    def _prompt_tokens(self, question: str, with_slot: bool) -> list[list[int]]:
        key = (question, with_slot)
        if key not in self._prompts:
            first, *rest = map(self.encode, self._prompt_parts(question, with_slot))
            # A chat template writes its own beginning-of-sequence token.
            self._prompts[key] = [first if self.chat else self._beginning + first, *rest]
        return self._prompts[key]

    def _prompt_parts(self, question: str, with_slot: bool) -> list[str]:
        """Prompt text, cut where the experience goes."""
        text = self.dialect.build_prompt(
            self.dialect.sanitize(question, self.banned).strip(),
            _SLOT if with_slot else None,
            instructions=self._instructions,
        )
        if self.chat:
            message = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return text.split(_SLOT)

    def _start_lines(self, entries: Sequence[Hit]) -> list[tuple[Hit, str]]:
        """Each entry with its text in the prompt, what separates it from the next included."""
        kept = [hit for hit in entries if render_tool(hit)]
        if not kept:
            return []
        if self.dialect.compact:
            lines, between = [self.lesson(hit) for hit in kept], " ; "
        else:
            lines, between = render_start(kept).split("\n"), "\n"
        lines = [self.dialect.sanitize(line, self.banned) for line in lines]
        return [
            (hit, line + (between if place < len(kept) - 1 else ""))
            for place, (hit, line) in enumerate(zip(kept, lines, strict=True))
        ]

    def lesson(self, hit: Hit) -> str:
        """One entry as a line of text."""
        line = render_tool(hit)
        # The first clause is the lesson in plain words; quotations after it are outside a closed vocabulary.
        return self.dialect.sanitize(line.split(" ; ")[0] if self.dialect.compact else line, self.banned)

    def encode(self, text: str) -> list[int]:
        """Tokens of ``text`` alone."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of tokens as they are."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    @cached_property
    def _beginning(self) -> list[int]:
        """What the tokenizer puts before every text, e.g. a beginning-of-sequence token."""
        bos = self.tokenizer.bos_token_id
        alone: list[Any] = list(self.tokenizer("")["input_ids"])
        return [bos] if bos is not None and alone[:1] == [bos] else []


def reserved_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Strings that foreign text must not contain: special tokens, and added ones that look like markup.

    Tool tags of chat models (``<tool_call>`` of Qwen) are added tokens that are not called special.
    """
    added = getattr(tokenizer, "get_added_vocab", dict)()
    markup = [token for token in added if (token[:1], token[-1:]) in {("<", ">"), ("[", "]")}]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *sorted(markup)]))
