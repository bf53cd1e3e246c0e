"""Engines and verifiers as stages use them: opened, proved, and reporting what they did."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.recipe import EngineConfig, ModelConfig, RewardWeights
from pipeline.records import Problem, Status, Verdict
from pipeline.stage import StageError

if TYPE_CHECKING:
    from distill.generation import Answer
    from rewards.judge import Judge, Judges
    from rewards.registry import Verifier
    from rewards.sandbox import Isolation
    from rl.engine import RolloutEngine
    from rl.engine_pool import EnginePool
    from rl.trainer import Scorer

INFRA_ERROR_BUDGET = 0.01
JUDGEMENT_TOKENS = 8192  # the engine stops earlier where the context ends


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint in an engine, with its tokenizer."""

    engine: RolloutEngine | EnginePool
    tokenizer: Any
    digest: str
    logprob_errors: list[float]  # of the proof of each engine at loading; empty when probing is off

    @property
    def logprob_error(self) -> float | None:
        """The largest of the proofs so far; None when probing is off."""
        return max(self.logprob_errors, default=None)

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        from policy.tokenizer import prompt_ids

        return prompt_ids(self.tokenizer, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def generator(self, sampling: dict[str, Any], batch: int = 512) -> CheckpointGenerator:
        """The form `distill.generation` asks for. sampling: of `rl.engine.Sampling`; batch: prompts an engine gets."""
        return CheckpointGenerator(self, sampling, batch)

    def judge(self, seed: int, *, votes: int = 1, max_tokens: int = JUDGEMENT_TOKENS,
              temperature: float | None = None) -> Judge:
        """temperature: by default greedy where one vote is asked for, 1 where several are, which must differ."""
        from rewards.judge import Judge
        from rl.engine import Sampling, chat_generator

        def generate(conversations, n, seed):
            sampling = Sampling(float(n > 1) if temperature is None else temperature, max_tokens)
            return chat_generator(self.engine, self.encode, self.decode, sampling)(conversations, n, seed)

        return Judge(generate, votes=votes, seed=seed)


class CheckpointGenerator:
    """A checkpoint as `distill.generation.Generator`."""

    def __init__(self, model: OpenModel, sampling: dict[str, Any], batch: int) -> None:
        self.model, self.sampling, self.batch, self.name = model, sampling, batch, model.digest

    def prompt(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return tuple(self.model.encode(messages))

    def answers(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Iterator[dict[int, Answer]]:
        from distill.generation import Answer
        from rl.engine import Request, Sampling

        sampling = Sampling(**self.sampling)
        requests = [Request(tuple(ids), seed) for ids, seed in zip(prompts, seeds, strict=True)]
        batches = [requests[start:start + self.batch] for start in range(0, len(requests), self.batch)]
        for place, generations in self.model.engine.generate_batches(batches, sampling):
            start = place * self.batch
            yield {start + offset: Answer(self.model.decode(found.token_ids), len(found.token_ids),
                                          found.finish_reason, len(prompts[start + offset]))
                   for offset, found in enumerate(generations)}

    def stop(self) -> None:
        self.model.engine.stop()


def open_model(checkpoint: Path, model: ModelConfig, engine_config: EngineConfig, seed: int,
               role: str = "policy") -> OpenModel:
    """Load a checkpoint folder into the engine of `role` and prove that it runs those weights."""
    from policy.model import read_checkpoint
    from policy.tokenizer import load_tokenizer
    from rl.engine import open_engine
    from rl.sync import prove_checkpoint

    engine = open_engine(checkpoint, engine_config, dtype=model.dtype, max_length=model.max_length, seed=seed,
                         role=role)
    errors = []
    if engine_config.probe_checkpoints:
        proof = prove_checkpoint(checkpoint, model.dtype, engine, engine_config.max_logprob_error)
        errors.append(proof.max_logprob_error)
    return OpenModel(engine, load_tokenizer(checkpoint), read_checkpoint(checkpoint).digest, errors)


@contextmanager
def open_replicas(checkpoint: Path, model: ModelConfig, engine_config: EngineConfig, seed: int, replicas: int,
                  note: Callable[[str], None]) -> Iterator[OpenModel]:
    """A checkpoint in `replicas` engines at a time, each proved as it is opened; all but the first end with it.

    An engine that dies is opened again, and what it was asked goes to the others.
    """
    from policy.model import read_checkpoint
    from policy.tokenizer import load_tokenizer
    from rl.engine import stop_engines
    from rl.engine_pool import EnginePool

    errors: list[float] = []

    def start(index: int) -> RolloutEngine:
        opened = open_model(checkpoint, model, engine_config, seed, role=f"replica-{index}" if index else "policy")
        opened.engine.wait()
        errors.extend(opened.logprob_errors)
        return opened.engine

    try:
        with EnginePool(start, replicas, note) as pool:
            yield OpenModel(pool, load_tokenizer(checkpoint), read_checkpoint(checkpoint).digest, errors)
    finally:
        stop_engines("engine-replica-")


@contextmanager
def open_verifier(judge: Judge | Judges | None, problems: Sequence[Problem], isolation: Isolation
                  ) -> Iterator[Verifier]:
    """A verifier whose canaries for the kinds of check among `problems` have passed; code runs on the whole cluster."""
    from rewards.registry import Verifier
    from rewards.spread import cluster_runners

    with (cluster_runners(isolation=isolation) as runners,
          Verifier(judge=judge, isolation=isolation, runners=runners) as verifier):
        verifier.run_canaries(sorted({problem.check.kind for problem in problems if not problem.check.judged}),
                              sorted({problem.check.language or "python" for problem in problems}))
        yield verifier


def check_infrastructure(verdicts: Iterable[Verdict], stage: str, failed_before: int = 0, all_before: int = 0) -> None:
    """Raises StageError when verifiers failed on more than INFRA_ERROR_BUDGET of the answers.

    Such answers have no score; left out in silence they would bend what is counted over the rest. Those before: of
    earlier parts of the same table.
    """
    verdicts = list(verdicts)
    failed = [verdict for verdict in verdicts if verdict.status is Status.INFRA_ERROR]
    count, total = failed_before + len(failed), all_before + len(verdicts)
    # over at least a thousand verdicts, so that one failure does not end a run
    if failed and count > INFRA_ERROR_BUDGET * max(total, 1000):
        raise StageError(f"{stage}: {count} of {total} verdicts are infrastructure errors; the last came "
                         f"from {failed[-1].verifier}: {failed[-1].reason} {failed[-1].evidence}\nMend what it names "
                         "(posttrain doctor checks the machine) and give the same command again")


def scorer(verifier: Verifier, weights: RewardWeights) -> Scorer:
    """Verdict and weighted reward per rollout."""
    from rewards.compose import compose
    from rl.trainer import Score

    def score(prompts, texts, _step):
        verdicts = verifier.verify_batch([prompt.problem for prompt in prompts], list(texts))
        scores = []
        for prompt, text, verdict in zip(prompts, texts, verdicts, strict=True):
            parts, reward = compose(verdict, text, prompt.problem.messages[-1]["content"], prompt.form, weights)
            scores.append(Score(verdict, reward, parts))
        return scores

    return score
