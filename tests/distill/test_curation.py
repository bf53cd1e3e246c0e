import dataclasses
from collections import Counter

import datasets
import numpy as np
import polars as pl
import pytest
from sft_set_stages import curate, prepare_curate

from distill.problems import GENERATORS
from distill.prompts import prompt_messages, worked_completion
from distill.shingles import Words, bands, level, shorten, signatures, similarity
from pipeline.recipe import CurateConfig
from pipeline.records import Check, Problem, Sample, content_id
from pipeline.stage import StageError
from workflows import sft_set


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
    drawn = [{s.id for s in curate(rows, problems, config, seed)[0]}
             for rows, seed in ((samples, 0), (samples[::-1], 0), (samples, 1))]
    assert drawn[0] == drawn[1] != drawn[2]


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


def test_solutions_must_not_repeat_those_of_the_evaluation_set_or_texts_of_its_files(tmp_path):
    chain = "the first train needs four hours and the second one leaves at noon so they meet near the old mill"
    held = dataclasses.replace(asked("When do they meet?", "heldout"), solution=chain)
    file = tmp_path / "bench.jsonl"
    file.write_text('{"question": "Is it late?", "n": 3}\n')
    clean, copied, known = (asked(text) for text in ("Where do rivers end?", "Why?", "is it late?"))
    samples = [sample(clean, completion="In the sea."), sample(copied, completion=f"Since {chain}."), sample(known)]
    config = CurateConfig(total=10, evaluation_files=(str(file),))
    kept, dropped, _ = curate(samples, [held, clean, copied, known], config, seed=0)
    assert [s.problem_id for s in kept] == [clean.id]
    assert dict((s.problem_id, reason) for s, reason in dropped) == {copied.id: "heldout_overlap",
                                                                     known.id: "heldout_prompt"}
    file.write_text("{not json\n")
    with pytest.raises(StageError, match="bench.jsonl, line 1: not valid JSON"):
        curate(samples, [held], config, seed=0)
    file.unlink()
    with pytest.raises(StageError, match="evaluation_files: .*bench.jsonl does not exist"):
        curate(samples, [held], config, seed=0)


def test_sums_of_small_numbers_are_no_contamination():
    held = dataclasses.replace(asked("When do they meet?", "heldout"),
                               solution="9 + 1 -> 10 - 4 -> 6 - 4 -> 2 + 4 -> 6 so it is 6")
    p = asked("How many are left?")
    kept, _, _ = curate([sample(p, completion="9 + 1 -> 10 - 4 -> 6 - 4 -> 2 + 4 -> 6 so it is 6")], [held, p],
                        CurateConfig(total=9), seed=0)
    assert len(kept) == 1


def test_broken_encodings_are_dropped():
    p = asked("How far is it?")
    kept, dropped, _ = curate([sample(p, completion="Ten\ufffd miles."), sample(p)], [p], CurateConfig(total=9), seed=0)
    assert len(kept) == 1 and [reason for _, reason in dropped] == ["garbled"]


def test_the_set_opens_with_datasets_and_its_splits_share_no_problem(tmp_path):
    problems = pool("math", 300)
    stage = prepare_curate(tmp_path, both_forms(problems), problems, CurateConfig(total=500, validation_share=0.1),
                           per_part=150)
    counts = sft_set.curate(stage).counts
    loaded = datasets.load_dataset(str(stage.out / "dataset"), cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in loaded.items()} == {split: counts[split] for split in loaded}
    assert counts["train"] + counts["validation"] == counts["out"] == 500 and 20 < counts["validation"] < 90
    assert not set(loaded["train"]["problem_id"]) & set(loaded["validation"]["problem_id"])
    card = (stage.out / "dataset/README.md").read_text()
    assert "| math | 500 | 500 | 250 |" in card and "generated:math" in card and "license: unknown" in card


def test_parts_of_any_size_give_the_same_set():
    problems = pool("math", 80)
    samples, config = both_forms(problems), CurateConfig(total=100)
    whole, split = curate(samples, problems, config, seed=3), curate(samples, problems, config, seed=3, per_part=7)
    assert whole[0] == split[0] and whole[2] == split[2]


def test_ngrams_are_those_of_the_words_and_never_reach_into_the_next_text():
    texts = pl.Series(["The cat sat. On the mat!", "the  CAT sat on the mat", "two words", "", "\u6570\u5b66\u9898 x"])
    words = Words.of(level(texts))
    assert np.diff(words.starts).tolist() == [6, 6, 2, 0, 4]
    grams = words.ngrams(3)
    assert np.diff(grams.starts).tolist() == [4, 4, 0, 0, 2]
    assert (grams.hashes[:4] == grams.hashes[4:8]).all() and len(set(grams.hashes.tolist())) == 6
    assert grams.texts_of(np.arange(10)).tolist() == [0] * 4 + [1] * 4 + [4] * 2


def test_near_equal_texts_share_a_band_and_signatures_estimate_their_similarity():
    rng = np.random.default_rng(0)
    base = [[f"w{i}" for i in rng.integers(0, 10**6, 300)] for _ in range(40)]
    near = [[*words[:-6], *(f"x{i}" for i in rng.integers(0, 10**6, 6))] for words in base]
    sides = [Words.of(pl.Series([" ".join(words) for words in side])).ngrams(5) for side in (base, near)]
    signed = [signatures(side) for side in sides]
    sets = [[set(side.hashes[a:b].tolist()) for a, b in zip(side.starts, side.starts[1:], strict=False)]
            for side in sides]
    exact = [len(a & b) / len(a | b) for a, b in zip(*sets, strict=True)]
    found = similarity(*(shorten(one) for one in signed))
    assert abs(found - exact).max() < 0.08 and abs((found - exact).mean()) < 0.01
    group = np.zeros(40, dtype=np.uint64)
    keys = [bands(one, group) for one in signed]
    assert (keys[0] == keys[1]).any(axis=1).all()
    assert not (keys[0] == bands(signed[1], group + np.uint64(1))).any()
    assert not any(set(keys[0][i].tolist()) & set(keys[0][i + 1].tolist()) for i in range(39))
