"""DeepSeek's FP8 weights on disk, and how they come back bit for bit after a life in FP32 or BF16.

A linear layer of the released checkpoint is a pair: `X.weight` (float8_e4m3fn [n, k]) and `X.weight_scale_inv` (FP32
[ceil(n / 128), ceil(k / 128)]); it means values * scale, block by block (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).

The products alone do not tell the pair. Values have 4 significant bits and scales 24, FP32 keeps 24 of the 28 and BF16
8, so several scales give the same products; nor need the largest code of a block be 448, and a block of zeros goes with
any scale. So the scales are kept beside the wide weights, in the folder `fp8/`. The values need not be: a product over
its scale is off by at most 2^-8 of itself, half the gap between two codes is at least 2^-5 of them, so rounding finds
the code again. Where it does not (a product that underflows, a scale of zero, NaN) the values are kept as well: that is
found out by trying, for each weight, when it is widened.

A recorded pair counts only where it stands for exactly the weight that is there, or for one that BF16 rounded to it.
Weights trained since then do not pass and are quantised anew.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.artifacts import write_atomically
from pipeline.stage import StageError
from policy.kernels.quantize import BLOCK, BLOCKS, Quantized, dequantize
from policy.shards import StoredTensor, dtype_name, stored_tensors

SCALE = "_scale_inv"
RECORD = "fp8"  # folder beside the wide weights
# of the released checkpoint: embedding, head, norms, router and eh_proj stay wide
QUANTISED = re.compile(r"\.(q_proj|q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj"
                       r"|gate_proj|up_proj|down_proj)\.weight$")
QUANTIZATION_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                       "weight_block_size": [BLOCK, BLOCK]}


def widen(pair: Quantized, dtype: torch.dtype) -> Tensor:
    """The weight [n, k] that a pair stands for: the FP32 product, rounded to nearest even where `dtype` is BF16."""
    return dequantize(pair, BLOCKS).to(dtype)


def values_at(weight: Tensor, scales: Tensor) -> Tensor:
    """float8_e4m3fn [n, k]: `weight` over its block's scale, rounded to the nearest code. A scale of 0 divides not."""
    rows, columns = weight.shape
    spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return (weight.float() / torch.where(spread == 0, 1.0, spread)).to(torch.float8_e4m3fn)


def stands_for(pair: Quantized, weight: Tensor) -> bool:
    """Whether `weight` is the pair's, exactly or after rounding to BF16."""
    product, wide = widen(pair, torch.float32), weight.float()
    return any(bool(((form == wide) | (form.isnan() & wide.isnan())).all())
               for form in (product, product.bfloat16().float()))


def same_bytes(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.view(torch.uint8), second.view(torch.uint8))


def grid_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of a weight: one for each started 128x128 block."""
    return tuple(-(-size // BLOCK) for size in shape)


@dataclass(frozen=True)
class FP8Record:
    """What the wide weights of an FP8 checkpoint do not tell.

    dtypes: of its tensors that are not FP8. scales, values: by the weight's name; values only where they cannot be
    found again.
    """

    quantization_config: dict[str, Any]
    dtypes: dict[str, str]
    scales: dict[str, StoredTensor] = field(default_factory=dict)
    values: dict[str, StoredTensor] = field(default_factory=dict)

    def pair(self, name: str, weight: Tensor) -> Quantized | None:
        """The pair that `weight` came from; None where there was none, or the weight has changed since."""
        if name not in self.scales:
            return None
        scales = self.scales[name].read()
        if scales.shape != grid_shape(tuple(weight.shape)):
            raise StageError(f"{self.scales[name].file}: scales {tuple(scales.shape)} of {name} do not fit its shape "
                             f"{tuple(weight.shape)}; remove the folder {RECORD}/ to quantise anew")
        values = self.values[name].read() if name in self.values else values_at(weight, scales)
        pair = Quantized(values, scales)
        return pair if stands_for(pair, weight) else None

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        kept = {key: value for key, value in asdict(self).items() if key in ("quantization_config", "dtypes")}
        write_atomically(folder / "record.json", json.dumps(kept, indent=1, sort_keys=True) + "\n")


def fp8_record(folder: Path, stored: dict[str, StoredTensor], config: dict[str, Any]) -> FP8Record | None:
    """The record of a checkpoint that is FP8 itself, or the one beside wide weights that came from FP8, or None.

    stored: the folder's tensors, checked by `check_pairs`. Raises StageError for blocks other than 128x128.
    """
    scales = {name.removesuffix(SCALE): tensor for name, tensor in stored.items() if name.endswith(SCALE)}
    if scales:
        quantization = config.get("quantization_config") or QUANTIZATION_CONFIG
        if list(quantization.get("weight_block_size") or ()) != [BLOCK, BLOCK]:
            raise StageError(f"{folder / 'config.json'}: quantization_config.weight_block_size must be [128, 128] (got "
                             f"{quantization.get('weight_block_size')}); other blocks are not DeepSeek's layout")
        dtypes = {name: dtype_name(tensor.layout.dtype) for name, tensor in stored.items()
                  if name not in scales and not name.endswith(SCALE)}
        return FP8Record(quantization, dtypes, scales)
    if not (folder / RECORD / "record.json").exists():
        return None
    kept = stored_tensors(folder / RECORD)
    return FP8Record(**json.loads((folder / RECORD / "record.json").read_text()),
                     scales={name.removesuffix(SCALE): tensor for name, tensor in kept.items() if name.endswith(SCALE)},
                     values={name: tensor for name, tensor in kept.items() if not name.endswith(SCALE)})


def check_pairs(stored: dict[str, StoredTensor]) -> None:
    """Every FP8 weight has FP32 scales of the right grid, and every scale an FP8 weight; StageError names what not."""
    fp8 = torch.float8_e4m3fn
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            weight = stored.get(name.removesuffix(SCALE))
            if weight is None or weight.layout.dtype != fp8:
                there = f"is {dtype_name(weight.layout.dtype)}" if weight else "is missing"
                raise StageError(f"{tensor.file}: {name} scales {name.removesuffix(SCALE)}, which {there}; give the "
                                 "float8_e4m3fn weight it was saved with, or remove the scale")
            grid = grid_shape(weight.layout.shape)
            if tensor.layout.dtype != torch.float32 or tensor.layout.shape != grid:
                raise StageError(f"{tensor.file}: {name} must be float32 {grid}, one for each 128x128 block of "
                                 f"{weight.layout.shape} (got {dtype_name(tensor.layout.dtype)} "
                                 f"{tensor.layout.shape}); other blocks and scale types are not DeepSeek's layout")
        elif tensor.layout.dtype == fp8 and name + SCALE not in stored:
            raise StageError(f"{tensor.file}: {name} is float8_e4m3fn without its scales {name + SCALE}; copy the "
                             "shard that holds them")
