"""Which experts the tokens of each domain go to (DeepSeek-V3 technical report, appendix C).

The report compares the relative load of experts on different domains: the actual load over that of a uniform choice.
Balancing by bias alone leaves experts free to specialise, balancing each sequence by a loss does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from policy.replay import RouteReplay
from policy.router import main_routers

BATCH_TOKENS = 8192


@torch.no_grad()
def expert_load(model: PreTrainedModel, texts: dict[str, Sequence[Sequence[int]]]) -> dict[str, Any] | None:
    """Tokens each expert gets from the token ids of each domain's texts, over the main model's MoE layers.

    Returns {"layers": layer numbers, "load": {domain: counts [layers][experts]}}; None for a model without experts.
    """
    if not main_routers(model):
        return None
    routes = RouteReplay(model)
    experts = routes.routers[0].num_experts
    found: dict[str, list[list[int]]] = {}
    for domain, rows in texts.items():
        counts = torch.zeros(len(routes.layers), experts, dtype=torch.int64)
        for batch in _batches([row for row in rows if row]):
            mask = torch.arange(max(map(len, batch))) < torch.tensor([len(row) for row in batch]).unsqueeze(1)
            ids = torch.zeros(mask.shape, dtype=torch.int64)
            ids[mask] = torch.tensor([token for row in batch for token in row])
            ids, mask = ids.to(model.device), mask.to(model.device)
            with routes.recording() as recorded:
                model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            for layer, chosen in enumerate(recorded):
                counts[layer] += torch.bincount(chosen[mask.flatten()].flatten(), minlength=experts).cpu()
        found[domain] = counts.tolist()
    return {"layers": routes.layers, "load": found}


def specialisation(load: dict[str, list[list[int]]]) -> float:
    """How far a domain's experts are from those of all domains together, in [0, 1]: mean over layers and domains.

    Half the sum of |share of a domain's tokens - mean share over domains| per expert (total variation): 0 where every
    domain uses the experts alike, near 1 where each has its own.
    """
    shares = torch.tensor([counts for counts in load.values()], dtype=torch.float64)  # [domains, layers, experts]
    shares = shares / shares.sum(-1, keepdim=True)
    return float((shares - shares.mean(0, keepdim=True)).abs().sum(-1).mean() / 2)


def _batches(rows: list[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Rows of like length together, at most BATCH_TOKENS tokens each with padding, but at least one row."""
    batches: list[list[Sequence[int]]] = []
    for row in sorted(rows, key=len):
        if not batches or (len(batches[-1]) + 1) * len(row) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches
