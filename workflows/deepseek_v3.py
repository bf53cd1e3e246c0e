"""DeepSeek-V3's post-training as a graph of stages (arXiv 2412.19437, section 5).

    problems -> base (-> extend) -> per domain: expert-D-sft -> expert-D-rl -> generate-D (or a teacher's endpoint)
      -> verify -> reject -> curate -> pack -> sft
      -> preference -> reward-model            (where principles judge; where a domain is judged at all)
      -> rl -> evaluate -> export

Stage functions import their heavy libraries inside, so that `--dry-run` and `status` stay light.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.recipe import DomainGenerateConfig, ExpectedConfig, Recipe, RecipeError
from pipeline.stage import Stage
from workflows import alignment, context, data, ending, expert, generation, sft_set
from workflows.prices import prices

__all__ = ["build", "prices"]

# What stage functions import inside, by what they do; what those modules import themselves follows from them.
PACKED = ("policy.tokenizer", "sft.packing")
TRAINED = ("policy", "sft.trainer")
SAMPLED = ("workflows.inference", "policy", "rl.engine", "rl.sync", "distill.generation", "distill.prompts")
GENERATED = ("workflows.generation", *SAMPLED, "rl.engine_pool", "distill.teacher", "rewards")
REINFORCED = ("policy", "rl", "rewards", "distill.prompts")


def build(recipe: Recipe) -> list[Stage]:
    """The stages of a recipe, in an order in which they can run. Raises RecipeError for a split nobody filled."""
    for name, domain in recipe.domains.items():
        for split in ("sft", "rl", "preference") if domain.judged == "principles" else ("sft", "rl"):
            if not domain.splits.get(split):
                raise RecipeError(f"domains.{name}.splits.{split}: needs rows, as a stage works on them "
                                  f"(got {domain.splits.get(split, 0)})")
    domains = list(recipe.domains)
    judged = [name for name, domain in recipe.domains.items() if domain.judged]
    principled = [name for name in judged if recipe.domains[name].judged == "principles"]
    feedback = {name: recipe.domains[name].feedback for name in judged}
    experts = [name for name, domain in recipe.domains.items() if not domain.teacher]
    teachers = {name: domain.teacher for name, domain in recipe.domains.items() if domain.teacher}
    # how many work at a time, and at what price, changes no sample: no stage is stale for it
    replicas = recipe.engine.replicas
    shared = {"model": recipe.model, "engine": recipe.engine.model_copy(update={"replicas": 1})}
    sources = {name: domain.model_copy(update={"teacher": None, "generate": DomainGenerateConfig()})
               for name, domain in recipe.domains.items()}
    verified = {**shared, "isolation": recipe.isolation}
    stages = [
        Stage("problems", data.problems, {"domains": sources},
              modules=("workflows.data", "distill.sources", "distill.splits"),
              files=_local_paths(*(domain.source for domain in recipe.domains.values())),
              title="Load or generate problems and split them"),
        Stage("base", expert.base, {"model": recipe.model, "base": recipe.base,
                                    "needle_share": recipe.extend.needle_share if recipe.extend else 0.0},
              ("problems",),
              modules=("workflows.expert", *TRAINED, *PACKED, "distill.corpus", "distill.needles"),
              files=_local_paths(recipe.model.source),
              title="Take or train the base model"),
    ]
    base = "base"
    if recipe.extend:
        base = "extend"
        stages += [
            Stage("extend", context.extend, {**shared, "extend": recipe.extend}, ("problems", "base"),
                  modules=("workflows.context", *TRAINED, *PACKED, *SAMPLED, "distill.corpus", "distill.needles",
                           "evaluation.needles"),
                  files=(recipe.extend.documents,) if recipe.extend.documents else (),
                  title="Extend the context by YaRN and training on long rows"),
        ]
    for name in experts:
        sft, rl = f"expert-{name}-sft", f"expert-{name}-rl"
        stages += [
            Stage(sft, partial(expert.expert_sft, domain=name),
                  {"model": recipe.model, "sft": recipe.expert.sft, "plain_thinking": recipe.expert.plain_thinking},
                  ("problems", base),
                  modules=("workflows.expert", *TRAINED, *PACKED, "distill.judging", "distill.prompts"),
                  title=f"Train the {name} expert on worked solutions"),
            Stage(rl, partial(expert.expert_rl, domain=name), {**verified, "rl": recipe.expert.rl}, ("problems", sft),
                  modules=("workflows.expert", *REINFORCED),
                  title=f"GRPO of the {name} expert with the reflective prompt"),
            _generate(recipe, name, verified, ("problems", rl), f"Samples of the {name} expert"),
        ]
    stages += [_generate(recipe, name, {"model": recipe.model, "isolation": recipe.isolation, "teacher": teacher.model},
                         ("problems",), f"Samples of {teacher.model} for {name}")
               for name, teacher in teachers.items()]
    generated = tuple(f"generate-{name}" for name in domains)
    judges = tuple(f"expert-{name}-rl" for name in judged if name in experts)
    stages += [
        Stage("verify", partial(generation.verify, replicas=replicas, teachers=teachers),
              {**verified, "judged": judged, "teachers": {name: teachers[name].model for name in judged
                                                          if name in teachers}},
              ("problems", *generated, *judges), modules=GENERATED, title="A verdict for every sample"),
        Stage("reject", sft_set.reject, {"reject": recipe.reject, "judged": judged, "principled": principled},
              ("verify",), modules=("workflows.sft_set",),
              files=(recipe.reject.reviews,) if recipe.reject.reviews else (),
              title="Keep correct, well-formed, concise samples"),
        Stage("curate", sft_set.curate,
              {"curate": recipe.curate, "licenses": {name: domain.license for name, domain in recipe.domains.items()}},
              ("problems", "reject"), modules=("workflows.sft_set",), files=recipe.curate.evaluation_files,
              title="Decontaminate, deduplicate, mix to quotas"),
        Stage("pack", sft_set.pack, {"pack_length": recipe.sft.pack_length, "judged": judged},
              ("problems", base, "curate"), modules=("workflows.sft_set", *PACKED, "distill.judging"),
              title="Tokens with loss masks, packed"),
        Stage("sft", alignment.sft, {"model": recipe.model, "sft": recipe.sft}, (base, "pack"),
              modules=("workflows.alignment", *TRAINED), title="Supervised training of the policy"),
    ]
    rewarded: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    if principled:
        pairs = ("preference",)
        stages += [
            Stage("preference", alignment.preference, {**shared, "preference": recipe.preference},
                  ("problems", "sft"), modules=("workflows.alignment", *SAMPLED, "rewards", "distill.preference"),
                  title="Pairs judged in both orders by the SFT model"),
        ]
    if judged:
        rewarded = ("reward-model",)
        stages += [
            Stage("reward-model", alignment.reward_model, {**shared, "reward_model": recipe.reward_model},
                  ("problems", "verify", *pairs, "sft"),
                  modules=("workflows.alignment", *TRAINED, *SAMPLED, *PACKED, "rewards", "distill.preference",
                           "distill.matching", "evaluation.calibration"),
                  title="Train and calibrate the generative reward model"),
        ]
    return [
        *stages,
        Stage("rl", alignment.rl, {**verified, "rl": recipe.rl, "reward_model": recipe.reward_model,
                                   "feedback": feedback},
              ("problems", "sft", *rewarded), modules=("workflows.alignment", *REINFORCED),
              title="GRPO on all domains"),
        Stage("evaluate", ending.evaluate, {**verified, "evaluation": recipe.evaluation, "domains": domains},
              ("problems", base, *(f"expert-{name}-rl" for name in experts), "sft", *rewarded, "rl"),
              modules=("workflows.ending", *SAMPLED, "evaluation", "rewards", "distill.problems"),
              title="Held-out accuracy of every model"),
        Stage("export", ending.export, {"name": recipe.name}, ("rl", "evaluate"), modules=("workflows.ending",),
              title="The final checkpoint and its card"),
    ]


def _generate(recipe: Recipe, domain: str, config: dict, inputs: tuple[str, ...], title: str) -> Stage:
    wanted = recipe.generation(domain).model_copy(update={"expected": ExpectedConfig()})
    return Stage(f"generate-{domain}",
                 partial(generation.generate, domain=domain, replicas=recipe.engine.replicas,
                         teacher=recipe.domains[domain].teacher),
                 {**config, "generate": wanted}, inputs, modules=GENERATED, title=title)


def _local_paths(*sources) -> tuple[str, ...]:
    """Files and folders of a person's own that sections of a recipe name."""
    named = [getattr(source, key, None) for source in sources for key in ("path", "heldout_path")]
    ids = [source.id for source in sources if Path(getattr(source, "id", "")).is_absolute()]
    return tuple(path for path in named + ids if path)
