"""The ways ``hiexp eval`` lets one model answer: its own turn grammar, prompting only, without search; with HEK or not.

``prompting`` assumes nothing that RL has taught: full instructions and a worked example, through the chat template, in
the spirit of Search-o1 (arXiv 2501.05366; its separate step that condenses documents is left out). ``direct`` has no
search at all: what the model knows by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hiexp.agent.demonstration import demonstration
from hiexp.agent.protocol import BOX_OPEN, Dialect, get_dialect
from hiexp.rl.act import Actor

if TYPE_CHECKING:
    from hiexp.agent.engine import Engine, Sampling
    from hiexp.agent.rollout import SearchAgent
    from hiexp.agent.tools import Tool
    from hiexp.rl.config import TrainConfig

Style = Literal["policy", "prompting", "direct"]


@dataclass(frozen=True, slots=True)
class ArmKind:
    """One arm: its name in tables, how the model is addressed, whether it sees the HEK, what it is compared with."""

    title: str
    style: Style
    hek: bool = False
    against: str = "without_hek"


ARMS: Mapping[str, ArmKind] = {
    "without_hek": ArmKind("without HEK", "policy"),
    "with_hek": ArmKind("with HEK", "policy", hek=True),
    "prompting": ArmKind("prompting", "prompting"),
    "prompting_hek": ArmKind("prompting with HEK", "prompting", hek=True, against="prompting"),
    "direct": ArmKind("no search", "direct"),
}

_TEMPLATE = "{instructions}{experience}Question: {question}\n"


def prompting_dialect(dialect: Dialect, max_turns: int) -> Dialect:
    """The tags of ``dialect`` with everything else said in the prompt.

    Raises:
        ValueError: the dialect has no place for instructions (hiexp_compact, for closed vocabularies).
    """
    _check_instructed(dialect)
    think, query, reply = (
        f"{tags[0]} and {tags[1]}" for tags in (dialect.think_tags, dialect.query_tags, dialect.reply_tags)
    )
    instructions = (
        "You answer a question with the help of a search engine, turn by turn. Begin each turn by thinking between "
        f"{think}: what the question asks, what you know for sure, which one fact is missing. To look a fact up, write "
        f"a short query between {query} and stop; the passages found are shown to you between {reply}. Keep what bears "
        "on the question and ignore the rest. Where nothing useful came, ask in other words. A question may need "
        f"several facts one after the other. You may search at most {max(max_turns - 1, 0)} times. When the facts "
        f"suffice, or no search is left, write {_answer_form(dialect)}.\n\nAn example:\n\n"
    )
    plain = dataclasses.replace(dialect, template=_TEMPLATE, continuation="", chat=True)
    example = demonstration(plain).rstrip()
    return dataclasses.replace(
        plain, instructions=f"{instructions}{example}\n\nNow the question you are to answer.\n\n"
    )


def direct_dialect(dialect: Dialect) -> Dialect:
    """The answer tags of ``dialect`` for a model that may not search.

    Raises:
        ValueError: as :func:`prompting_dialect`.
    """
    _check_instructed(dialect)
    think = f"{dialect.think_tags[0]} and {dialect.think_tags[1]}"
    instructions = (
        f"Answer the question below from what you know; nothing can be looked up. Think step by step between {think}, "
        f"then write {_answer_form(dialect)}.\n\n"
    )
    return dataclasses.replace(dialect, template=_TEMPLATE, instructions=instructions, continuation="", chat=True)


def _check_instructed(dialect: Dialect) -> None:
    if "{instructions}" not in dialect.template:
        raise ValueError(
            f"rollout.dialect: expected one with instructions for the arms prompting and direct, got {dialect.name!r}"
        )


def _answer_form(dialect: Dialect) -> str:
    opening, closing = dialect.answer_tags
    if opening == BOX_OPEN:
        return f"the final answer, as short as possible, inside {opening}{closing}"
    return f"the final answer alone, as short as possible, between {opening} and {closing}"


class ArmActor(Actor):
    """An :class:`Actor` that addresses the model in the style of one arm."""

    def __init__(self, engine: Engine, tool: Tool, config: TrainConfig, style: Style) -> None:
        super().__init__(engine, tool, config)
        self.style = style

    def agent(self, sampling: Sampling) -> SearchAgent:
        """The agent that answers as this arm does."""
        return self._agent(self.tool, sampling)

    def _agent(self, tool: Tool, sampling: Sampling) -> SearchAgent:
        agent = super()._agent(tool, sampling)
        if self.style == "policy":
            return agent
        dialect = get_dialect(self.config.rollout.dialect)
        if self.style == "direct":
            return dataclasses.replace(agent, dialect=direct_dialect(dialect), max_turns=1)
        return dataclasses.replace(agent, dialect=prompting_dialect(dialect, agent.max_turns))


def choose_arms(names: Sequence[str] | None, has_hek: bool, dialect: str) -> list[str]:
    """The arms to run, in the order of :data:`ARMS`; by default without HEK and, where there is one, with it.

    Raises:
        ValueError: an unknown arm, an arm with HEK where none is given, a dialect that an arm cannot use.
    """
    if names is None:
        return ["without_hek", "with_hek"] if has_hek else ["without_hek"]
    for name in names:
        if name not in ARMS:
            raise ValueError(f"--arms: expected names among {', '.join(ARMS)}; got {name!r}")
        if ARMS[name].hek and not has_hek:
            raise ValueError(f"--arms: {name} needs experience; give --hek HEK, or set experience.hek")
        if ARMS[name].style != "policy":
            _check_instructed(get_dialect(dialect))
    return [name for name in ARMS if name in names]
