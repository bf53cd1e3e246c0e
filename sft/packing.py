"""Packing: many samples per sequence, none of which sees another (DeepSeek-V3 section 5.1).

Only lengths are planned. Best fit over groups of equal length needs half a second for 1.5M samples, and fills packs
whose order is then shuffled. Position ids restart at each sample; transformers builds the block-diagonal
mask from them.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

IGNORE = -100  # label of tokens that carry no loss

PACKS = pa.schema([("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32())),
                   ("position_ids", pa.list_(pa.int32())), ("sample_ids", pa.list_(pa.string()))])


@dataclass(frozen=True)
class TokenizedSample:
    """`input_ids` of prompt and completion; the loss is on `input_ids[prompt_length:]`."""

    id: str
    input_ids: Sequence[int] | np.ndarray
    prompt_length: int


def plan_packs(lengths: Sequence[int], pack_length: int) -> list[list[int]]:
    """Group indices so that lengths sum to at most `pack_length` per group, by best fit decreasing.

    Raises ValueError for a length above `pack_length` (drop and count those first) or below 1.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    outside = np.flatnonzero((lengths < 1) | (lengths > pack_length))
    if len(outside):
        raise ValueError(f"sample {outside[0]} has {lengths[outside[0]]} tokens; packs hold 1 to {pack_length}")
    order = np.argsort(lengths, kind="stable")
    distinct, starts = np.unique(lengths[order], return_index=True)
    by_length = dict(zip(distinct.tolist(), np.split(order, starts[1:]), strict=True)) if len(order) else {}
    open_packs: dict[int, list[list[int]]] = {}  # space left -> packs
    spaces: list[int] = []  # the sorted keys of open_packs

    def put(space: int, packs: list[list[int]]) -> None:
        if space not in open_packs:
            open_packs[space] = []
            insort(spaces, space)
        open_packs[space].extend(packs)

    for length in sorted(by_length, reverse=True):
        waiting = by_length[length].tolist()
        while waiting:
            position = bisect_left(spaces, length)
            if position == len(spaces):
                put(pack_length, [[] for _ in range(-(-len(waiting) * length // pack_length))])
                continue
            space = spaces[position]
            packs = open_packs[space]
            taken, open_packs[space] = packs[:len(waiting)], packs[len(waiting):]
            if not open_packs[space]:
                del open_packs[space], spaces[position]
            for pack in taken:
                pack.append(waiting.pop())
            put(space - length, taken)
    return [pack for packs in open_packs.values() for pack in packs if pack]


def shuffled_plan(lengths: Sequence[int], pack_length: int, seed: int) -> list[list[int]]:
    """The packs of samples of at most `pack_length` tokens in a seeded order, each a list of indices.

    Longer samples are in no pack: count them.
    """
    lengths, rng = np.asarray(lengths, dtype=np.int64), np.random.default_rng(seed)
    fitting = rng.permutation(np.flatnonzero(lengths <= pack_length))
    packs = plan_packs(lengths[fitting], pack_length)
    samples = fitting.tolist()
    return [[samples[place] for place in packs[turn]] for turn in rng.permutation(len(packs)).tolist()]


def fill_packs(packs: Iterable[Sequence[TokenizedSample]], pack_length: int, pad_id: int) -> pa.Table:
    """Packs as rows of PACKS, each of exactly `pack_length` tokens.

    Padding stands at the end: `pad_id`, label IGNORE, positions from 0.
    """
    packs = list(packs)
    shape = (len(packs), pack_length)
    input_ids, labels = np.full(shape, pad_id, dtype=np.int32), np.full(shape, IGNORE, dtype=np.int32)
    positions = np.empty(shape, dtype=np.int32)
    count = np.arange(pack_length, dtype=np.int32)
    for row, pack in enumerate(packs):
        start = 0
        for sample in pack:
            end = start + len(sample.input_ids)
            input_ids[row, start:end] = sample.input_ids
            labels[row, start + sample.prompt_length:end] = sample.input_ids[sample.prompt_length:]
            positions[row, start:end] = count[:end - start]
            start = end
        positions[row, start:] = count[:pack_length - start]
    ends = pa.array(np.arange(0, (len(packs) + 1) * pack_length, pack_length, dtype=np.int32))
    columns = [pa.ListArray.from_arrays(ends, pa.array(column.reshape(-1)))
               for column in (input_ids, labels, positions)]
    return pa.table([*columns, pa.array([[sample.id for sample in pack] for pack in packs], PACKS.field(3).type)],
                    schema=PACKS)


def pack_samples(samples: Sequence[TokenizedSample], pack_length: int, pad_id: int, seed: int
                 ) -> tuple[pa.Table, list[str]]:
    """Pack in a seeded random order; returns the packs and the ids of samples too long for one."""
    lengths = [len(sample.input_ids) for sample in samples]
    plan = shuffled_plan(lengths, pack_length, seed)
    too_long = [sample.id for sample, length in zip(samples, lengths, strict=True) if length > pack_length]
    return fill_packs(([samples[index] for index in pack] for pack in plan), pack_length, pad_id), too_long
