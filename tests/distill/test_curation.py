import dataclasses
from collections import Counter

import pytest

from distill.curation import curate
from distill.problems import GENERATORS
from distill.prompts import prompt_messages, worked_completion
from distill.shingles import Shingler, jaccard
from pipeline.recipe import CurateConfig
from pipeline.records import Check, Problem, Sample, content_id
from pipeline.stage import StageError


def pool(name, count):
    return [dataclasses.replace(p, split="sft") for p in GENERATORS[name](count, 0)]


def sample(problem, form="original", completion=None):
    completion = worked_completion(problem, form) if completion is None else completion
    return Sample(id=content_id(problem.id, form, completion), problem_id=problem.id, domain=problem.domain, form=form,
                  messages=prompt_messages(problem, form, "Think first."), completion=completion, checkpoint="c",
                  sampling="{}", finish_reason="stop", tokens=len(completion))


def both_forms(problems):
    return [sample(p, form) for p in problems for form in ("original", "reasoning")]


def asked(text, split="sft"):
    messages = ({"role": "user", "content": text},)
    check = Check(kind="exact", reference="yes")
    return Problem(id=Problem.make_id(messages, check), domain="logic", skill="s", messages=messages, check=check,
                   source="s", split=split, solution="So yes.", answer="\\boxed{yes}")


def balanced(funnel):
    return all(row["in"] == row["out"] + sum(row["lost"].values()) for row in funnel.values())


def test_domains_and_forms_are_mixed_to_their_quotas():
    problems = pool("math", 100) + pool("logic", 100)
    config = CurateConfig(total=100, quotas={"math": 0.7, "logic": 0.3}, reasoning_share=0.6)
    kept, dropped, funnel = curate(both_forms(problems), problems, config, seed=0)
    assert Counter((s.domain, s.form) for s in kept) == {("math", "reasoning"): 42, ("math", "original"): 28,
                                                        ("logic", "reasoning"): 18, ("logic", "original"): 12}
    assert {reason for _, reason in dropped} <= {"quota", "near_duplicate"}
    assert balanced(funnel) and funnel["math"]["quota"] == {"wanted": 70, "got": 70, "reasoning": 42}


def test_quotas_are_even_by_default_and_a_short_domain_gives_what_it_has():
    problems = pool("math", 60) + pool("logic", 10)
    kept, _, funnel = curate([sample(p) for p in problems], problems, CurateConfig(total=80), seed=0)
    assert Counter(s.domain for s in kept) == {"math": 40, "logic": 10}
    assert funnel["logic"]["quota"] == {"wanted": 40, "got": 10, "reasoning": 0}
    assert funnel["math"]["lost"] == {"quota": 20}


def test_plainly_asked_samples_think_at_most_in_the_share_that_is_given():
    problems = pool("math", 60)
    rows = [sample(p, completion=worked_completion(p, "reasoning" if i % 2 else "original"))
            for i, p in enumerate(problems)]
    kept, dropped, funnel = curate(rows, problems, CurateConfig(total=1000, plain_thinking={"math": 0.25}), seed=0)
    thinks = sum("<think>" in s.completion for s in kept)
    direct = len(kept) - thinks
    assert thinks == round(direct / 3) and funnel["math"]["lost"]["plain_thinking"] == 30 - thinks and balanced(funnel)


def test_the_mix_depends_on_the_seed_and_not_on_the_order_of_samples():
    problems = pool("math", 60)
    samples, config = both_forms(problems), CurateConfig(total=30)
    once = curate(samples, problems, config, seed=0)[0]
    assert once == curate(samples[::-1], problems, config, seed=0)[0]
    assert once != curate(samples, problems, config, seed=1)[0]


def test_exact_duplicates_up_to_case_and_space_are_dropped():
    p = asked("Is the sky blue today?")
    samples = [sample(p), sample(p, completion="  \\BOXED{yes} "), sample(p, "reasoning")]
    kept, dropped, _ = curate(samples, [p], CurateConfig(total=10), seed=0)
    assert len(kept) == 2 and [reason for _, reason in dropped] == ["duplicate"]


def test_near_duplicates_are_dropped_and_other_problems_of_a_template_are_not():
    p = asked("Tell me whether the number is prime and say why.")
    words = [f"word{i}" for i in range(200)]
    first, changed = " ".join(words), " ".join([*words[:-1], "other"])
    samples = [sample(p, completion=first), sample(p, completion=changed)]
    kept, dropped, _ = curate(samples, [p], CurateConfig(total=10), seed=0)
    assert len(kept) == 1 and [reason for _, reason in dropped] == ["near_duplicate"]
    problems = [p for name in ("math", "code", "logic", "writing") for p in pool(name, 200)]
    _, dropped, _ = curate(both_forms(problems), problems, CurateConfig(total=10_000), seed=0)
    lost = sum(reason == "near_duplicate" for _, reason in dropped)
    assert lost < 0.02 * 2 * len(problems)


def test_heldout_prompts_and_long_overlaps_are_taken_out():
    story = "Once a fox saw nine crows on a wall and three of them flew away before noon"
    held = [asked("Is it late?", "heldout"), asked(f"{story}. How many are left?", "heldout")]
    clean = asked("Nine crows and a fox met on a wall. How many legs have they got?")
    samples = [sample(asked("is it  LATE?")), sample(asked(f"Read this. {story}! Was it cold?")), sample(clean)]
    kept, dropped, funnel = curate(samples, [*held, clean], CurateConfig(total=10), seed=0)
    assert [s.problem_id for s in kept] == [clean.id]
    assert {reason for _, reason in dropped} == {"heldout_prompt", "heldout_overlap"}
    assert balanced(funnel)


def test_words_of_the_template_are_not_contamination():
    template = "Read the sentence below with care and then tell me in one word whether it is true: "
    held = [asked(f"{template}bird {i}", "heldout") for i in range(11)]
    train = asked(f"{template}fish")
    kept, _, _ = curate([sample(train)], [*held, train], CurateConfig(total=10), seed=0)
    assert len(kept) == 1


def test_a_domain_with_a_quota_and_no_samples_stops_with_the_funnel():
    problems = pool("math", 5)
    config = CurateConfig(total=10, quotas={"math": 0.5, "code": 0.5})
    with pytest.raises(StageError, match=r"nothing for code:\n  math: 5 in, 5 out\n|nothing for code"):
        curate([sample(p) for p in problems], problems, config, seed=0)


def test_ngrams_are_those_of_the_words_and_bands_are_shared_by_near_equal_sets():
    shingler = Shingler()
    one = shingler.ngrams("The cat sat. On the mat!", 3)
    assert len(one) == 4
    assert (one == Shingler().ngrams("the  CAT sat on the mat", 3)).all()
    assert len(shingler.ngrams("two words", 3)) == 0
    assert jaccard(one, shingler.ngrams("the cat sat on the hat", 3)) == 3 / 5
    text = [f"w{i}" for i in range(300)]
    near, far = [*text[:-2], "x", "y"], [f"v{i}" for i in range(300)]
    bands = [set(shingler.bands(shingler.ngrams(" ".join(words), 5))) for words in (text, near, far)]
    assert bands[0] & bands[1] and not bands[0] & bands[2]
