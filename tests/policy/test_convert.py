"""Conversion of checkpoints, on a random tiny policy whose widths (160, 80, 320, 576) no block of 128 divides."""

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer
from posttrain_command import environment
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import scatter_biases, tiny_tokenizer
from transformers import DeepseekV3Config

from pipeline.stage import StageError
from policy.checkpoint import convert
from policy.fp8_pairs import QUANTISED, SCALE
from policy.model import load_policy, new_policy, read_checkpoint, save_policy
from policy.presets import tiny_config
from policy.released_layout import expected_tensors
from policy.shards import INDEX, Layout, ShardWriter, TensorRecord, read_manifest, stored_tensors
from workflows.commands import convert as convert_command

FP8, BF16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"
EXPERT = "model.layers.2.mlp.experts.3.down_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def ragged_policy(layers=3):
    config = tiny_config(hidden_size=160, layers=layers, routed_experts=8, vocab_size=300, max_length=128)
    config.kv_lora_rank, config.qk_rope_head_dim = 512, 64  # as released: 576 rows in kv_a_proj_with_mqa
    config.head_dim, config.qk_head_dim = 64, 16 + 64
    model = new_policy(config, 0)
    scatter_biases(model, 0)
    return model


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """What the trainer saves, in FP32."""
    folder = tmp_path_factory.mktemp("checkpoints") / "wide"
    save_policy(ragged_policy(), tiny_tokenizer(), folder)
    return folder


@pytest.fixture(scope="module")
def foreign(wide):
    """An FP8 checkpoint of somebody else's quantiser: any bytes, any scales, in shards apart from their weights."""
    folder = wide.parent / "foreign"
    convert(wide, folder, "fp8")
    tensors = tensors_of(folder)
    generator = torch.Generator().manual_seed(0)
    for number, name in enumerate(sorted(name for name in tensors if name + SCALE in tensors)):
        tensors[name] = torch.randint(0, 256, tensors[name].shape, generator=generator, dtype=torch.uint8).view(FP8)
        if number % 8:  # codes 0x7f and 0xff are NaN
            tensors[name] = torch.where(tensors[name].float().isnan(), 0.0, tensors[name].float()).to(FP8)
        # 0: zero, 1: products below FP32's normal numbers, 2: powers of two, 3: negative, the rest as they come
        scales = torch.rand(tensors[name + SCALE].shape, generator=generator) + 1e-3
        kinds = (scales * 0, scales * 1e-38, 2.0 ** -scales.mul(9).round(), -scales, scales * 1e-3, scales, scales)
        tensors[name + SCALE] = kinds[number % 7].contiguous()
    tensors["model.norm.weight"] = torch.linspace(0.5, 1.5, 160, dtype=FP32)
    (folder / "model.safetensors").unlink()
    (folder / "tensors.json").unlink()
    shards = {"model-1.safetensors": [name for name in tensors if name.endswith(SCALE)],
              "model-2.safetensors": [name for name in tensors if not name.endswith(SCALE)][::2],
              "model-3.safetensors": [name for name in tensors if not name.endswith(SCALE)][1::2]}
    for file, names in shards.items():
        save_file({name: tensors[name].clone() for name in names}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"weight_map": {name: file for file, names in shards.items()
                                                           for name in names}}))
    change_config(folder, quantization_config={"fmt": "e4m3", "quant_method": "fp8", "activation_scheme": "dynamic",
                                               "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]})
    return folder


def tensors_of(folder):
    return {name: stored.read().clone() for name, stored in stored_tensors(folder).items()}


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def change_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


def bytes_of(tensor):
    return tensor.dtype, tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes()


def converted(source, target, *steps):
    """Convert step by step; the last folder."""
    for number, to in enumerate(steps):
        following = target / f"{number}-{to}"
        convert(source, following, to)
        source = following
    return source


# what FP8 gives back


@pytest.mark.parametrize("route", [["fp8"], ["float32", "fp8"], ["bfloat16", "fp8"], ["float32", "bfloat16", "fp8"],
                                   ["bfloat16", "float32", "fp8"], ["float32", "float32", "fp8", "float32", "fp8"]])
def test_fp8_of_any_quantiser_comes_back_byte_for_byte(foreign, tmp_path, route):
    before, after = tensors_of(foreign), tensors_of(converted(foreign, tmp_path, *route))
    if "bfloat16" in route:  # rounded there like everything that is not FP8
        before["model.norm.weight"] = before["model.norm.weight"].bfloat16().float()
    assert before.keys() == after.keys()
    assert [name for name in before if bytes_of(before[name]) != bytes_of(after[name])] == []
    assert config_of(foreign) == config_of(tmp_path / f"{len(route) - 1}-fp8")


def test_only_values_that_cannot_be_found_again_are_kept_beside_the_wide_weights(foreign, tmp_path):
    kept = {name for name in stored_tensors(converted(foreign, tmp_path, "float32") / "fp8") if SCALE not in name}
    tensors = tensors_of(foreign)
    pairs = sorted(name for name in tensors if name + SCALE in tensors)
    hard = {name for number, name in enumerate(pairs) if number % 7 in (0, 1) or number % 8 == 0}
    assert kept and kept <= hard


def test_trained_weights_are_quantised_anew_and_the_others_keep_their_bytes(foreign, tmp_path):
    middle = converted(foreign, tmp_path, "float32")
    tensors = tensors_of(middle)
    tensors[EXPERT][0, 0] += 1e-3
    save_file(tensors, middle / "model.safetensors", metadata={"format": "pt"})
    (middle / "tensors.json").unlink()
    done = convert(middle, tmp_path / "again", "fp8")
    before, after = tensors_of(foreign), tensors_of(tmp_path / "again")
    changed = {name for name in before if bytes_of(before[name]) != bytes_of(after[name])}
    assert done.made == 1 and EXPERT + SCALE in changed and changed <= {EXPERT, EXPERT + SCALE}


def test_powers_of_two_stay_the_rule_where_the_checkpoint_says_so(wide, tmp_path):
    middle = converted(wide, tmp_path, "fp8", "float32")
    record = json.loads((middle / "fp8/record.json").read_text())
    record["quantization_config"]["scale_fmt"] = "ue8m0"
    (middle / "fp8/record.json").write_text(json.dumps(record))
    for file in (middle / "fp8").glob("*.safetensors"):
        save_file({name: tensor * 3 for name, tensor in load_file(file).items()}, file)  # no pair fits any more
    assert convert(middle, tmp_path / "again", "fp8").kept == 0
    scales = [tensor for name, tensor in tensors_of(tmp_path / "again").items() if name.endswith(SCALE)]
    assert scales and all(bool((scale.log2() % 1 == 0).all()) for scale in scales)


# what the numbers are


def test_our_quantiser_is_the_spec_block_by_block(wide, tmp_path):
    """scale = max(|block|, 1e-4) / 448, q = x / scale; the last blocks hold what there is."""
    before, after = tensors_of(wide), tensors_of(converted(wide, tmp_path, "fp8"))
    assert before[KV_A].shape == (576, 160) and after[KV_A + SCALE].shape == (5, 2)
    pairs = [name for name in after if name + SCALE in after]
    assert len(pairs) == 4 * 5 + 3 + 3 * 3 * 9  # attention, the dense layer, 8 experts and the shared one a layer
    for name in pairs:
        weight, values, scales = before[name], after[name], after[name + SCALE]
        assert scales.shape == (math.ceil(weight.shape[0] / 128), math.ceil(weight.shape[1] / 128))
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                block = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
                scale = torch.maximum(weight[block].abs().max(), torch.tensor(1e-4)) / 448
                assert torch.equal(scales[row, column], scale)
                assert bytes_of((weight[block] / scale).to(FP8)) == bytes_of(values[block].contiguous())


def test_embedding_head_norms_and_router_stay_wide_and_the_bias_is_float32(wide, tmp_path):
    tensors = tensors_of(converted(wide, tmp_path, "fp8"))
    wide_names = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype != FP8 and SCALE not in name}
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.gate.weight",
                 "model.layers.3.eh_proj.weight", "model.layers.3.shared_head.head.weight", "model.norm.weight"):
        assert wide_names.pop(name) == BF16
    assert {dtype for name, dtype in wide_names.items() if name.endswith("correction_bias")} == {FP32}
    assert all("norm" in name or "gate." in name or "embed_tokens" in name for name in wide_names)
    bfloat16 = tensors_of(converted(wide, tmp_path / "b", "bfloat16"))
    assert {name for name, tensor in bfloat16.items() if tensor.dtype != BF16} == {
        name for name in bfloat16 if name.endswith("correction_bias")}
    assert bytes_of(bfloat16[BIAS]) == bytes_of(tensors_of(wide)[BIAS])


