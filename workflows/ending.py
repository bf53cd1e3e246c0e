"""The last stages: evaluate every model on held-out problems, export the final one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial

from pipeline.records import Sample, write_table
from pipeline.stage import StageContext, StageResult
from workflows.data import load_problems
from workflows.inference import check_infrastructure, open_model, open_verifier

ROUTED_TEXTS = 64  # answers per domain whose routes are looked at


def evaluate(context: StageContext) -> StageResult:
    """`evaluation.json`: {"models": {name: {domain: row}}} for base, each expert in its domain, SFT and RL.

    Problems stand alone, only experts get the reflective prompt they are trained with; the metrics tell what the base
    model makes of that prompt.
    """
    from evaluation.benchmark import ALL, accuracy, pooled, win_rate

    config, domains = context.config["evaluation"], context.config["domains"]
    problems = {name: load_problems(context, "heldout", name) for name in domains}
    kinds = {name: rows[0].check.kind for name, rows in problems.items() if rows}
    judged = {name for name, kind in kinds.items() if kind == "principles"}
    matched = {name for name, kind in kinds.items() if kind == "match"}
    problems = {name: rows[:config.judged_problems if name in judged else config.problems]
                for name, rows in problems.items() if rows}
    models = {"base": ("extend" if "extend" in context.inputs else "base", list(problems), "original"),
              **{f"expert-{name}": (f"expert-{name}-rl", [name], "reasoning") for name in problems
                 if f"expert-{name}-rl" in context.inputs},
              "sft": ("sft", list(problems), "original"), "rl": ("rl", list(problems), "original")}
    answers: dict[str, dict[str, list[Sample]]] = {label: {} for label in models}
    result: dict[str, dict[str, dict]] = {label: {} for label in models}
    kept: list[Sample] = []
    reflective: dict[str, float | None] = {}
    waiting: dict[tuple[str, str], tuple[list[Sample], list[Sample]]] = {}
    ruled = [problem for name, rows in problems.items() if name not in judged | matched for problem in rows]
    with open_verifier(None, ruled, context.config["isolation"]) as verifier:
        for label, (stage, own, form) in models.items():
            model = open_model(context.inputs[stage] / "checkpoint", context.config["model"], context.config["engine"],
                               context.seed)
            ask = partial(_answers, context, model, label=label)
            for name in own:
                greedy = ask(problems[name], form, samples=1, temperature=0.0)
                if name in judged:
                    answers[label][name] = greedy
                    kept += greedy
                    continue
                sampled = ask(problems[name][:config.k_problems], form, samples=config.k,
                              temperature=config.temperature)
                if name in matched:
                    answers[label][name] = greedy
                    waiting[label, name] = greedy, sampled
                    continue
                greedy, sampled = (_verified(verifier, rows, problems[name]) for rows in (greedy, sampled))
                result[label][name] = accuracy(greedy, sampled, config.k)
                answers[label][name] = greedy
                kept += greedy + sampled
                context.progress.note(f"{label} on {name}: {_percent(result[label][name]['accuracy'])}")
                if label == "base":
                    thought = _verified(verifier, ask(problems[name], "reasoning", samples=1, temperature=0.0),
                                        problems[name])
                    reflective[f"base/{name}/reflective"] = accuracy(thought, [], config.k)["accuracy"]
                    kept += thought
    judge = None
    if matched or any(_measure(problem, "") is None for name in judged for problem in problems[name]):
        model = open_model(context.inputs["reward-model"] / "checkpoint", context.config["model"],
                           context.config["engine"], context.seed)
        judge = model.judge(context.seed)
    with open_verifier(judge, [], context.config["isolation"]) as verifier:
        for (label, name), rows in waiting.items():
            greedy, sampled = (_verified(verifier, part, problems[name]) for part in rows)
            result[label][name] = accuracy(greedy, sampled, config.k)
            kept += greedy + sampled
            context.progress.note(f"{label} on {name}: {_percent(result[label][name]['accuracy'])} match")
    check_infrastructure([sample.verdict for sample in kept if sample.verdict], context.name)
    for label, (_, own, _) in models.items():
        for name in judged & set(own):
            rows, base = answers[label][name], answers["base"][name]
            result[label][name] = win_rate(judge, _measure, problems[name], [s.completion for s in rows],
                                           [s.completion for s in base])
            context.progress.note(f"{label} on {name}: wins {_percent(result[label][name]['accuracy'])} against base")
    for label in ("base", "sft", "rl"):
        result[label][ALL] = pooled({name: found for name, found in result[label].items() if name not in judged})
    (context.out / "evaluation.json").write_text(json.dumps({"models": result}, indent=2))
    write_table(context.out / "samples.parquet", kept, Sample)
    if context.config["engine"].probe_checkpoints:
        _write_expert_load(context, answers["rl"])
    metrics = {f"{label}/{name}": found["accuracy"] for label, rows in result.items() for name, found in rows.items()}
    metrics |= {f"{label}/{name}/measured": share for label, rows in answers.items() for name in judged & set(rows)
                if (share := _measured(problems[name], rows[name])) is not None} | reflective
    return StageResult(counts={"problems": {name: len(rows) for name, rows in problems.items()}, "samples": len(kept)},
                       metrics=metrics, key_metric=f"rl/{ALL}")


def _answers(context: StageContext, model, problems, form: str, samples: int, temperature: float,
             label: str) -> list[Sample]:
    from distill.generation import Order, samples_of
    from distill.prompts import prompt_messages

    config, reflective = context.config["evaluation"], context.config["model"].reflective_prompt
    orders = [Order(problem, form, prompt_messages(problem, form, reflective), samples) for problem in problems]
    sampling = {"temperature": temperature, "max_tokens": config.max_tokens}
    rows = samples_of(orders, generator=model.generator(sampling), log_path=context.work / "requests.jsonl",
                      seed=context.seed, progress=context.progress)
    provenance = json.dumps({"model": label, "mode": "greedy" if temperature == 0 else "sampled"})
    return [dataclasses.replace(row, provenance=provenance) for row in rows]


def _verified(verifier, samples: list[Sample], problems) -> list[Sample]:
    by_id = {problem.id: problem for problem in problems}
    verdicts = verifier.verify_batch([by_id[s.problem_id] for s in samples], [s.completion for s in samples])
    return [dataclasses.replace(s, verdict=verdict) for s, verdict in zip(samples, verdicts, strict=True)]


def _measured(problems, samples: list[Sample]) -> float | None:
    """Mean share of principles met, where a program can measure them: a check on the judge, never a reward."""
    from rewards.extract import split_thinking

    shares = [_measure(problem, split_thinking(sample.completion).answer)
              for problem, sample in zip(problems, samples, strict=True)]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if known else None


def _measure(problem, text: str) -> float | None:
    """The share of principles that a text meets; None where no program can measure them."""
    from distill.problems import writing

    return writing.score(problem, text) / 10 if writing.measurable(problem) else None


def _write_expert_load(context: StageContext, answers: dict[str, list[Sample]]) -> None:
    """`expert_load.json`: which experts each domain's prompts and greedy answers go to; nothing for a dense model."""
    from evaluation.specialisation import expert_load
    from policy.model import load_policy
    from policy.tokenizer import completion_ids, load_tokenizer, prompt_ids

    folder = context.inputs["rl"] / "checkpoint"
    tokenizer = load_tokenizer(folder)
    texts = {name: [prompt_ids(tokenizer, sample.messages) + completion_ids(tokenizer, sample.completion)
                    for sample in samples[:ROUTED_TEXTS]] for name, samples in answers.items()}
    found = expert_load(load_policy(folder, context.config["model"].dtype), texts)
    if found is not None:
        (context.out / "expert_load.json").write_text(json.dumps(found))


