"""The stage that lengthens the base model's context (DeepSeek-V3 section 4.3), where the recipe asks for it.

YaRN changes the rotary frequencies, then every phase trains on longer rows: long documents, and facts to find in long
contexts. Retrieval is measured before and after, and the engine proved on rows beyond the original length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from pipeline.stage import StageContext, StageError, StageResult
from workflows.data import load_problems, write_packs
from workflows.inference import open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pipeline.records import Message

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
ORIGINAL_SHARE = 0.25  # of the needles' tokens are in rows of the original length, which would be unlearnt without
PROBED = 4  # rows that engine and trainer are compared on

Row = tuple[str, list, str]  # id, messages, completion


def extend(context: StageContext) -> StageResult:
    """`checkpoint` with the longer context, `needles.json`: retrieval by length and depth, before and after."""
    from policy.context import extend_context
    from policy.tokenizer import load_tokenizer
    from rl.engine import make_room
    from sft.trainer import train_sft

    config, model = context.config["extend"], context.config["model"]
    base = context.inputs["base"] / "checkpoint"
    make_room(base)
    start = context.work / "extended"
    original = extend_context(base, config.yarn, start) // config.yarn.factor
    longest = min(original * config.yarn.factor, model.max_length)
    tokenizer = load_tokenizer(start)
    metrics: dict[str, float] = {}
    counts: dict[str, int] = {}
    for index, phase in enumerate(config.phases):
        last = index == len(config.phases) - 1
        work = context.work / f"phase-{index + 1}"
        out = context.out if last else work / "out"
        if not (out / "checkpoint" / "tensors.json").exists():
            work.mkdir(exist_ok=True)
            rows = list(_rows(context, tokenizer, index, original))
            counts = write_packs(context, tokenizer, rows, phase.pack_length, work / "packs.parquet").counts
            metrics = train_sft(phase, start=start, packs=work / "packs.parquet", out=out, work=work / "trainer",
                                seed=context.seed, dtype=model.dtype, precision=model.precision,
                                progress=context.progress)
        start = out / "checkpoint"
    table = retrieval(context, {"before": base, "after": start}, original, longest)
    for name in ("before", "after"):
        for place, lengths in (("within", range(original + 1)), ("beyond", range(original + 1, longest + 1))):
            found = [share for length, row in zip(table["lengths"], table[name], strict=True) for share in row
                     if length in lengths]
            metrics[f"{name}/{place}"] = sum(found) / max(1, len(found))
    if context.config["engine"].probe_checkpoints:
        metrics["long_logprob_error"] = prove_beyond(context, start, original, longest)
    (context.out / "needles.json").write_text(json.dumps({"original": original, **table}, indent=2))
    context.progress.note(f"facts found beyond {original} tokens: {metrics['before/beyond']:.0%} before, "
                          f"{metrics['after/beyond']:.0%} after")
    return StageResult(counts=counts, metrics=metrics, key_metric="after/beyond")


def needle_rows(tokenizer: PreTrainedTokenizerBase, rng: Random, length: int, count: int) -> list[Row]:
    """Rows to train on, of at most `length` tokens each."""
    from distill.needles import KINDS, items_that_fit, needle

    if not count:
        return []
    items = items_that_fit(length, encoder(tokenizer))
    found = [needle(rng, items, asked=rng.randint(1, len(KINDS))) for _ in range(count)]
    return [(f"needle-{length}-{index}", list(messages), completion)
            for index, (messages, completion) in enumerate(found)]


def encoder(tokenizer: PreTrainedTokenizerBase):
    """The tokens of a conversation and its completion, as `distill.needles.items_that_fit` asks for them."""
    from policy.tokenizer import completion_ids, prompt_ids

    def encode(messages: tuple[Message, ...], completion: str) -> int:
        return len(prompt_ids(tokenizer, messages)) + len(completion_ids(tokenizer, completion))

    return encode


def _rows(context: StageContext, tokenizer: PreTrainedTokenizerBase, index: int, original: int) -> Iterator[Row]:
    """Needles and long documents for one phase, in the shares of the recipe; `original` is the base's context."""
    config = context.config["extend"]
    phase = config.phases[index]
    wanted, length = phase.max_steps * phase.batch_tokens, phase.pack_length
    needles = round(wanted * config.needle_share / length)
    rng, kept = Random(f"{context.seed}/needles/{index}"), round(needles * ORIGINAL_SHARE)
    yield from needle_rows(tokenizer, rng, length, needles - kept)
    yield from needle_rows(tokenizer, rng, original, kept * (length // original))
    left = wanted - needles * length
    if left < length:
        return
    for number, (tokens, text) in enumerate(_documents(context, tokenizer, length)):
        yield f"document-{number}", [], text
        left -= tokens
        if left < length:
            return


def _documents(context: StageContext, tokenizer: PreTrainedTokenizerBase, length: int) -> Iterator[tuple[int, str]]:
    """(tokens, text) near `length` tokens long: those of the recipe's file, or of the corpus, several to a row."""
    parts, tokens = [], 0
    for text in _texts(context):
        size = len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 2
        if parts and tokens + size > length - 2:
            yield tokens, "\n\n".join(parts)
            parts, tokens = [], 0
        parts.append(text)
        tokens += size
    if parts:
        yield tokens, "\n\n".join(parts)


def _texts(context: StageContext) -> Iterator[str]:
    from distill.corpus import corpus_documents

    path = context.config["extend"].documents
    if path:
        for number, line in enumerate(Path(path).read_text().splitlines(), start=1):
            try:
                yield json.loads(line)["text"]
            except (ValueError, KeyError, TypeError) as error:
                raise StageError(f"extend.documents: {path}, line {number}: not a JSON object with text ({error!r})"
                                 ) from None
        return
    documents = corpus_documents(load_problems(context), context.seed, context.config["model"].reflective_prompt)
    if not documents:
        raise StageError("extend: no documents to train on; name a file (extend.documents), give domains rows in the "
                         "corpus split, or train on needles alone (extend.needle_share: 1)")
    for document in documents:
        yield document.get("text") or "\n".join(message["content"] for message in document["messages"])


def retrieval(context: StageContext, checkpoints: dict[str, Path], original: int, longest: int) -> dict[str, list]:
    """Shares of facts found, by length and depth, for each checkpoint; the same rows for all."""
    from distill.needles import items_that_fit, needle
    from evaluation.needles import recalled
    from policy.model import load_policy
    from policy.tokenizer import completion_ids, load_tokenizer, prompt_ids

    count, rng = context.config["extend"].needles, Random(f"{context.seed}/retrieval")
    tokenizer = load_tokenizer(checkpoints["after"])
    lengths = [original]
    while lengths[-1] < longest:
        lengths.append(min(2 * lengths[-1], longest))
    items = {length: items_that_fit(length, encoder(tokenizer)) for length in lengths}
    rows = {(length, depth): [needle(rng, items[length], depth=depth) for _ in range(count)]
            for length in lengths for depth in DEPTHS}
    table: dict[str, list] = {"lengths": lengths, "depths": list(DEPTHS)}
    for name, folder in checkpoints.items():
        model = load_policy(folder, context.config["model"].dtype)
        context.progress.start(len(rows), f"needle cells, {name}")
        shares = {}
        for cell, found in rows.items():
            right = recalled(model, [(prompt_ids(tokenizer, messages), completion_ids(tokenizer, completion))
                                     for messages, completion in found])
            shares[cell] = sum(right) / count
            context.progress.advance(1)
        table[name] = [[shares[length, depth] for depth in DEPTHS] for length in lengths]
    return table


def prove_beyond(context: StageContext, checkpoint: Path, original: int, longest: int) -> float:
    """Largest log-prob difference of trainer and engine over rows beyond the original length, or StageError."""
    from policy.model import load_policy
    from rl.sync import logprob_error

    model, engine = context.config["model"], context.config["engine"]
    opened = open_model(checkpoint, model, engine, context.seed)
    policy = load_policy(checkpoint, model.dtype).eval()
    lengths = [original + (longest - 1 - original) * (row + 1) // PROBED for row in range(PROBED)]
    error = logprob_error(policy, opened.engine, engine.max_logprob_error, lengths=lengths)
    if not error <= engine.max_logprob_error:
        raise StageError(f"extend: engine and trainer differ by {error:.2e} in log-prob on rows of {lengths} tokens "
                         f"(engine.max_logprob_error is {engine.max_logprob_error:g}); they read the rotary parameters "
                         "of config.json differently")
    return error