def test_fp8_widens_to_the_rounded_product(wide, tmp_path):
    fp8 = converted(wide, tmp_path, "fp8")
    tensors = tensors_of(fp8)
    scales = tensors[KV_A + SCALE].double().repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :160]
    product = tensors[KV_A].double() * scales
    float32, bfloat16 = (tensors_of(converted(fp8, tmp_path / to, to))[KV_A] for to in ("float32", "bfloat16"))
    assert torch.equal(float32, product.float()) and torch.equal(bfloat16, product.float().bfloat16())
    assert ((float32 - product).abs() <= 2.0**-24 * product.abs()).all()
    assert ((bfloat16 - product).abs() <= 2.0**-8 * product.abs()).all()


def test_the_layout_of_the_released_model_has_its_tensors_and_its_size():
    """163 files of 688,586,727,753 bytes with 91,991 tensors; their headers take about 130 bytes a tensor."""
    from policy.checkpoint import _layouts
    from policy.shards import StoredTensor

    config = DeepseekV3Config(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        first_k_dense_replace=3, num_nextn_predict_layers=1, num_attention_heads=128, num_key_value_heads=128,
        n_shared_experts=1, n_routed_experts=256, kv_lora_rank=512, q_lora_rank=1536, qk_rope_head_dim=64,
        v_head_dim=128, qk_nope_head_dim=128)
    stored = {name: StoredTensor(Path(), name, Layout(BF16, shape), 0)
              for name, shape in expected_tensors(config).items()}
    layout, _ = _layouts(stored, None, "fp8")
    assert len(layout) == 91_991
    assert 688_586_727_753 - sum(item.bytes for item in layout.values()) == pytest.approx(130 * 91_991, rel=0.02)
    assert layout["model.layers.61.self_attn.kv_a_proj_with_mqa.weight" + SCALE].shape == (5, 56)


# forms of a source


@pytest.mark.parametrize("layers", [1, 2, 6])
def test_any_number_of_layers_comes_back(tmp_path, layers):
    save_policy(ragged_policy(layers), tiny_tokenizer(), tmp_path / "wide")
    fp8 = converted(tmp_path / "wide", tmp_path, "fp8")
    again = converted(fp8, tmp_path / "back", "float32", "fp8")
    assert read_checkpoint(again).digest == read_checkpoint(fp8).digest
    assert f"model.layers.{layers}.eh_proj.weight" in tensors_of(fp8)


def test_what_transformers_saves_gains_the_copies_of_the_mtp_module(wide, tmp_path):
    load_policy(wide).save_pretrained(tmp_path / "saved")
    assert len(tensors_of(tmp_path / "saved")) == len(tensors_of(wide)) - 2
    assert convert(tmp_path / "saved", tmp_path / "ours", "float32").digest == read_checkpoint(wide).digest
    assert config_of(tmp_path / "ours")["architectures"] == ["DeepseekV3ForCausalLM"]


def test_fused_experts_of_a_state_dict_are_taken_apart(wide, tmp_path):
    state = {name: tensor.clone() for name, tensor in load_policy(wide).state_dict().items()}
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
    save_file(state, tmp_path / "state.safetensors")
    shutil.copy(wide / "config.json", tmp_path)
    assert convert(tmp_path, tmp_path / "ours", "float32").digest == read_checkpoint(wide).digest


