"""The router as one kernel: a program reads a token's logits once and writes its experts and weights.

The operations of `policy/kernels/router.py` in one pass over registers: with 256 experts and top-8 that is 1 KiB read
and 96 bytes written a token, where the operators move the scores through memory seven times. One warp a token. Equal
scores go to the lower expert number. Not run on a GPU yet: checked in the interpreter and compiled ahead of time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def route_kernel(logits, bias, replay, indices, weights, scale, EXPERTS: tl.constexpr, GROUPS: tl.constexpr,
                 GROUPS_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr, TOPK_GROUP: tl.constexpr,
                 TOP_K: tl.constexpr, TOP_K_PADDED: tl.constexpr, NORM: tl.constexpr, REPLAY: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    WIDTH: tl.constexpr = EXPERTS // GROUPS
    group = tl.arange(0, GROUPS_PADDED)
    place = tl.arange(0, WIDTH_PADDED)
    expert = group[:, None] * WIDTH + place[None, :]
    inside = (group[:, None] < GROUPS) & (place[None, :] < WIDTH)
    scores = tl.sigmoid(tl.load(logits + token * EXPERTS + expert, mask=inside, other=0.0))
    biased = tl.where(inside, scores + tl.load(bias + expert, mask=inside, other=0.0), -float("inf"))

    # a group is worth its two best experts
    best, at = tl.max(biased, axis=1, return_indices=True)
    second = tl.max(tl.where(place[None, :] == at[:, None], -float("inf"), biased), axis=1)
    worth = tl.where(group < GROUPS, best + second, -float("inf"))
    is_open = tl.zeros([GROUPS_PADDED], dtype=tl.int1)
    for _ in tl.static_range(TOPK_GROUP):
        chosen_group = tl.argmax(worth, axis=0)
        is_open = is_open | (group == chosen_group)
        worth = tl.where(group == chosen_group, -float("inf"), worth)
    biased = tl.where(is_open[:, None], biased, -float("inf"))

    SIZE: tl.constexpr = GROUPS_PADDED * WIDTH_PADDED
    biased, scores = tl.reshape(biased, [SIZE]), tl.reshape(scores, [SIZE])
    expert, inside = tl.reshape(expert, [SIZE]), tl.reshape(inside, [SIZE])
    rank = tl.arange(0, TOP_K_PADDED)
    taken = tl.zeros([TOP_K_PADDED], dtype=tl.int64)
    found = tl.zeros([TOP_K_PADDED], dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        at = tl.argmax(biased, axis=0)
        own = tl.sum(tl.where(tl.arange(0, SIZE) == at, expert, 0), axis=0).to(tl.int64)
        biased = tl.where(tl.arange(0, SIZE) == at, -float("inf"), biased)
        if REPLAY:
            first = tl.load(replay + token * TOP_K)
            own = tl.where(first < 0, own, tl.load(replay + token * TOP_K + k))
        score = tl.sum(tl.where(inside & (expert == own), scores, 0.0), axis=0)
        taken = tl.where(rank == k, own, taken)
        found = tl.where(rank == k, score, found)
    if NORM:
        found = found / (tl.sum(found, axis=0) + 1e-20)
    tl.store(indices + token * TOP_K + rank, taken, mask=rank < TOP_K)
    tl.store(weights + token * TOP_K + rank, found * scale, mask=rank < TOP_K)


def constants(experts: int, n_group: int, topk_group: int, top_k: int, norm: bool, replay: bool) -> dict[str, object]:
    """The compile-time arguments of `route_kernel` for a shape."""
    return {"EXPERTS": experts, "GROUPS": n_group, "GROUPS_PADDED": triton.next_power_of_2(n_group),
            "WIDTH_PADDED": triton.next_power_of_2(experts // n_group), "TOPK_GROUP": topk_group, "TOP_K": top_k,
            "TOP_K_PADDED": triton.next_power_of_2(top_k), "NORM": norm, "REPLAY": replay}


def launch(logits: torch.Tensor, bias: torch.Tensor, n_group: int, topk_group: int, top_k: int, scale: float,
           norm: bool, replay: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; arguments and results as of `policy.kernels.router.route`."""
    tokens, experts = logits.shape
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    if tokens:
        route_kernel[(tokens,)](
            logits.contiguous(), bias, indices if replay is None else replay.contiguous(), indices, weights, scale,
            **constants(experts, n_group, topk_group, top_k, norm, replay is not None), num_warps=1)
    return indices, weights
