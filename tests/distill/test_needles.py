import random

import pytest
from tiny_models import tiny_tokenizer

from distill.needles import ASKED, KINDS, LEAST_ITEMS, MENTIONS, items_that_fit, needle
from policy.tokenizer import completion_ids, prompt_ids

TOKENIZER = tiny_tokenizer(1024)  # words of several tokens, of different lengths


def encode(messages, completion):
    return len(prompt_ids(TOKENIZER, messages)) + len(completion_ids(TOKENIZER, completion))


def parts(row):
    """The words of the context, and the kinds asked for."""
    words, _, asked = row[0][0]["content"].removesuffix(" .").partition(f" .\n{ASKED}")
    return words.split(), asked.split()


def places(words, kind):
    return [place for place, word in enumerate(words) if word in KINDS[kind]]


@pytest.mark.parametrize("depth", [None, 0.0, 0.25, 0.6, 1.0])
def test_the_answer_is_the_latest_mention_of_every_kind_asked_for(depth):
    for seed in range(30):
        row = needle(random.Random(seed), 40, depth=depth, asked=1 + seed % 3)
        words, asked = parts(row)
        assert len(words) == 40 and len(asked) == 1 + seed % 3
        assert row[1].removesuffix(" .") == " ".join(f"{kind} {words[places(words, kind)[-1]]}" for kind in asked)
        assert all(1 <= len(places(words, kind)) <= MENTIONS for kind in KINDS)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.6, 1.0])
def test_the_fact_stands_at_the_depth_after_earlier_mentions(depth):
    for seed in range(30):
        words, asked = parts(needle(random.Random(seed), 40, depth=depth))
        found = places(words, asked[0])
        assert found[-1] == round(depth * 39)
        assert len(found) == (1 if depth == 0 else MENTIONS)


@pytest.mark.parametrize("length", [250, 400, 1000])
def test_a_row_of_the_items_that_fit_is_never_longer(length):
    items = items_that_fit(length, encode)
    sizes = [encode(*needle(random.Random(seed), items, asked=3)) for seed in range(50)]
    assert 0.5 * length < max(sizes) <= length


def test_a_length_without_room_for_the_mentions_is_a_clear_error():
    with pytest.raises(ValueError, match=f"needles: 60 tokens have room for .* at least {LEAST_ITEMS}"):
        items_that_fit(60, encode)


def test_a_row_is_the_same_for_the_same_seed_and_differs_otherwise():
    rows = [needle(random.Random(seed), 30) for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]