def test_the_tokenizer_and_other_files_come_along(wide, tmp_path):
    source = shutil.copytree(wide, tmp_path / "source")
    (source / "LICENSE").write_text("MIT")
    target = converted(source, tmp_path, "bfloat16")
    for file in ("LICENSE", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (target / file).read_bytes() == (source / file).read_bytes()
    assert config_of(target)["dtype"] == "bfloat16" and "quantization_config" not in config_of(target)


# what is written


def test_shards_are_bounded_and_listed_and_any_reader_takes_them(wide, tmp_path):
    convert(wide, tmp_path / "fp8", "fp8", shard_bytes=400_000)
    files = sorted((tmp_path / "fp8").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{n:05}-of-{len(files):05}.safetensors"
                                             for n in range(1, len(files) + 1)] and len(files) > 4
    index = json.loads((tmp_path / "fp8" / INDEX).read_text())
    found = {}
    for file in files:
        tensors = load_file(file)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 400_000
        assert {name for name, held in index["weight_map"].items() if held == file.name} == tensors.keys()
        found |= tensors
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    whole = tensors_of(converted(wide, tmp_path / "whole", "fp8"))
    assert {name: bytes_of(tensor) for name, tensor in found.items()} == {
        name: bytes_of(tensor) for name, tensor in whole.items()}


def test_manifests_of_both_sides_are_true(foreign, tmp_path):
    target = converted(foreign, tmp_path, "bfloat16")
    origin = json.loads((target / "converted_from.json").read_text())
    assert origin["path"] == str(foreign) and origin["digest"] == read_checkpoint(foreign).digest
    assert {name: TensorRecord(**record | {"shape": tuple(record["shape"])}) for name, record in
            origin["tensors"].items()} == {name: TensorRecord.of(t) for name, t in tensors_of(foreign).items()}
    listed = read_manifest(target)
    assert listed == {name: TensorRecord.of(tensor) for name, tensor in tensors_of(target).items()}
    assert listed[KV_A].dtype == "bfloat16" and listed[KV_A].shape == (576, 160)


def test_a_writer_refuses_what_the_layout_does_not_say(tmp_path):
    layout = {"a": Layout(FP32, (2, 3)), "b": Layout(BF16, (4,))}
    with pytest.raises(ValueError, match="b: was never written"), ShardWriter(tmp_path, layout) as writer:
        with pytest.raises(ValueError, match="a: torch.float32 \\(3, 2\\) where"):
            writer.write("a", torch.zeros(3, 2))
        writer.write("a", torch.zeros(2, 3))
        with pytest.raises(ValueError, match="to be written once"):
            writer.write("a", torch.zeros(2, 3))


def test_tensors_of_any_size_lie_where_a_reader_can_map_them(tmp_path):
    """Readers map a file, and want each tensor at a multiple of its item size."""
    tensors = {"a": torch.ones(3).to(FP8), "b": torch.arange(2.0), "c": torch.ones(1, dtype=BF16), "d": torch.ones(1)}
    with ShardWriter(tmp_path, {name: Layout(t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as writer:
        for name in reversed(tensors):
            writer.write(name, tensors[name])
    with safe_open(tmp_path / "model.safetensors", framework="pt") as opened:
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert bytes_of(found) == bytes_of(tensor) and found.data_ptr() % found.itemsize == 0


# what is refused


def drop(name):
    return lambda tensors: tensors.pop(name)


def replace(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize("change, message", [
    (drop(EXPERT), f"{EXPERT} is missing \\(1 of 135 tensors are\\); copy or download the shards that hold them"),
    (drop("model.layers.3.eh_proj.weight"), "eh_proj.weight is missing .* set num_nextn_predict_layers to 0"),
    (replace("model.layers.7.input_layernorm.weight", torch.ones(160)),
     "model.layers.7.input_layernorm.weight belongs to no module of config.json .*num_hidden_layers 3.*; correct"),
    (replace(EXPERT, torch.ones(80, 160)), f"{EXPERT} is \\(80, 160\\), config.json makes it \\(160, 80\\)"),
    (replace(EXPERT, torch.ones(160, 80).to(FP8)), f"{EXPERT} is float8_e4m3fn without its scales {EXPERT}_scale_inv"),
    (replace(EXPERT + SCALE, torch.ones(2, 1)), f"{EXPERT}_scale_inv scales {EXPERT}, which is float32; give the"),
    (replace("x.weight" + SCALE, torch.ones(2, 1)), "x.weight_scale_inv scales x.weight, which is missing"),
    (replace(BIAS, torch.ones(8, dtype=torch.int64)), f"{BIAS} is int64; known are float32, bfloat16"),
])
def test_missing_extra_and_misfit_tensors_are_named_with_the_remedy(wide, tmp_path, change, message):
    tensors = tensors_of(wide)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(wide / "config.json", tmp_path)
    with pytest.raises(StageError, match=message):
        convert(tmp_path, tmp_path / "target", "bfloat16")
    assert not (tmp_path / "target").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("scales", [torch.ones(4, 2), torch.ones(5, 2, dtype=BF16)])
def test_scales_of_another_grid_or_type_are_refused(foreign, tmp_path, scales):
    tensors = tensors_of(foreign) | {KV_A + SCALE: scales}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(foreign / "config.json", tmp_path)
    with pytest.raises(StageError, match=f"{KV_A}_scale_inv must be float32 \\(5, 2\\), one for each 128x128 block"):
        convert(tmp_path, tmp_path / "target", "bfloat16")


def test_other_blocks_and_other_models_are_refused(foreign, tmp_path):
    source = shutil.copytree(foreign, tmp_path / "source")
    change_config(source, quantization_config={"weight_block_size": [64, 64]})
    with pytest.raises(StageError, match=r"weight_block_size must be \[128, 128\] \(got \[64, 64\]\)"):
        convert(source, tmp_path / "target", "float32")
    change_config(source, model_type="qwen2")
    with pytest.raises(StageError, match="model_type must be deepseek_v3 \\(got qwen2\\)"):
        convert(source, tmp_path / "target", "float32")
    (source / "config.json").unlink()
    with pytest.raises(StageError, match="no config.json; give a Hugging Face model folder"):
        convert(source, tmp_path / "target", "float32")


def test_shards_that_are_cut_short_missing_or_not_those_of_the_index_are_named(foreign, tmp_path):
    source = shutil.copytree(foreign, tmp_path / "source")
    shard = source / "model-2.safetensors"
    whole = shard.read_bytes()
    for size in (len(whole) - 1, 5):
        shard.write_bytes(whole[:size])
        with pytest.raises(StageError, match="model-2.safetensors: .*cut short or damaged; copy or download it again"):
            convert(source, tmp_path / "target", "float32")
    shard.unlink()
    with pytest.raises(StageError, match="model-2.safetensors: missing, and model.safetensors.index.json says it "
                                         "holds .*; copy or download this shard"):
        convert(source, tmp_path / "target", "float32")
    save_file({"a": torch.ones(1)}, shard)
    with pytest.raises(StageError, match="index.json says it holds .*, and it does not; copy or download"):
        convert(source, tmp_path / "target", "float32")
    shard.write_bytes(whole)
    index = json.loads((source / INDEX).read_text())
    del index["weight_map"][KV_A]
    (source / INDEX).write_text(json.dumps(index))
    with pytest.raises(StageError, match=f"holds {KV_A}, which model.safetensors.index.json does not name"):
        convert(source, tmp_path / "target", "float32")
    (source / INDEX).unlink()
    shutil.copy(shard, source / "model-4.safetensors")
    with pytest.raises(StageError, match="in model-2.safetensors and in model-4.safetensors; remove the file"):
        convert(source, tmp_path / "target", "float32")


def test_a_flipped_bit_is_found_by_the_manifest(wide, tmp_path):
    source = shutil.copytree(wide, tmp_path / "source")
    with open(source / "model.safetensors", "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(StageError, match="is not what tensors.json lists; it is damaged"):
        convert(source, tmp_path / "target", "float32")
    assert not (tmp_path / "target").exists()


def test_a_target_that_exists_or_is_being_written_is_left_alone(wide, tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(StageError, match="target: already exists; remove it or name another"):
        convert(wide, tmp_path / "target", "float32")
    (tmp_path / ".other.partial").mkdir()
    (tmp_path / ".other.partial/model.safetensors").write_text("half")
    holder = os.open(tmp_path / ".other.partial", os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    with pytest.raises(StageError, match="other: another conversion is writing it"):
        convert(wide, tmp_path / "other", "float32")
    os.close(holder)
    convert(wide, tmp_path / "other", "float32")
    assert read_checkpoint(tmp_path / "other") and not (tmp_path / ".other.partial").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A 4 MiB file system of its own."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs needs root and CAP_SYS_ADMIN: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_full_disk_is_told_before_and_while_writing_and_nothing_half_stays(wide, tiny_disk, tmp_path_factory):
    with pytest.raises(StageError, match="the disk is full: .*target needs .* MiB and .* MiB were left; nothing"):
        convert(wide, tiny_disk / "target", "float32")
    source = shutil.copytree(wide, tmp_path_factory.mktemp("large") / "source")
    (source / "notes.txt").write_bytes(b"x" * (4 << 20))  # not weights, so found out only while it is copied
    with pytest.raises(StageError, match="the disk is full"):
        convert(source, tiny_disk / "target", "fp8")
    assert list(tiny_disk.iterdir()) == []
    convert(wide, tiny_disk / "target", "fp8")


# a larger one, in processes of its own


@pytest.fixture(scope="module")
def large(wide):
    """150 MB of FP8 in shards of 20 MB; no tensor has more than 0.3 MB."""
    folder = wide.parent / "large"
    config = tiny_config(hidden_size=512, layers=3, routed_experts=64, vocab_size=300, max_length=128)
    config.moe_intermediate_size = 512
    layout = {}
    for name, shape in expected_tensors(config).items():
        layout[name] = Layout(FP8 if QUANTISED.search(name) else BF16, shape)
        if layout[name].dtype == FP8:
            layout[name + SCALE] = Layout(FP32, tuple(math.ceil(size / 128) for size in shape))
    generator = torch.Generator().manual_seed(0)
    with ShardWriter(folder, layout, 20_000_000) as writer:
        for name, item in layout.items():
            values = torch.randint(0, 126, (item.bytes,), generator=generator, dtype=torch.uint8)
            scaled = name.endswith(SCALE)
            writer.write(name, torch.ones(item.shape) if scaled else values.view(item.dtype).view(item.shape))
    config.save_pretrained(folder)
    return folder


SCRIPT = """
import re, sys
from pathlib import Path
from policy.checkpoint import convert

def status(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

small, large, target = map(Path, sys.argv[1:])
convert(small, target / "small", "fp8")  # whatever is loaded on first use
Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
before = status("VmRSS")
convert(large, target / "large", "bfloat16", 40_000_000)
print(status("VmHWM") - before, flush=True)
convert(large, target / "killed", "bfloat16", 20_000_000)
"""


@pytest.fixture(scope="module")
def converter(wide, large, tmp_path_factory):
    """The folder where a process converted the large checkpoint, and was killed the second time; MiB it took."""
    root = tmp_path_factory.mktemp("process")
    running = subprocess.Popen([sys.executable, "-c", SCRIPT, wide, large, root], env=environment(), text=True,
                               stdout=subprocess.PIPE)
    grown = float(running.stdout.readline())
    while len(list(root.glob(".killed.partial/*.safetensors"))) < 4:
        assert running.poll() is None
        time.sleep(0.01)
    running.kill()
    running.communicate()
    return root, grown


def test_memory_holds_a_few_tensors_and_not_a_model(converter):
    root, grown = converter
    assert len(list((root / "large").glob("*.safetensors"))) > 5
    assert grown < 32  # MiB, for 150 MB read and 300 MB written; about 18, where one shard of 20 MB would add 19 more


def test_a_kill_leaves_nothing_at_the_target_and_the_same_command_works(converter, large, capsys):
    root, _ = converter
    assert not (root / "killed").exists() and list((root / ".killed.partial").glob("*.safetensors"))
    convert_command(large, root / "killed", "bfloat16")
    assert "kept byte for byte, 0 quantised" in capsys.readouterr().out
    assert sorted(path.name for path in root.iterdir()) == ["killed", "large", "small"]
    assert read_checkpoint(root / "killed").digest == read_checkpoint(root / "large").digest


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    with pytest.raises(typer.Exit) as ended:
        convert_command(tmp_path, tmp_path / "target", "fp8")
    assert ended.value.exit_code == 1
    assert capsys.readouterr().err == f"{tmp_path}: no config.json; give a Hugging Face model folder\n"
