import random
from pathlib import Path

import pytest

from distill.generation_plan import expected_kept, expected_samples, fewer_right, plan_generation, round_sizes
from pipeline.recipe import ExpectedConfig, GenerateConfig
from pipeline.recipe_file import load_recipe
from workflows.prices import short

RECIPES = Path(__file__).parents[2] / "recipes"


def config(samples=4, most=None, wanted=1, share=0.5):
    return GenerateConfig(samples=samples, most_samples=most, wanted=wanted, expected=ExpectedConfig(right_share=share))


def test_where_every_share_is_as_likely_the_number_of_right_ones_is_too():
    assert [fewer_right(count, 4, 0.5) for count in range(6)] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(("samples", "most", "sizes"), [(4, None, [4]), (4, 16, [4, 8, 16]), (2, 7, [2, 4, 7])])
def test_rounds_double_up_to_the_cap(samples, most, sizes):
    assert round_sizes(config(samples, most)) == sizes


@pytest.mark.parametrize(("wanted", "share"), [(1, 0.5), (2, 0.3), (3, 0.8)])
def test_the_plan_is_what_sampling_in_rounds_takes_on_average(wanted, share):
    chosen, rng, problems = config(2, 16, wanted, share), random.Random(0), 40_000
    taken = kept = 0
    for _ in range(problems):
        own = rng.betavariate(2 * share, 2 - 2 * share)
        right = made = 0
        for size in round_sizes(chosen):
            right += sum(rng.random() < own for _ in range(size - made))
            made = size
            if right >= wanted:
                break
        taken += made
        kept += right >= wanted
    assert expected_samples(chosen) == pytest.approx(taken / problems, rel=0.02)
    assert expected_kept(chosen, wanted) - expected_kept(chosen, wanted - 1) == pytest.approx(kept / problems, rel=0.02)


def test_tokens_hours_and_money_follow_from_the_recipes_figures():
    recipe = load_recipe(RECIPES / "smoke.yaml", [
        "generate={problems: 100, samples: 2, max_tokens: 100, expected: {prompt_tokens: 10, original_tokens: 20, "
        "reasoning_tokens: 40, judgement_tokens: 5, engine_tokens_per_second: 10}}",
        "domains.code.generate={forms: [original], samples: 3}",
        "domains.writing.teacher={url: http://x, model: r1, input_price: 1, output_price: 2}",
        "curate={total: 1000, quotas: {math: 0.5, code: 0.25, writing: 0.25}}"])
    math, code, writing = plan_generation(recipe)
    assert (math.answered_by, math.prompts, math.first, math.expected, math.most) == ("expert-math", 200, 400, 400, 400)
    assert (math.prompt_tokens, math.completion_tokens, math.judged_tokens) == (4000, 400 * 30, 0)
    assert math.hours == pytest.approx(12000 / 10 / 3600) and math.usd is None
    assert math.kept == pytest.approx(200 * 2 / 3) and math.wanted == 500
    assert (code.prompts, code.first, code.completion_tokens) == (100, 300, 6000)
    # a judge reads the problem and the plain answer, and writes five tokens
    assert (writing.answered_by, writing.hours, writing.judged_tokens) == ("r1", None, 2000)
    assert writing.usd == pytest.approx((400 * 10 + 400 * 30 + 2 * (12000 + 2000)) / 1e6)


def test_the_recipe_of_the_paper_fills_its_quotas_with_600_000_samples_that_reason():
    recipe = load_recipe(RECIPES / "deepseek-v3.yaml")
    plans = {plan.domain: plan for plan in plan_generation(recipe)}
    assert all(plan.kept > plan.wanted > 0 for plan in plans.values())
    reasoning = [plan for name, plan in plans.items() if "reasoning" in recipe.generation(name).forms]
    assert sum(plan.wanted for plan in reasoning) == pytest.approx(600_000)
    assert sum(plan.wanted for plan in plans.values()) == pytest.approx(1_500_000)
    assert {"writing", "role-play", "qa", "translation", "self-cognition"} == set(plans) - {
        plan.domain for plan in reasoning}


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (512, "512"), (1234, "1.23k"), (4.5e7, "45M"), (3.6e9, "3.6B")])
def test_large_numbers_are_short(number, text):
    assert short(number) == text
