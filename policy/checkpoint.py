"""Lossless conversion of DeepSeek-V3 checkpoints: FP8, BF16 and FP32 folders that transformers, vLLM and we load.

Names are those of the released checkpoint, which is what transformers' `save_pretrained` writes and vLLM's loaders
take; the MTP module is layer `num_hidden_layers`. A source may also hold its experts fused, as transformers does in
memory, and may lack the copies of embedding and head that belong to the MTP module: both are put right. Precision:

- `fp8`: linear layers as pairs (see `policy/fp8_pairs.py`), the rest BF16 or what it was in the FP8 checkpoint it came
  from; pairs that are FP8 already are copied byte for byte. `quantization_config` is kept, or DeepSeek's.
- `bfloat16`, `float32`: everything in that type, without `quantization_config`, as transformers and vLLM want it.
- `e_score_correction_bias` is FP32 everywhere.

FP8 -> FP32 is the rounded product of value and scale (relative error up to 2^-24), FP8 -> BF16 that product rounded to
nearest even once more (up to 2^-8). From either the way back to FP8 gives the same bytes.

One tensor is in memory at a time, beside what computing on it needs. The folder is filled aside and renamed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from pipeline.artifacts import write_atomically
from pipeline.stage import StageError
from policy.fp8_pairs import (
    QUANTISED,
    QUANTIZATION_CONFIG,
    RECORD,
    SCALE,
    FP8Record,
    check_pairs,
    fp8_record,
    grid_shape,
    same_bytes,
    values_at,
    widen,
)
from policy.kernels.quantize import Quantized, quantize_blocks
from policy.model import mtp_copies
from policy.presets import ROUTER_KEYS
from policy.released_layout import check_complete, unfused
from policy.shards import (
    INDEX,
    MANIFEST,
    SHARD_BYTES,
    Layout,
    ShardWriter,
    StoredTensor,
    TensorRecord,
    manifest_digest,
    read_manifest,
    stored_tensors,
    write_manifest,
)

Precision = Literal["fp8", "bfloat16", "float32"]
ORIGIN = "converted_from.json"  # the source's manifest
BIAS = "e_score_correction_bias"


@dataclass(frozen=True)
class Conversion:
    """What was done. kept, made: FP8 pairs carried or found again byte for byte, and quantised anew."""

    digest: str
    tensors: int
    bytes: int
    kept: int = 0
    made: int = 0


def convert(source: Path, target: Path, to: Precision, shard_bytes: int = SHARD_BYTES,
            on_bytes: Callable[[int, int], None] = lambda done, total: None) -> Conversion:
    """Convert the checkpoint folder `source` into the new folder `target`, shard by shard.

    Beside the weights it holds config, tokenizer and other files of the source, the manifest `tensors.json`, the
    source's manifest `converted_from.json` and, where FP8 was widened, the folder `fp8/` that makes it come back.
    `on_bytes(done, total)` counts bytes of the source. Raises StageError for a source that is incomplete, damaged or of
    another layout, for a target that exists, and when the disk is full.
    """
    if to not in get_args(Precision):
        raise ValueError(f"to: must be one of {', '.join(get_args(Precision))} (got {to})")
    if target.exists():
        raise StageError(f"{target}: already exists; remove it or name another folder")
    config = _read_config(source)
    stored = unfused(stored_tensors(source))
    check_pairs(stored)
    parsed = AutoConfig.from_pretrained(source)
    for copy, original in mtp_copies(parsed).items():
        if original in stored:
            stored.setdefault(copy, stored[original])
    check_complete(source, stored, parsed)
    record = fp8_record(source, stored, config)
    job = _Job(source, stored, record, to, *_layouts(stored, record, to))
    needed = sum(layout.bytes for layout in (*job.layout.values(), *job.scale_layout.values()))
    with _filled_aside(target, needed) as aside:
        done = job.run(aside, shard_bytes, on_bytes)
        _copy_other_files(source, aside)
        written = json.dumps(_target_config(config, record, to), indent=2, sort_keys=True)
        write_atomically(aside / "config.json", written + "\n")
    return done


@dataclass
class _Job:
    source: Path
    stored: dict[str, StoredTensor]
    record: FP8Record | None
    to: Precision
    layout: dict[str, Layout]
    scale_layout: dict[str, Layout]  # of the folder fp8/

    def run(self, folder: Path, shard_bytes: int, on_bytes: Callable[[int, int], None]) -> Conversion:
        read: dict[str, TensorRecord] = {}
        listed = read_manifest(self.source) if (self.source / MANIFEST).exists() else {}
        total, done, kept, made = sum(tensor.layout.bytes for tensor in self.stored.values()), 0, 0, 0

        def take(name: str) -> torch.Tensor:
            nonlocal done
            stored = self.stored[name]
            tensor = stored.read()
            read[stored.key] = TensorRecord.of(tensor)
            if listed.get(stored.key, read[stored.key]) != read[stored.key]:
                raise StageError(f"{stored.file}: {stored.key} is not what {MANIFEST} lists; it is damaged, or was "
                                 f"changed by another program: copy it again, or remove {MANIFEST} to take it as it is")
            done += stored.layout.bytes
            on_bytes(done, total)
            return tensor

        if self.scale_layout:
            self.record.write(folder / RECORD)
        with (ShardWriter(folder, self.layout, shard_bytes) as weights,
              ShardWriter(folder / RECORD, self.scale_layout, shard_bytes) if self.scale_layout else nullcontext()
              as scales):
            for name in self.stored:
                if name.endswith(SCALE):
                    continue
                tensor = take(name)
                if tensor.dtype == torch.float8_e4m3fn:
                    pair = Quantized(tensor, take(name + SCALE))
                else:
                    pair = self.record.pair(name, tensor) if self.record else None
                if name + SCALE in self.layout:
                    kept, made = kept + (pair is not None), made + (pair is None)
                    pair = pair or quantize_blocks(tensor.float(), self._power_of_two())
                    weights.write(name, pair.values)
                    weights.write(name + SCALE, pair.scales)
                    continue
                dtype = self.layout[name].dtype
                written = widen(pair, dtype) if tensor.dtype == torch.float8_e4m3fn else tensor.to(dtype)
                weights.write(name, written)
                if name + SCALE in self.scale_layout:
                    kept += pair is not None
                    scales.write(name + SCALE, pair.scales if pair else self.record.scales[name].read())
                    if pair and not same_bytes(values_at(written, pair.scales), pair.values):
                        save_file({name: pair.values.contiguous()}, folder / RECORD / f"{name}.safetensors")
        write_manifest(folder / MANIFEST, weights.manifest)
        write_manifest(folder / ORIGIN, read, path=str(self.source), digest=manifest_digest(read))
        size = sum(layout.bytes for layout in self.layout.values())
        return Conversion(manifest_digest(weights.manifest), len(weights.manifest), size, kept, made)

    def _power_of_two(self) -> bool:
        """Scales of DeepSeek-V3.1 are powers of two, and its config says so."""
        return bool(self.record) and self.record.quantization_config.get("scale_fmt") == "ue8m0"


def _layouts(stored: dict[str, StoredTensor], record: FP8Record | None, to: Precision
             ) -> tuple[dict[str, Layout], dict[str, Layout]]:
    """The target's tensors, and those of its folder `fp8/`."""
    layout, scale_layout = {}, {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        shape = tensor.layout.shape
        scales = Layout(torch.float32, grid_shape(shape))
        if to == "fp8" and (name in record.scales if record else QUANTISED.search(name)):
            layout |= {name: Layout(torch.float8_e4m3fn, shape), name + SCALE: scales}
            continue
        if to == "fp8":
            dtype = record.dtypes.get(name, "bfloat16") if record else "bfloat16"
        else:
            dtype = to
            if record and name in record.scales:
                scale_layout[name + SCALE] = scales
        layout[name] = Layout(torch.float32 if name.endswith(BIAS) else getattr(torch, dtype), shape)
    return layout, scale_layout


def _read_config(source: Path) -> dict[str, Any]:
    file = source / "config.json"
    if not file.is_file():
        raise StageError(f"{source}: no config.json; give a Hugging Face model folder")
    config = json.loads(file.read_text())
    if config.get("model_type") != "deepseek_v3":
        raise StageError(f"{file}: model_type must be deepseek_v3 (got {config.get('model_type')}); other models have "
                         "other names and no FP8 layout of their own here")
    return config


def _target_config(config: dict[str, Any], record: FP8Record | None, to: Precision) -> dict[str, Any]:
    config = {**ROUTER_KEYS, **config, "architectures": ["DeepseekV3ForCausalLM"]}
    config.pop("quantization_config", None)
    if to == "fp8":
        config["quantization_config"] = record.quantization_config if record else QUANTIZATION_CONFIG
    for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]:
        config[key] = "bfloat16" if to == "fp8" else to
    return config


