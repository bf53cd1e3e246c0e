"""Folders of safetensors shards, read and written tensor by tensor, and the manifest of what they hold.

`safetensors.save_file` wants all tensors of a file at once, transformers all of a model. A released DeepSeek-V3 has
689 GB of them, so here a shard's header is written first, from names, dtypes and shapes alone, and each tensor goes to
its place when it is there. The layout is the one the Hub uses: `model.safetensors`, or shards of a bounded size with
`model.safetensors.index.json`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open

from pipeline.artifacts import write_atomically
from pipeline.stage import StageError

INDEX, MANIFEST = "model.safetensors.index.json", "tensors.json"
SHARD_BYTES = 5 * 10**9
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorRecord:
    """A line of a manifest. The checksum covers dtype, shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    checksum: str

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorRecord:
        return cls(dtype_name(tensor.dtype), tuple(tensor.shape), checksum(tensor))


@dataclass(frozen=True)
class Layout:
    """What a tensor will be, before it is there."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: from `offset` on in a file. `key` is its own name, whatever name it is used under."""

    file: Path
    key: str
    layout: Layout
    offset: int

    def read(self) -> torch.Tensor:
        """The tensor, in memory of its own; a mapped file would stay in memory with all that was read of it."""
        held = bytearray(self.layout.bytes)
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            file.readinto(held)
        return torch.frombuffer(held, dtype=self.layout.dtype).view(self.layout.shape)


def checksum(tensor: torch.Tensor) -> str:
    """Hash of dtype, shape and bytes of one tensor."""
    tensor = tensor.detach().cpu().contiguous()
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=8)
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def write_manifest(file: Path, manifest: Mapping[str, TensorRecord], **more: Any) -> None:
    """Write {"tensors": {name: record}, **more} as JSON, a tensor a line."""
    lines = [f"{json.dumps(name)}: {json.dumps(asdict(record))}" for name, record in sorted(manifest.items())]
    head = "".join(f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in more.items())
    write_atomically(file, "{\n" + head + '"tensors": {\n' + ",\n".join(lines) + "\n}}\n")


def read_manifest(folder: Path) -> dict[str, TensorRecord]:
    """The manifest a checkpoint folder was written with, or one made by reading its weights, a tensor at a time."""
    file = folder / MANIFEST
    if not file.exists():
        return {name: TensorRecord.of(stored.read()) for name, stored in stored_tensors(folder).items()}
    return {name: TensorRecord(record["dtype"], tuple(record["shape"]), record["checksum"])
            for name, record in json.loads(file.read_text())["tensors"].items()}


