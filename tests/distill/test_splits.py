import dataclasses

import pytest

from distill.problems import GENERATORS
from distill.prompts import prompt_key
from distill.splits import assign, check_disjoint
from pipeline.recipe import DomainConfig
from pipeline.stage import StageError


def config(**splits) -> DomainConfig:
    return DomainConfig.model_validate({"source": {"type": "generated", "generator": "math"}, "splits": splits})


def problems(count=100):
    return list(GENERATORS["math"](count, 0))


def test_splits_get_their_counts_and_share_no_prompt():
    assigned = assign({"math": problems()}, {"math": config(corpus=40, sft=20, rl=10, heldout=30)}, seed=0)
    by_split = {split: {prompt_key(p.messages) for p in assigned if p.split == split}
                for split in ("corpus", "sft", "rl", "heldout")}
    assert {s: len(keys) for s, keys in by_split.items()} == {"corpus": 40, "sft": 20, "rl": 10, "heldout": 30}
    assert len(set.union(*by_split.values())) == 100


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_rows():
    domains = {"math": config(sft=20, heldout=10)}
    once = assign({"math": problems()}, domains, seed=0)
    assert once == assign({"math": problems()[::-1]}, domains, seed=0)
    assert once != assign({"math": problems()}, domains, seed=1)


def test_more_training_rows_leave_the_heldout_rows_as_they_were():
    few = assign({"math": problems()}, {"math": config(sft=5, heldout=10)}, seed=0)
    many = assign({"math": problems()}, {"math": config(sft=50, heldout=10)}, seed=0)
    assert [p for p in few if p.split == "heldout"] == [p for p in many if p.split == "heldout"]


def test_a_training_row_with_the_words_of_a_heldout_row_is_left_out():
    train = problems(11)
    shouted = ({"role": "user", "content": "  " + train[0].messages[0]["content"].upper().replace(" ", "  ")},)
    held = dataclasses.replace(train[0], id="0" * 16, messages=shouted, split="heldout")
    assigned = assign({"math": [*train, held]}, {"math": config(sft=10, heldout=1)}, seed=0)
    assert [p.id for p in assigned if p.split == "heldout"] == [held.id]
    assert train[0].id not in {p.id for p in assigned}
    with pytest.raises(StageError, match="sft: 11 problems wanted, 10 left"):
        assign({"math": [*train, held]}, {"math": config(sft=11, heldout=1)}, seed=0)


def test_a_reserved_heldout_row_of_one_domain_is_kept_out_of_the_others():
    rows = problems(3)
    held = dataclasses.replace(rows[0], split="heldout")
    assigned = assign({"a": rows, "b": [held]}, {"a": config(sft=2), "b": config(heldout=1)}, seed=0)
    assert {p.id for p in assigned if p.split == "sft"} == {rows[1].id, rows[2].id}


def test_too_few_problems_stop_with_domain_split_and_counts():
    with pytest.raises(StageError, match=r"domains.math.splits.sft: 95 problems wanted, 90 left of the 100"):
        assign({"math": problems()}, {"math": config(sft=95, heldout=10)}, seed=0)


def test_check_disjoint_finds_one_prompt_in_two_splits():
    [problem] = problems(1)
    with pytest.raises(StageError, match="must not share"):
        check_disjoint([dataclasses.replace(problem, split="sft"), dataclasses.replace(problem, split="rl")])
