"""Retrieval from long contexts: which facts a model finds, by length and depth (DeepSeek-V3 section 4.3, figure 8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

Tokens = Sequence[int]


@torch.no_grad()
def recalled(model: PreTrainedModel, rows: Sequence[tuple[Tokens, Tokens]], batch: int = 16) -> list[bool]:
    """Whether greedy decoding after each prompt gives the whole answer; rows are (prompt ids, answer ids).

    One pass decides it: greedy decoding gives the answer if and only if each of its tokens is the likeliest after the
    ones before. Rows of a batch are padded at their end, which no earlier token sees.
    """
    model.eval()
    found = [False] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    for start in range(0, len(rows), batch):
        part = by_length[start:start + batch]
        texts = [[*rows[index][0], *rows[index][1]] for index in part]
        width = max(map(len, texts))
        ids = torch.tensor([text + [0] * (width - len(text)) for text in texts], device=model.device)
        keep = torch.arange(min(len(rows[index][0]) for index in part) - 1, width)
        likeliest = model(input_ids=ids, use_cache=False, logits_to_keep=keep.to(model.device)).logits.argmax(-1).cpu()
        for row, index in enumerate(part):
            prompt, answer = rows[index]
            first = len(prompt) - 1 - int(keep[0])
            found[index] = likeliest[row, first:first + len(answer)].tolist() == list(answer)
    return found