def _copy_other_files(source: Path, folder: Path) -> None:
    """Tokenizer, generation settings, code, licence: what is neither weights nor written by the conversion."""
    ours = {"config.json", INDEX, MANIFEST, ORIGIN}
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name not in ours and file.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
            with open(file, "rb") as original, open(folder / file.name, "wb") as copy:
                shutil.copyfileobj(original, copy)
                copy.flush()
                os.fsync(copy.fileno())


@contextmanager
def _filled_aside(target: Path, needed: int) -> Iterator[Path]:
    """A folder beside `target` that becomes it by one rename; after an error it is gone, after a kill emptied first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.partial")
    aside.mkdir(exist_ok=True)
    holder = os.open(aside, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(holder)
        raise StageError(f"{target}: another conversion is writing it; wait, or name another folder") from None
    try:
        for left in aside.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        if shutil.disk_usage(aside).free < needed:
            raise OSError(errno.ENOSPC, "before anything was written")
        yield aside
        os.fsync(holder)
        os.rename(aside, target)
    except BaseException as error:
        free = shutil.disk_usage(aside).free
        shutil.rmtree(aside)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StageError(f"the disk is full: {target} needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB "
                             "were left; nothing half-written is kept. Free some space, or name a folder on another "
                             "disk, and give the same command again") from error
        raise
    finally:
        os.close(holder)
