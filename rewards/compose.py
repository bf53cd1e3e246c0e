"""From a verdict to a reward: accuracy, format and language consistency (DeepSeek-R1 sections 2.2.2 and 2.3.2)."""

from __future__ import annotations

from pipeline.recipe import RewardWeights
from pipeline.records import Status, Verdict
from rewards.extract import split_thinking
from rewards.language import consistency


def format_reward(verdict: Verdict, completion: str, form: str) -> float:
    """1 for a completion of the wanted form, else 0.

    form "reasoning": one well-formed <think> block with a thought, then an answer. form "original": an answer
    that the verifier could read, with or without thinking.
    """
    thinking = split_thinking(completion)
    if not thinking.well_formed or not thinking.answer:
        return 0.0
    if form == "reasoning":
        return float(bool(thinking.thought))
    if form == "original":
        return float(verdict.status is not Status.MALFORMED)
    raise ValueError(f"form must be 'original' or 'reasoning' (got {form!r})")


def compose(verdict: Verdict, completion: str, prompt: str, form: str,
            weights: RewardWeights) -> tuple[dict[str, float], float | None]:
    """({"accuracy", "format", "language"}, total). prompt: what the user asked.

    An unscored verdict has no total and no "accuracy": it is never a 0.
    """
    parts = {"format": format_reward(verdict, completion, form), "language": consistency(completion, prompt)}
    if verdict.score is None:
        return parts, None
    parts["accuracy"] = verdict.score
    return parts, sum(getattr(weights, name) * value for name, value in parts.items())