def _percent(share: float | None) -> str:
    return "no verdict" if share is None else f"{share:.1%}"


def export(context: StageContext) -> StageResult:
    """Copy the final checkpoint with a card, beside its evaluation."""
    shutil.copytree(context.inputs["rl"] / "checkpoint", context.out / "checkpoint")
    shutil.copy2(context.inputs["evaluate"] / "evaluation.json", context.out / "evaluation.json")
    models = json.loads((context.out / "evaluation.json").read_text())["models"]
    (context.out / "checkpoint" / "README.md").write_text(_card(context.config["name"], context.seed, models))
    size = sum(file.stat().st_size for file in (context.out / "checkpoint").iterdir())
    return StageResult(counts={"bytes": size}, metrics={"rl/all": models["rl"]["all"]["accuracy"]},
                       key_metric="rl/all")


def _card(name: str, seed: int, models: dict[str, dict[str, dict]]) -> str:
    """A model card in the Hub's form: what the model is and how it did beside the base and SFT models."""
    domains = list(models["rl"])
    rows = [[label, *(_percent(models[label][domain]["accuracy"]) for domain in domains)]
            for label in ("base", "sft", "rl")]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [["model", *domains], ["---"] * (len(domains) + 1), *rows])
    return (f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {name}\n\n"
            f"Post-trained with posttrain, recipe `{name}`, seed {seed}: SFT on expert samples, then GRPO.\n\n"
            "Held-out accuracy, greedy; in judged domains the share of answers better than the base model's "
            f"(a tie counts half):\n\n{table}\n")
