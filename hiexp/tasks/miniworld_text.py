"""Words of the miniworld: name pools, trap families and the sentences that questions and articles are made of.

The vocabulary is closed, so a policy with one token per word meets no unknown word in a new world; the pools of
different roles share no word, so that a name of one role can never be mistaken for (or leak) a name of another.

A *trap family* is a pair of attributes that the same article states side by side, and a direction: the phrase of the
question decides which of the two is asked for. The phrase is a combination of words, most of which occur in several
families ("first shown" asks for the premiere, "widely shown" for the release), so neither a single word nor exact
matching of phrases is the key. Nothing in an article says which attribute a phrase means: that is the lesson to be
learnt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["artist", "film", "play", "guild"]
ValueType = Literal["year", "person", "town"]


def _words(line: str) -> tuple[str, ...]:
    return tuple(line.split())


TITLE_FIRST = _words(
    "amber bitter broken crimson distant empty fading gentle golden hidden hollow iron lonely lost midnight narrow "
    "painted quiet restless scarlet secret silent silver sleeping stolen velvet wandering whispering winter wooden"
)
TITLE_LAST = _words(
    "anchor bridge candle carnival cathedral compass corridor crown desert feather fountain garden harbor horizon "
    "island lantern letter mirror mountain orchard palace river shadow staircase station storm tower violin voyage "
    "window"
)
ARTIST_FIRST = _words(
    "ada agnes arno bela cato clara dario edith egon elsa emil flora greta hugo ilse ivo jonas klara leo lena "
    "magda milo nora oskar petra rosa selma theo ursula viktor"
)
ARTIST_LAST = _words(
    "abel adler berg bloch brandt cohen dahl ehrlich falk fischer frank gruber haas holm jensen kern kraus lang "
    "lindt meyer moll novak olsen pohl reiss roth sachs stein vogel weiss"
)
PERSON = _words(
    "ahrens barth busch conrad decker ernst fuchs geiger hahn hartmann jung keller klein lorenz marx nagel otten "
    "peters quast richter sauer schulz thiel ulrich voss wagner winkler zimmer"
)
TOWN = _words(
    "ashby barrow cliffe dunmore elford fenwick glenn hasting ilford kirkby lowick marston norham oakley penrith "
    "radley selby thirsk upton walden yarrow"
)
GUILD_FIRST = _words("bakers brewers carvers coopers dyers glovers masons millers potters sailors tanners weavers")
GUILD_LAST = _words("alliance assembly chamber circle college company council fellowship league lodge society union")
YEARS = tuple(str(year) for year in range(1931, 1961))

# Names are two words, first and last.
NAME_POOLS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "artist": (ARTIST_FIRST, ARTIST_LAST),
    "title": (TITLE_FIRST, TITLE_LAST),
    "guild": (GUILD_FIRST, GUILD_LAST),
}


# Values are one word: copying the second word of two that both occur in several facts is what a tiny policy learns
# last.
VALUE_POOLS: dict[ValueType, tuple[str, ...]] = {"year": YEARS, "person": PERSON, "town": TOWN}


@dataclass(frozen=True, slots=True)
class Pair:
    """Two attributes of one kind of thing that are easily confused.

    Attributes:
        trap: the kind of confusion.
        kinds: the kind of entity that has each attribute; they differ only for things that share a name.
        attributes: the words under which articles state them.
        phrases: the wording of a question that asks for each.
        rephrased: another wording for each, which shares words with its own phrase and with phrases of other families.
        value: what both values are.
    """

    trap: str
    kinds: tuple[Kind, Kind]
    attributes: tuple[str, str]
    phrases: tuple[str, str]
    rephrased: tuple[str, str]
    value: ValueType


PAIRS: tuple[Pair, ...] = (
    # Things that share a name: only titles that are both a film and a play are asked about.
    Pair(
        "same name", ("film", "play"), ("screen", "stage"), ("directed cameras for", "directed curtains for"),
        ("ran cameras for", "ran curtains for"), "person",
    ),
    Pair(
        "premiere or composition", ("play",) * 2, ("composed", "premiere"), ("written up", "first shown"),
        ("first written", "really shown"), "year",
    ),
    Pair(
        "patron or dedicatee", ("play",) * 2, ("dedicated", "commissioned"), ("stood behind", "paid for"),
        ("ran behind", "paid up"), "person",
    ),
    Pair(
        "end of work or release", ("film",) * 2, ("finished", "released"), ("wrapped up", "widely shown"),
        ("really wrapped", "widely opened"), "year",
    ),
    Pair(
        "location or setting", ("film",) * 2, ("shot", "setting"), ("take form", "take place"),
        ("build form", "begin place"), "town",
    ),
    Pair(
        "origin or recognition", ("guild",) * 2, ("founded", "chartered"), ("first opened", "widely joined"),
        ("once opened", "first joined"), "year",
    ),
    Pair(
        "acting or nominal office", ("guild",) * 2, ("elected", "acting"), ("stood for", "really ran"),
        ("once stood for", "really directed"), "person",
    ),
    Pair(
        "stale or updated page", ("guild",) * 2, ("listed", "updated"), ("once ran", "now runs"),
        ("once directed", "now directed"), "person",
    ),
    Pair(
        "birthplace or residence", ("artist",) * 2, ("birthplace", "residence"), ("begin life", "build life"),
        ("begin life up", "build life up"), "town",
    ),
    Pair(
        "student or teacher", ("artist",) * 2, ("studied", "taught"), ("begin work", "build classes"),
        ("take work", "take classes"), "town",
    ),
    Pair(
        "earlier or later", ("artist",) * 2, ("debut", "finale"), ("first heard", "last heard"),
        ("heard first up", "heard last up"), "year",
    ),
)  # fmt: skip

# {e} is the entity, {p} the phrase of the family. Two wordings each, so that equal families are not equal strings.
QUESTION_FRAMES: dict[ValueType, tuple[str, str]] = {
    "year": ("which year was {e} {p}", "name the year {e} was {p}"),
    "person": ("who {p} {e}", "name the person who {p} {e}"),
    "town": ("which town saw {e} {p}", "name the town that saw {e} {p}"),
}

# Wordings of a family: both sentences with its phrase, then both with its rephrased one. Questions take the first two
# unless the caller asks for others.
PHRASED, REPHRASED = (0, 1), (2, 3)

# How an article states a fact: {a} the attribute, {v} the value.
FACT_FRAMES = ("{a} {v}", "its {a} {v}", "with {a} {v}")
ARTICLE_WORDS = (",", "a", "an", "artist", "film", "guild", "play")


@dataclass(frozen=True, slots=True)
class Family:
    """One direction of a pair: the phrase asks for ``right``; ``trap`` stands beside it in the articles."""

    pair: Pair
    direction: int

    @property
    def right(self) -> str:
        """The attribute asked for."""
        return self.pair.attributes[self.direction]

    @property
    def trap(self) -> str:
        """The attribute it is confused with."""
        return self.pair.attributes[1 - self.direction]

    @property
    def phrase(self) -> str:
        """The wording that asks for ``right``."""
        return self.pair.phrases[self.direction]

    def sentence(self, name: str, wording: int) -> str:
        """The question of wording 0 to 3 about ``name``."""
        frame = QUESTION_FRAMES[self.pair.value][wording % 2]
        return frame.format(e=name, p=self.said(wording))

    def said(self, wording: int) -> str:
        """The phrase of wording 0 to 3."""
        return (self.pair.phrases, self.pair.rephrased)[wording // 2][self.direction]

    @property
    def name(self) -> str:
        """Unique name, e.g. ``premiere/composed``: right attribute first."""
        return f"{self.right}/{self.trap}"

    @property
    def lesson(self) -> str:
        """What an agent should learn, in the words of an experience's description."""
        return f"look for {self.right} , not {self.trap}"


FAMILIES: tuple[Family, ...] = tuple(Family(pair, direction) for pair in PAIRS for direction in (0, 1))


def vocabulary() -> list[str]:
    """Every word that a question, an article or an answer of any world can hold, sorted, without duplicates."""
    words = set(ARTICLE_WORDS)
    for first, last in NAME_POOLS.values():
        words.update(first, last)
    words.update(*VALUE_POOLS.values())
    for pair in PAIRS:
        words.update(pair.attributes, *(phrase.split() for phrase in (*pair.phrases, *pair.rephrased)))
    for frames in (*QUESTION_FRAMES.values(), FACT_FRAMES):
        words.update(word for frame in frames for word in frame.split() if not word.startswith("{"))
    return sorted(words)
