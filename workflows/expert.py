"""Stages that make the experts: the base model, then SFT and GRPO per domain (section 5.1)."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.records import Problem
from pipeline.stage import StageContext, StageError, StageResult
from workflows.context import needle_rows
from workflows.data import base_checkpoint, load_problems, write_packs
from workflows.inference import open_model, open_verifier, scorer

if TYPE_CHECKING:
    from rewards.judge import Judge, Judges

DRILL_TOKENS = 25  # fewer than the mean drill has, to make enough of them


def base(context: StageContext) -> StageResult:
    """Take any Hugging Face causal LM, or train the tiny one from nothing on a generated corpus."""
    source = context.config["model"].source
    if source.type == "pretrained":
        return _take(context, source.path or source.id)
    return _train_tiny(context)


def _take(context: StageContext, origin: str) -> StageResult:
    from policy.model import load_policy, save_policy
    from policy.tokenizer import load_tokenizer

    try:
        if Path(origin).is_absolute() and not Path(origin).is_dir():
            raise FileNotFoundError(f"{origin}: no such folder")
        tokenizer = load_tokenizer(origin)
        model = load_policy(origin, context.config["model"].dtype)
    except (OSError, ValueError) as error:
        raise StageError(f"model.source: cannot load {origin}: {error}\nGive a Hugging Face id this machine can reach, "
                         "or a folder with config.json, *.safetensors and a tokenizer (model.source.path)") from error
    checkpoint = save_policy(model, tokenizer, context.out / "checkpoint")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return StageResult(counts={"parameters": parameters},
                       metrics={"digest": checkpoint.digest, "parameters": parameters}, key_metric="parameters")


def _train_tiny(context: StageContext) -> StageResult:
    from distill.corpus import corpus_documents
    from policy.model import new_policy, save_policy
    from policy.presets import tiny_config
    from policy.tokenizer import load_tokenizer, train_tokenizer
    from sft.trainer import train_sft

    model_config, train = context.config["model"], context.config["base"]
    shape, length = model_config.source, model_config.source.context_length or model_config.max_length
    documents = corpus_documents(load_problems(context), context.seed, model_config.reflective_prompt)
    if not documents:
        raise StageError("base: the corpus is empty; give domains rows in the corpus split "
                         "(domains.NAME.splits.corpus)")
    start = context.work / "untrained"
    if not (start / "tensors.json").exists():
        texts = [document.get("text") or "\n".join(m["content"] for m in document["messages"])
                 for document in documents]
        tokenizer = train_tokenizer(texts, shape.vocab_size, length)
        config = tiny_config(hidden_size=shape.hidden_size, layers=shape.layers, routed_experts=shape.routed_experts,
                             vocab_size=shape.vocab_size, max_length=length, mtp_depth=shape.mtp_depth,
                             token_ids={f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in
                                        ("bos", "eos", "pad")})
        save_policy(new_policy(config, context.seed), tokenizer, start)
    counts = _write_lessons(context, load_tokenizer(start), documents)
    metrics = train_sft(train, start=start, packs=context.work / "packs.parquet", out=context.out, work=context.work,
                        seed=context.seed, dtype=model_config.dtype, precision=model_config.precision,
                        progress=context.progress, in_order=True)
    return StageResult(counts={"documents": len(documents), **counts}, metrics=metrics, key_metric="loss")


def _write_lessons(context: StageContext, tokenizer, documents: list[dict]) -> dict[str, int]:
    """Packs of rows to repeat for the first steps, then of the corpus.

    Attention that copies from the prompt forms much sooner from them than from the mixed corpus, and every later
    skill is made of it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from distill.corpus import copy_drill

    config, rng = context.config["base"], random.Random(f"{context.seed}/drills")
    wanted = context.config["model"].source.drill_steps * config.batch_tokens // config.pack_length
    drills = [copy_drill(rng) for _ in range(wanted * config.pack_length // DRILL_TOKENS)]
    tables, counts = [], {}
    needles = needle_rows(tokenizer, rng, config.pack_length, round(len(documents) * context.config["needle_share"]))
    for limit, rows in ((wanted, _rows(drills)), (None, needles + _rows(documents))):
        file = context.work / "lesson.parquet"
        counts = write_packs(context, tokenizer, rows, config.pack_length, file).counts
        tables.append(pq.read_table(file).slice(0, limit))
    pq.write_table(pa.concat_tables(tables), context.work / "packs.parquet")
    return counts | {"drill_packs": tables[0].num_rows}


def _rows(documents: list[dict]) -> list[tuple[str, list, str]]:
    return [(str(index), document["messages"][:-1], document["messages"][-1]["content"]) if "messages" in document
            else (str(index), [], document["text"]) for index, document in enumerate(documents)]


def expert_sft(context: StageContext, domain: str) -> StageResult:
    """SFT on worked solutions in both forms; a judged domain's expert learns to judge as well."""
    from distill.judging import judge_demonstrations
    from distill.prompts import FORMS, prompt_messages, worked_completion
    from policy.tokenizer import load_tokenizer
    from rl.engine import make_room
    from sft.trainer import train_sft

    start = base_checkpoint(context)
    make_room(start)
    problems = load_problems(context, "sft", domain)
    rng = random.Random(f"{context.seed}/{context.name}")
    reflective = context.config["model"].reflective_prompt
    rows = []
    for problem in problems:
        thinks = rng.random() < context.config["plain_thinking"]
        for form in FORMS:
            completion = worked_completion(problem, "reasoning" if thinks else form) or worked_completion(problem, form)
            if completion is not None:
                rows.append((f"{problem.id}-{form}", list(prompt_messages(problem, form, reflective)), completion))
    if not rows:
        raise StageError(f"expert-{domain}-sft: none of the {len(problems)} sft problems has a worked solution; "
                         "give the source rows with one")
    rows += judge_demonstrations(problems, context.seed)
    train = context.config["sft"]
    packed = write_packs(context, load_tokenizer(start), rows, train.pack_length, context.work / "packs.parquet")
    metrics = train_sft(train, start=start, packs=context.work / "packs.parquet", out=context.out, work=context.work,
                        seed=context.seed, dtype=context.config["model"].dtype,
                        precision=context.config["model"].precision, progress=context.progress)
    return StageResult(counts={"worked_solutions": len(rows), **packed.counts}, metrics=metrics, key_metric="loss")


def expert_rl(context: StageContext, domain: str) -> StageResult:
    """GRPO on one domain; a judged domain is rewarded by its own start (self-rewarding, section 5.4.2).

    The judge keeps those weights: one that moved with the policy would come to approve of it.
    """
    start, problems = context.inputs[f"expert-{domain}-sft"] / "checkpoint", load_problems(context, "rl", domain)
    judge = self_judge(context, start, "judge") if any(problem.check.judged for problem in problems) else None
    return run_grpo(context, start, problems, judge)


def self_judge(context: StageContext, start: Path, role: str) -> Judge:
    """The policy as it is before RL, judging by its own votes (`rl.self_votes`) in the engine of `role`."""
    return open_model(start, context.config["model"], context.config["engine"], context.seed, role=role).judge(
        context.seed, votes=context.config["rl"].self_votes)


def run_grpo(context: StageContext, start: Path, problems: list[Problem], judge: Judge | Judges | None) -> StageResult:
    """One GRPO training of the checkpoint in `start`; `judge` is needed where no rule checks the problems."""
    from distill.prompts import prompt_messages
    from rl.grpo import train_grpo
    from rl.trainer import Prompt

    config, model = context.config["rl"], context.config["model"]
    if not problems:
        raise StageError(f"{context.name}: no problems to train on; give the domains rows in the rl split")
    opened = open_model(start, model, context.config["engine"], context.seed)
    rng = random.Random(f"{context.seed}/{context.name}")
    prompts = []
    for problem in problems:
        form = "reasoning" if rng.random() < config.reasoning_share else "original"
        prompts.append(Prompt(problem, form, prompt_messages(problem, form, model.reflective_prompt)))
    with open_verifier(judge, problems, context.config["isolation"]) as verifier:
        metrics, states = train_grpo(
            config, start=start, prompts=prompts, engine=opened.engine, scorer=scorer(verifier, config.rewards),
            out=context.out, work=context.work, seed=context.seed, dtype=model.dtype, precision=model.precision,
            max_logprob_error=context.config["engine"].max_logprob_error, progress=context.progress)
    return StageResult(counts={"prompts": sum(states.values()), "groups": states}, metrics=metrics,
                       key_metric="rollout_accuracy_last")
