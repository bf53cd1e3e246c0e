"""The order of packs on many processes: that of one process, and blank packs where they do not come out even.

accelerate would fill the last round of an epoch with packs from its start, which would then count twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from sft.packing import IGNORE


class BlanksLast(Sampler[int]):
    """Indices of `packs` packs, shuffled as accelerate does unless `in_order`, then those of the blanks after them."""

    def __init__(self, packs: int, total: int, seed: int, in_order: bool):
        self.packs, self.total, self.in_order = packs, total, in_order
        self._shuffled = SeedableRandomSampler(range(packs), data_seed=seed)

    def __iter__(self) -> Iterator[int]:
        yield from range(self.packs) if self.in_order else self._shuffled
        yield from range(self.packs, self.total)

    def __len__(self) -> int:
        return self.total

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate's data loader before each epoch."""
        self._shuffled.set_epoch(epoch)


def fill_with_blanks(packs: Dataset, multiple: int, pad_id: int) -> Dataset:
    """Append packs of padding, which have no loss and no load, until the count is a multiple of `multiple`."""
    missing, length = -len(packs) % multiple, len(packs[0]["input_ids"])
    blank = {"input_ids": [pad_id] * length, "labels": [IGNORE] * length, "position_ids": list(range(length))}
    blanks = Dataset.from_list([blank] * missing, features=packs.features) if missing else None
    return packs if blanks is None else concatenate_datasets([packs, blanks])
