"""Which tensors a DeepSeek-V3 checkpoint holds, and the forms in which a source may hold them.

Names are those of the released checkpoint. What must be there is what the trainer would export of the same config, so
model and converter cannot disagree.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import DeepseekV3Config

from pipeline.stage import StageError
from policy.fp8_pairs import SCALE
from policy.model import DeepseekV3WithMTP, export_tensors, mtp_copies
from policy.shards import Layout, StoredTensor, dtype_name

WIDE = (torch.float32, torch.bfloat16, torch.float16)


def expected_tensors(config: DeepseekV3Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor a checkpoint of `config` holds, scales left out, MTP copies included."""
    with torch.device("meta"):
        found = {name: tuple(tensor.shape) for name, tensor in export_tensors(DeepseekV3WithMTP(config))}
    return found | {copy: found[original] for copy, original in mtp_copies(config).items()}


def unfused(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Experts apart: `experts.gate_up_proj` [experts, 2 i, h] and `experts.down_proj` [experts, h, i] cut in place."""
    found: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        prefix, _, last = name.rpartition(".")
        if not prefix.endswith(".mlp.experts") or len(tensor.layout.shape) != 3:
            found[name] = tensor
            continue
        experts, rows, columns = tensor.layout.shape
        projections = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        part = Layout(tensor.layout.dtype, (rows // len(projections), columns))
        keys = [f"{prefix}.{expert}.{projection}.weight" for expert in range(experts) for projection in projections]
        for number, key in enumerate(keys):
            found[key] = StoredTensor(tensor.file, key, part, tensor.offset + number * part.bytes)
    return found


def check_complete(source: Path, stored: dict[str, StoredTensor], config: DeepseekV3Config) -> None:
    """Raises StageError where tensors are missing, unexpected, or of another shape or type than the config asks for."""
    expected = expected_tensors(config)
    there = {name: tensor for name, tensor in stored.items() if not name.endswith(SCALE)}
    if missing := [name for name in expected if name not in there]:
        first = config.num_hidden_layers
        mtp = tuple(f"model.layers.{layer}." for layer in range(first, first + config.num_nextn_predict_layers))
        remedy = "copy or download the shards that hold them"
        if all(name.startswith(mtp) for name in missing):
            remedy = ("they are the multi-token prediction module, which transformers drops when it saves: take them "
                      "from the checkpoint it was trained from, or set num_nextn_predict_layers to 0 in config.json")
        raise StageError(f"{source}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are); {remedy}")
    if extra := [name for name in there if name not in expected]:
        sizes = ", ".join(f"{key} {getattr(config, key)}" for key in
                          ("num_hidden_layers", "n_routed_experts", "num_nextn_predict_layers"))
        raise StageError(f"{there[extra[0]].file}: {extra[0]} belongs to no module of config.json ({len(extra)} such "
                         f"tensors; {sizes}); correct config.json, or remove what is not of this model")
    for name, tensor in there.items():
        if tensor.layout.shape != expected[name]:
            raise StageError(f"{tensor.file}: {name} is {tensor.layout.shape}, config.json makes it {expected[name]}; "
                             "give the config.json this checkpoint was saved with")
        if tensor.layout.dtype not in (*WIDE, torch.float8_e4m3fn):
            raise StageError(f"{tensor.file}: {name} is {dtype_name(tensor.layout.dtype)}; known are float32, "
                             "bfloat16, float16 and float8_e4m3fn with scales")
