"""A rollout engine and a scorer that follow a script, for tests of the GRPO trainer."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tiny_models import VOCAB
from transformers import PreTrainedModel

from pipeline.records import Check, Problem, Status, Verdict
from policy.model import export_tensors, load_policy
from policy.replay import RouteReplay
from policy.shards import checksum
from rl.engine import Generation, Request, Sampling
from rl.trainer import Prompt, Score


class ScriptedEngine:
    """A fake with the interface of `RolloutEngine`, because a vLLM start a test takes longer than all tests here.

    Tokens are drawn from the request's seed; log-probs are those transformers computes with the weights last
    sent. The faults: `shift` is added to every log-prob, `stale` keeps the first weights, prompts of `room`
    tokens or more are too long. With `routes` it returns the experts of each token as vLLM lays them out on a GPU;
    `router_noise` moves its own routers, as rounding would.
    """

    drafts = False

    def __init__(self, start: Path, folder: Path, shift: float = 0.0, stale: bool = False, room: int = 128,
                 routes: bool = False, router_noise: float = 0.0) -> None:
        self.model: PreTrainedModel = load_policy(start).eval()
        self.folder, self.shift, self.stale, self.room = folder, shift, stale, room
        self.routes, self.router_noise = routes, router_noise
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text((start / "config.json").read_text())
        self.versions: list[int] = []

    def update(self, tensors: dict[str, torch.Tensor], checksums: dict[str, str], version: int) -> None:
        self.versions.append(version)
        if not self.stale:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, self.folder / "model.safetensors")
            self.model = load_policy(self.folder).eval()

    def read_back(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
        return {name: checksum(tensor) for name, tensor in export_tensors(self.model)
                if name in shapes and ".experts." not in name}

    @torch.no_grad()
    def _logprobs(self, ids: Sequence[int], temperature: float) -> torch.Tensor:
        logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, :-1] / temperature
        return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def prompt_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        return [self._logprobs(ids, 1.0).tolist() for ids in prompts]

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        return [self._one(request, sampling) for request in requests]

    def _one(self, request: Request, sampling: Sampling) -> Generation:
        if len(request.prompt_ids) >= self.room:
            return Generation((), (), "too_long")
        rng = random.Random(request.seed)
        tokens = tuple(rng.randrange(10, VOCAB) for _ in range(rng.randint(2, sampling.max_tokens)))
        logprobs = self._logprobs((*request.prompt_ids, *tokens), sampling.temperature)[-len(tokens):] + self.shift
        routes = self._routes((*request.prompt_ids, *tokens)) if self.routes and sampling.routes else None
        return Generation(tokens, tuple(logprobs.tolist()), "length", routes)

    @torch.no_grad()
    def _routes(self, ids: Sequence[int]) -> np.ndarray:
        """uint8 [tokens - 1, layers, top_k]; a dense layer's column is zero."""
        model = copy.deepcopy(self.model)
        replay = RouteReplay(model)
        for index, router in enumerate(replay.routers):
            noise = torch.randn(router.weight.shape, generator=torch.Generator().manual_seed(index))
            router.weight += self.router_noise * noise
        with replay.recording() as recorded:
            model(input_ids=torch.tensor([list(ids[:-1])]), use_cache=False)
        routes = np.zeros((len(ids) - 1, self.model.config.num_hidden_layers, replay.shape[1]), np.uint8)
        routes[:, replay.layers] = torch.stack(recorded, 1).numpy()
        return routes


def make_prompts(count: int) -> list[Prompt]:
    prompts = []
    for index in range(count):
        messages = ({"role": "user", "content": f"What is {index} + {'1' * (index % 5 + 1)}?"},)
        check = Check("math", reference=str(index))
        prompts.append(Prompt(Problem(Problem.make_id(messages, check), "math", "sum", messages, check, "test", "rl"),
                              "original", messages))
    return prompts


def scripted_scorer(reward: Callable[[int, int], float | None]):
    """A scorer that gives row `row` of step `step` the reward `reward(step, row)`; None is an infra error."""

    def score(prompts, texts, step):
        scores = []
        for row in range(len(texts)):
            value = reward(step, row)
            status = Status.INFRA_ERROR if value is None else Status.CORRECT if value else Status.WRONG
            scores.append(Score(Verdict(status, value, "scripted", "math", "1"), value, {}))
        return scores

    return score