def manifest_digest(manifest: Mapping[str, TensorRecord]) -> str:
    """One hash over all checksums."""
    checksums = {name: record.checksum for name, record in manifest.items()}
    return hashlib.sha256(json.dumps(checksums, sort_keys=True).encode()).hexdigest()[:16]


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder in the order they lie there, from the files' headers alone.

    Raises FileNotFoundError when the folder has no weights, StageError when a file is missing or cut short, or when
    the index and the files do not name the same tensors.
    """
    index = folder / INDEX
    named = json.loads(index.read_text())["weight_map"] if index.exists() else {}
    files = [folder / name for name in sorted(set(named.values()))] or sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.safetensors in this folder; give a Hugging Face model folder")
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            held = next(name for name, held in named.items() if held == file.name)
            raise StageError(f"{file}: missing, and {INDEX} says it holds {held}; copy or download this shard")
        for stored in _read_header(file):
            if stored.key in found:
                raise StageError(f"{stored.key}: in {found[stored.key].file.name} and in {file.name}; remove the file "
                                 f"that does not belong to the checkpoint, or add {INDEX}")
            found[stored.key] = stored
    for name, file_name in named.items():
        if name not in found or found[name].file.name != file_name:
            raise StageError(f"{folder / file_name}: {INDEX} says it holds {name}, and it does not; copy or download "
                             "shards and index of the same version")
    if named and (unnamed := [name for name in found if name not in named]):
        raise StageError(f"{found[unnamed[0]].file}: holds {unnamed[0]}, which {INDEX} does not name; copy or download "
                         "shards and index of the same version")
    return found


def _read_header(file: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(file, framework="pt"):
            pass  # checks that names, shapes, offsets and the file's size fit together
    except SafetensorError as error:
        raise StageError(f"{file}: {error}. The file is cut short or damaged; copy or download it again") from None
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise StageError(f"{file}: {name} is {entry['dtype']}; known are {', '.join(DTYPES)}")
        layout = Layout(DTYPES[entry["dtype"]], tuple(entry["shape"]))
        yield StoredTensor(file, name, layout, 8 + length + entry["data_offsets"][0])


class ShardWriter:
    """Writes tensors into the shards of `layout`, whose order they keep; a context manager.

    A shard holds up to `shard_bytes`, or one tensor that is larger. `write` takes the tensors in any order, each as
    the layout says; after the block, `manifest` has them all and every byte is on the disk.
    """

    def __init__(self, folder: Path, layout: Mapping[str, Layout], shard_bytes: int = SHARD_BYTES):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.layout = folder, layout
        self.manifest: dict[str, TensorRecord] = {}
        self.shards = _cut(layout, shard_bytes)
        count = len(self.shards)
        names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        self.file_names = names if count > 1 else ["model.safetensors"]
        self.shard_of = {name: number for number, shard in enumerate(self.shards) for name in shard}
        self.waiting = [len(shard) for shard in self.shards]
        self.offsets: dict[str, int] = {}
        self.opened: dict[int, IO[bytes]] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put one tensor in its place. Raises ValueError when it is not what the layout says, or there already."""
        layout, number = self.layout[name], self.shard_of[name]
        if name in self.manifest or (tensor.dtype, tuple(tensor.shape)) != (layout.dtype, layout.shape):
            raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)} where {layout} is to be written once")
        tensor = tensor.detach().cpu().contiguous()
        file = self.opened.get(number) or self._open(number)
        file.seek(self.offsets[name])
        file.write(tensor.reshape(-1).view(torch.uint8).numpy())
        self.manifest[name] = TensorRecord.of(tensor)
        self.waiting[number] -= 1
        if not self.waiting[number]:
            self._close(number)

    def __exit__(self, kind: object, *_: object) -> None:
        for number in list(self.opened):
            self._close(number)
        if kind is not None:
            return
        if lacking := [name for name in self.layout if name not in self.manifest]:
            raise ValueError(f"{lacking[0]}: was never written ({len(lacking)} tensors)")
        if len(self.shards) > 1:
            total = sum(layout.bytes for layout in self.layout.values())
            weight_map = {name: self.file_names[number] for name, number in self.shard_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_atomically(self.folder / INDEX, json.dumps(index, indent=2) + "\n")

    def _open(self, number: int) -> IO[bytes]:
        # readers map the file: each tensor must begin at a multiple of its item size, so the widest come first
        names = sorted(self.shards[number], key=lambda name: -self.layout[name].dtype.itemsize)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            layout = self.layout[name]
            start, end = end, end + layout.bytes
            header[name] = {"dtype": CODES[layout.dtype], "shape": layout.shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in names:
            self.offsets[name] = 8 + len(text) + header[name]["data_offsets"][0]
        file = self.opened[number] = open(self.folder / self.file_names[number], "wb")
        file.write(len(text).to_bytes(8, "little") + text)
        return file

    def _close(self, number: int) -> None:
        with self.opened.pop(number) as file:
            file.flush()
            os.fsync(file.fileno())


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, TensorRecord]:
    """Write tensors that are all there, in the order of their names; returns their manifest."""
    layout = {name: Layout(tensors[name].dtype, tuple(tensors[name].shape)) for name in sorted(tensors)}
    with ShardWriter(folder, layout) as writer:
        for name in layout:
            writer.write(name, tensors[name])
    return writer.manifest


def _cut(layout: Mapping[str, Layout], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, item in layout.items():
        if shards[-1] and filled + item.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += item.bytes
    return shards
