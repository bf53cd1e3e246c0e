"""Engines and verifiers as stages use them: opened, proved, and reporting what they did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.recipe import EngineConfig, ModelConfig, RewardWeights
from pipeline.records import Problem, Status, Verdict
from pipeline.stage import StageError

if TYPE_CHECKING:
    from rewards.judge import Judge, Judges
    from rewards.registry import Verifier
    from rewards.sandbox import Isolation
    from rl.engine import RolloutEngine
    from rl.trainer import Scorer

INFRA_ERROR_BUDGET = 0.01
JUDGEMENT_TOKENS = 8192  # the engine stops earlier where the context ends


@dataclass(frozen=True)
class OpenModel:
    """A checkpoint in an engine, with its tokenizer."""

    engine: RolloutEngine
    tokenizer: Any
    digest: str
    logprob_error: float | None  # of the proof at loading; None when probing is off

    def encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        from policy.tokenizer import prompt_ids

        return prompt_ids(self.tokenizer, messages)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def sampler(self, temperature: float, max_tokens: int, top_p: float = 1.0) -> Callable[..., Any]:
        """The form `distill.generation.generate` asks for."""
        from rl.engine import Request, Sampling

        sampling = Sampling(temperature, max_tokens, top_p)

        def sample(prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[tuple[Sequence[int], str]]:
            requests = [Request(tuple(ids), seed) for ids, seed in zip(prompts, seeds, strict=True)]
            return [(found.token_ids, found.finish_reason) for found in self.engine.generate(requests, sampling)]

        return sample

    def judge(self, seed: int, *, votes: int = 1, max_tokens: int = JUDGEMENT_TOKENS,
              temperature: float | None = None) -> Judge:
        """temperature: by default greedy where one vote is asked for, 1 where several are, which must differ."""
        from rewards.judge import Judge
        from rl.engine import Sampling, chat_generator

        def generate(conversations, n, seed):
            sampling = Sampling(float(n > 1) if temperature is None else temperature, max_tokens)
            return chat_generator(self.engine, self.encode, self.decode, sampling)(conversations, n, seed)

        return Judge(generate, votes=votes, seed=seed)


def open_model(checkpoint: Path, model: ModelConfig, engine_config: EngineConfig, seed: int,
               role: str = "policy") -> OpenModel:
    """Load a checkpoint folder into the engine of `role` and prove that it runs those weights."""
    from policy.model import read_checkpoint
    from policy.tokenizer import load_tokenizer
    from rl.engine import open_engine
    from rl.sync import prove_checkpoint

    engine = open_engine(checkpoint, engine_config, dtype=model.dtype, max_length=model.max_length, seed=seed,
                         role=role)
    error = None
    if engine_config.probe_checkpoints:
        error = prove_checkpoint(checkpoint, model.dtype, engine, engine_config.max_logprob_error).max_logprob_error
    return OpenModel(engine, load_tokenizer(checkpoint), read_checkpoint(checkpoint).digest, error)


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


def check_infrastructure(verdicts: Sequence[Verdict], stage: str) -> None:
    """Raises StageError when verifiers failed on more than INFRA_ERROR_BUDGET of the answers.

    Such answers have no score; left out in silence they would bend what is counted over the rest.
    """
    failed = [verdict for verdict in verdicts if verdict.status is Status.INFRA_ERROR]
    # over at least a thousand verdicts, so that one failure does not end a run
    if len(failed) > INFRA_ERROR_BUDGET * max(len(verdicts), 1000):
        raise StageError(f"{stage}: {len(failed)} of {len(verdicts)} verdicts are infrastructure errors; the last came "
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
