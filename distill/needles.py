"""Facts to find in long contexts, to train and to measure retrieval by depth (DeepSeek-V3 section 4.3, figure 8).

A context is a list of words: fillers, and names, things and colours that are mentioned several times, each time anew.
The question asks for the latest name (or thing, or colour); the answer is `name Ann`. The earlier mentions make it
depend on positions: a model that tells earlier from later within its context takes a wrong mention beyond it.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from distill.problems.drawing import NAMES
from distill.problems.logic import COLORS
from distill.problems.writing import NOUNS, QUALITIES
from pipeline.records import Message

KINDS = {"name": NAMES, "thing": NOUNS, "color": COLORS}
FILLERS = QUALITIES
MENTIONS = 4  # of a kind, at most
APART = 8  # the latest mention stands an eighth of the context behind those before it
LEAST_ITEMS = MENTIONS * len(KINDS)
ASKED = "Latest: "

Row = tuple[tuple[Message, ...], str]  # messages, completion


def needle(rng: Random, items: int, *, depth: float | None = None, asked: int = 1) -> Row:
    """A context of `items` words, a question about `asked` kinds, and the answer.

    depth: where in the context (0 to 1) the latest mention of the first kind asked for stands, after MENTIONS - 1
    earlier ones if there is room before it; with None every kind has up to MENTIONS mentions anywhere.
    """
    words = [rng.choice(FILLERS) for _ in range(items)]
    free = rng.sample(range(items), items)
    kinds = rng.sample(list(KINDS), len(KINDS))
    latest = {}
    for kind in kinds:
        last, mentions = free[0], rng.randint(1, MENTIONS)
        if depth is not None and kind == kinds[0]:
            last, mentions = round(depth * (items - 1)), MENTIONS
        earlier = [place for place in free if place <= last - items // APART]
        for place in (*earlier[:mentions - 1], last):
            words[place] = latest[kind] = rng.choice(KINDS[kind])
            free.remove(place)
    return _row(words, {kind: latest[kind] for kind in kinds[:asked]})


def items_that_fit(length: int, encode: Callable[[tuple[Message, ...], str], int]) -> int:
    """The most words of a context whose row, whatever it asks for, has at most `length` tokens.

    encode: the tokens of a conversation and its completion. Raises ValueError when there are fewer than LEAST_ITEMS.
    """
    longest, fixed = 0.0, 0
    for word in (*FILLERS, *(word for words in KINDS.values() for word in words)):
        one, nine = (encode(*_row([word] * count, dict.fromkeys(KINDS, word))) for count in (1, 9))
        longest, fixed = max(longest, (nine - one) / 8), max(fixed, one)
    items = int((length - fixed) / longest) + 1
    if items < LEAST_ITEMS:
        raise ValueError(f"needles: {length} tokens have room for {max(0, items)} words beside the question; a context "
                         f"has at least {LEAST_ITEMS}")
    return items


def _row(words: list[str], asked: dict[str, str]) -> Row:
    # a space after every word, the last ones too: a tokenizer that keeps spaces with words then has one token for each
    content = f"{' '.join(words)} .\n{ASKED}{' '.join(asked)} ."
    answer = " ".join(f"{kind} {word}" for kind, word in asked.items())
    return ({"role": "user", "content": content},), f"{answer} ."
