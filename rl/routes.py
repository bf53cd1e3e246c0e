"""The engine's routes in the layout of a training batch (Rollout Routing Replay, arXiv 2510.11370).

vLLM gives, for each request, the experts of every token that went through the model: prompt and completion but for
the last token, whose successor nobody sampled. Its columns are all layers of the main model, dense ones filled with
zeros. Not run on a GPU: vLLM returns routes by its GPU model runner alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.stage import StageError
from policy.replay import OWN
from rl.engine import Generation


def engine_routes(rows: Sequence[tuple[Sequence[int], Generation]], prompt_width: int, width: int,
                  layers: Sequence[int], top_k: int) -> torch.Tensor | None:
    """int16 [rows, width, layers, top_k] for (prompt ids, generation) rows; None where the engine returns no routes.

    Prompts end at column `prompt_width` and completions begin there. `layers` are those with experts. Places the
    engine says nothing about hold OWN. Raises StageError for routes of another length or width than the tokens.
    """
    if all(generation.routes is None for _, generation in rows):
        return None
    batch = torch.full((len(rows), width, len(layers), top_k), OWN, dtype=torch.int16)
    for row, (prompt, generation) in enumerate(rows):
        tokens, found = len(prompt) + len(generation.token_ids) - 1, generation.routes
        if found is None or found.shape[0] != tokens or found.shape[1] <= max(layers) or found.shape[2] != top_k:
            raise StageError(
                f"rl: the engine returned routes of shape {None if found is None else found.shape} for {tokens} "
                f"tokens, layers {layers[0]} to {layers[-1]}, {top_k} experts a token; this vLLM lays them out "
                "otherwise. Set engine.return_routes: false to have the trainer recompute them")
        begin = prompt_width - len(prompt)
        batch[row, begin:begin + tokens] = torch.from_numpy(found[:, list(layers)].astype("int16"))
    return batch
