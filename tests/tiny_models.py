"""A random DeepSeek-V3-shaped policy that trains a step in some milliseconds; shared by policy, sft and rl tests."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pipeline.recipe import YarnConfig
from policy.context import yarn_parameters
from policy.model import new_policy, save_policy
from policy.presets import tiny_config
from policy.tokenizer import train_tokenizer

VOCAB = 300
TEXTS = ["What is 17 + 25?", "<think>\nseven and five make twelve\n</think>\n\\boxed{42}", "the answer is the sum"]


def tiny_tokenizer(max_length: int = 128) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, VOCAB, max_length)


def tiny_policy(seed: int = 0, *, hidden_size: int = 32, layers: int = 3, max_length: int = 128,
                mtp_depth: int = 1, yarn_factor: int | None = None) -> PreTrainedModel:
    """Three layers of which two are MoE with 8 experts, and the MTP module; the balance biases are not zero.

    yarn_factor: how many times its original length `max_length` is, where the context is an extended one.
    """
    tokenizer = tiny_tokenizer(max_length)
    config = tiny_config(hidden_size=hidden_size, layers=layers, routed_experts=8, vocab_size=VOCAB,
                         max_length=max_length, mtp_depth=mtp_depth,
                         token_ids={f"{name}_token_id": getattr(tokenizer, f"{name}_token_id")
                                    for name in ("bos", "eos", "pad")})
    if yarn_factor:
        config.max_position_embeddings //= yarn_factor
        config.rope_parameters = yarn_parameters(config, YarnConfig(factor=yarn_factor))
        config.max_position_embeddings = max_length
    model = new_policy(config, seed)
    scatter_biases(model, seed)
    return model


@torch.no_grad()
def scatter_biases(model: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(0.05 * torch.randn(buffer.shape, generator=generator))


def save_tiny(folder: Path, seed: int = 0, **shape: int) -> Path:
    """A checkpoint folder of `tiny_policy`."""
    save_policy(tiny_policy(seed, **shape), tiny_tokenizer(shape.get("max_length", 128)), folder)
    return folder


class Killed(Exception):
    """What a test raises where a process would have died."""


class Quiet:
    """A progress that keeps its notes; `kill_at` raises at that many advances, as if the process died there."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at, self.done, self.notes = kill_at, 0, []

    def start(self, total: int | None, unit: str, done: int = 0) -> None:
        self.done = done

    def advance(self, count: int = 1, **metrics: float) -> None:
        self.done += count
        if self.done == self.kill_at:
            raise Killed(f"at {self.done}")

    def note(self, text: str) -> None:
        self.notes.append(text)
