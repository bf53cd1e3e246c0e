"""DeepSeek-V3's post-training as a graph of stages (arXiv 2412.19437, section 5).

    problems -> base (-> extend) -> per domain: expert-D-sft -> expert-D-rl -> generate-D
      -> verify -> reject -> curate -> pack -> sft
      -> preference -> reward-model            (where principles judge; where a domain is judged at all)
      -> rl -> evaluate -> export

Stage functions import their heavy libraries inside, so that `--dry-run` and `status` stay light.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.recipe import Recipe, RecipeError
from pipeline.stage import Stage
from workflows import alignment, context, data, ending, expert

# What stage functions import inside, by what they do; what those modules import themselves follows from them.
PACKED = ("policy.tokenizer", "sft.packing")
TRAINED = ("policy", "sft.trainer")
SAMPLED = ("workflows.inference", "policy", "rl.engine", "rl.sync", "distill.generation", "distill.prompts")
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
    feedback = {name: recipe.domains[name].feedback for name in judged}
    shared = {"model": recipe.model, "engine": recipe.engine}
    verified = {**shared, "isolation": recipe.isolation}
    stages = [
        Stage("problems", data.problems, {"domains": recipe.domains},
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
    for name in domains:
        sft, rl, generate = f"expert-{name}-sft", f"expert-{name}-rl", f"generate-{name}"
        stages += [
            Stage(sft, partial(expert.expert_sft, domain=name),
                  {"model": recipe.model, "sft": recipe.expert.sft, "plain_thinking": recipe.expert.plain_thinking},
                  ("problems", base),
                  modules=("workflows.expert", *TRAINED, *PACKED, "distill.judging", "distill.prompts"),
                  title=f"Train the {name} expert on worked solutions"),
            Stage(rl, partial(expert.expert_rl, domain=name), {**verified, "rl": recipe.expert.rl}, ("problems", sft),
                  modules=("workflows.expert", *REINFORCED),
                  title=f"GRPO of the {name} expert with the reflective prompt"),
            Stage(generate, partial(data.generate, domain=name), {**shared, "generate": recipe.generate},
                  ("problems", rl), modules=("workflows.data", *SAMPLED),
                  title=f"Both sample forms from the {name} expert"),
        ]
    generated = tuple(f"generate-{name}" for name in domains)
    judges = tuple(f"expert-{name}-rl" for name in judged)
    stages += [
        Stage("verify", data.verify, {**verified, "judged": judged}, ("problems", *generated, *judges),
              modules=("workflows.data", *SAMPLED, "rewards"), title="A verdict for every sample"),
        Stage("reject", data.reject, {"reject": recipe.reject}, ("problems", "verify"),
              modules=("workflows.data", "distill.rejection", "distill.review"),
              files=(recipe.reject.reviews,) if recipe.reject.reviews else (),
              title="Keep correct, well-formed, concise samples"),
        Stage("curate", data.curate, {"curate": recipe.curate}, ("problems", "reject"),
              modules=("workflows.data", "distill.curation"), title="Deduplicate, decontaminate, mix to quotas"),
        Stage("pack", data.pack, {"pack_length": recipe.sft.pack_length}, ("problems", base, "curate"),
              modules=("workflows.data", *PACKED, "distill.judging"),
              title="Tokens with loss masks, packed"),
        Stage("sft", alignment.sft, {"model": recipe.model, "sft": recipe.sft}, (base, "pack"),
              modules=("workflows.alignment", *TRAINED), title="Supervised training of the policy"),
    ]
    rewarded: tuple[str, ...] = ()
    pairs: tuple[str, ...] = ()
    if any(recipe.domains[name].judged == "principles" for name in judged):
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
    experts = tuple(f"expert-{name}-rl" for name in domains)
    return [
        *stages,
        Stage("rl", alignment.rl, {**verified, "rl": recipe.rl, "reward_model": recipe.reward_model,
                                   "feedback": feedback},
              ("problems", "sft", *rewarded), modules=("workflows.alignment", *REINFORCED),
              title="GRPO on all domains"),
        Stage("evaluate", ending.evaluate, {**verified, "evaluation": recipe.evaluation, "domains": domains},
              ("problems", base, *experts, "sft", *rewarded, "rl"),
              modules=("workflows.ending", *SAMPLED, "evaluation", "rewards", "distill.problems"),
              title="Held-out accuracy of every model"),
        Stage("export", ending.export, {"name": recipe.name}, ("rl", "evaluate"), modules=("workflows.ending",),
              title="The final checkpoint and its card"),
    ]


def _local_paths(*sources) -> tuple[str, ...]:
    """Files and folders of a person's own that sections of a recipe name."""
    named = [getattr(source, key, None) for source in sources for key in ("path", "heldout_path")]
    ids = [source.id for source in sources if Path(getattr(source, "id", "")).is_absolute()]
    return tuple(path for path in named + ids if path)
