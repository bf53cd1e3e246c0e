"""What generating the SFT set will take, before anything runs: samples, tokens, engine hours, and what will be kept.

A problem's samples are right with a share of its own, drawn from a Beta distribution around `expected.right_share`; so
the number of right ones among n is beta-binomial, and the rounds of adaptive sampling have expected lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, exp, lgamma

from pipeline.recipe import GenerateConfig, Recipe

CONCENTRATION = 2.0  # of the Beta distribution: at a mean of one half every share is as likely as any other


@dataclass(frozen=True)
class DomainPlan:
    """One domain's generation. Tokens are of samples, but for `judged_tokens`, which a judge writes.

    first, expected, most: samples of the first round, on average, and if no problem is ever solved. hours: of one
    engine, judgements included; of a teacher that has prices usd is known instead.
    kept: samples that rejection is expected to keep; wanted: what the quota asks of it.
    """

    domain: str
    answered_by: str
    problems: int
    prompts: int  # problems in each of their forms
    first: int
    expected: float
    most: int
    prompt_tokens: float
    completion_tokens: float
    judged_tokens: float
    hours: float | None
    usd: float | None
    kept: float
    wanted: float


def plan_generation(recipe: Recipe) -> list[DomainPlan]:
    """A plan for every domain of the recipe, at its `generate.expected` figures."""
    shares = recipe.curate.quotas or dict.fromkeys(recipe.domains, 1 / len(recipe.domains))
    return [_plan(recipe, name, recipe.curate.total * shares.get(name, 0.0)) for name in recipe.domains]


def _plan(recipe: Recipe, name: str, wanted: float) -> DomainPlan:
    domain, config = recipe.domains[name], recipe.generation(name)
    expected, teacher = config.expected, domain.teacher
    problems = min(config.problems, domain.splits.get("sft", 0))
    prompts = problems * len(config.forms)
    samples = prompts * expected_samples(config)
    written = {"original": expected.original_tokens, "reasoning": expected.reasoning_tokens}
    completion_tokens = samples / len(config.forms) * sum(written[form] for form in config.forms)
    judged_tokens = samples * expected.judgement_tokens if domain.judged else 0.0
    hours: float | None = (completion_tokens + judged_tokens) / expected.engine_tokens_per_second / 3600
    usd = None
    if teacher is not None and (teacher.input_price or teacher.output_price):
        hours = None
        # a judge reads the problem and the answer without its thinking
        read = samples * expected.prompt_tokens + bool(domain.judged) * samples * (
            expected.prompt_tokens + expected.original_tokens)
        usd = (read * teacher.input_price + (completion_tokens + judged_tokens) * teacher.output_price) / 1e6
    return DomainPlan(
        name, teacher.model if teacher else f"expert-{name}", problems, prompts, prompts * config.samples, samples,
        prompts * config.cap, samples * expected.prompt_tokens, completion_tokens, judged_tokens, hours, usd,
        prompts * expected_kept(config, recipe.reject.keep), wanted)


def round_sizes(config: GenerateConfig) -> list[int]:
    """Samples that a problem and form has after each round."""
    sizes = [config.samples]
    while sizes[-1] < config.cap:
        sizes.append(min(2 * sizes[-1], config.cap))
    return sizes


def expected_samples(config: GenerateConfig) -> float:
    """Mean number of samples for a problem and form."""
    sizes, share = round_sizes(config), config.expected.right_share
    return sizes[0] + sum((after - before) * fewer_right(config.wanted, before, share)
                          for before, after in zip(sizes, sizes[1:], strict=False))


def expected_kept(config: GenerateConfig, keep: int) -> float:
    """Mean number of right samples for a problem and form, of which rejection keeps no more than `keep`.

    Beyond those that end the rounds only the first round counts, which is a little too few.
    """
    share = config.expected.right_share
    return sum(1 - fewer_right(count, config.cap if count <= config.wanted else config.samples, share)
               for count in range(1, keep + 1))


def fewer_right(count: int, samples: int, share: float) -> float:
    """Probability that fewer than `count` of `samples` are right, over all problems."""
    a, b = CONCENTRATION * share, CONCENTRATION * (1 - share)
    return sum(comb(samples, right) * exp(_log_beta(right + a, samples - right + b) - _log_beta(a, b))
               for right in range(min(count, samples + 1)))


def _log_beta(a: float, b: float) -> float:
    return lgamma(a) + lgamma(b) - lgamma(a + b)
