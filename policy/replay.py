"""Routing replay: train the policy through the experts its rollout went through.

A mixture of experts is a different function when its routers choose otherwise, and rounding or one optimizer step is
enough for some tokens (Qwen, GSPO, arXiv 2507.18071, section 5.3, replays the old policy's routes; Rollout Routing
Replay, arXiv 2510.11370, the engine's). Then the ratio of new to old probability compares two functions. Here the
routes are given to the gradient passes; the weights of the experts are still those of the current scores.

Only the main model's routers take part. The multi-token-prediction module sees other inputs and keeps its own choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from policy.kernels.router import choose
from policy.router import Router, main_routers

OWN = -1  # in place of an expert: the token chooses for itself


class RouteReplay:
    """Records the routes of a pass, or makes a pass take given ones. One at a time.

    `tokens` and `rerouted` count, since `reset`, the tokens whose routes were replayed and those of them that would
    have gone elsewhere in at least one layer. Raises ValueError for a model without experts.
    """

    def __init__(self, model: PreTrainedModel):
        routers = main_routers(model)
        if not routers:
            raise ValueError(f"routing replay: {type(model).__name__} ({model.config.model_type}) has no routers whose "
                             "routes could be replayed; set routing_replay: false")
        self.layers, self.routers = list(routers), list(routers.values())
        self._recorded: list[torch.Tensor] | None = None
        self._elsewhere: torch.Tensor | None = None
        self.reset()
        for router in self.routers:
            router.register_forward_hook(self._watch)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, top_k) of a token's routes."""
        return len(self.routers), self.routers[0].top_k

    def reset(self) -> None:
        self.tokens = self.rerouted = 0

    @contextmanager
    def recording(self) -> Iterator[list[torch.Tensor]]:
        """Inside, each pass appends its routes to the list, layer after layer: int64 [batch x tokens, top_k]."""
        self.stop()
        self._recorded = []
        try:
            yield self._recorded
        finally:
            self._recorded = None

    def start(self, routes: torch.Tensor) -> None:
        """Replay routes [batch, tokens, layers, top_k] in passes over as many tokens, until `stop`."""
        self.stop()
        for index, router in enumerate(self.routers):
            router.replay = routes[:, :, index].flatten(0, 1).long()
        self._elsewhere = torch.zeros(routes.shape[0] * routes.shape[1], dtype=torch.bool, device=routes.device)

    def count(self, mask: torch.Tensor) -> None:
        """Count the pass just done over the tokens of mask [batch, tokens] that were replayed."""
        replayed = mask.flatten() & (self.routers[0].replay[:, 0] >= 0)
        self.tokens += int(replayed.sum())
        self.rerouted += int((self._elsewhere & replayed).sum())

    def stop(self) -> None:
        """Let the routers choose again."""
        for router in self.routers:
            router.replay = None
        self._elsewhere = None

    @torch.no_grad()
    def _watch(self, router: Router, _inputs, output) -> None:
        logits, _, taken = output
        if self._recorded is not None:
            self._recorded.append(taken)
        elif router.replay is not None:
            own = choose(logits, router.e_score_correction_bias, router.num_group, router.topk_group, router.top_k)
            self._elsewhere |= (own.sort(-1).values != taken.sort(-1).values).any(-1)


def stack_routes(recorded: list[torch.Tensor], batch: int) -> torch.Tensor:
    """The routes of one recorded pass as int16 [batch, tokens, layers, top_k]."""
    return torch.stack(recorded, 1).to(torch.int16).unflatten(0, (batch, -1))
