import json
import math
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoConfig, DeepseekV3ForCausalLM

from pipeline.recipe import YarnConfig
from pipeline.stage import StageError
from policy.context import extend_context
from policy.model import load_policy, read_checkpoint
from policy.tokenizer import load_tokenizer

YARN = YarnConfig(factor=4)
SHORT = 64


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("short"), max_length=SHORT)


@pytest.fixture(scope="module")
def extended(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("extended")
    assert extend_context(short, YARN, folder) == 4 * SHORT
    return folder


def test_the_folder_says_how_long_its_context_is_and_has_the_same_weights(short, extended):
    config = json.loads((extended / "config.json").read_text())
    assert config["max_position_embeddings"] == load_tokenizer(extended).model_max_length == 4 * SHORT
    assert config["rope_parameters"] == {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0,
        "mscale_all_dim": 1.0, "original_max_position_embeddings": SHORT}
    assert read_checkpoint(extended).digest == read_checkpoint(short).digest
    assert (extended / "model.safetensors").read_bytes() == (short / "model.safetensors").read_bytes()
    assert json.loads((short / "config.json").read_text())["rope_parameters"]["rope_type"] == "default"


def test_the_figures_of_the_recipe_are_those_of_the_released_checkpoint():
    released = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0}  # its rope_scaling, over 4096 tokens
    assert YarnConfig().model_dump() == released


def yarn_frequencies(dim, base, factor, original, fast, slow):
    """YaRN's equations 17 to 23 (arXiv 2309.00071) with the bounds rounded outwards, as DeepSeek's code has them."""

    def dimension(turns):
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), dim - 1)
    result = []
    for index in range(dim // 2):
        frequency = base ** (-2 * index / dim)
        slowed = min(max((index - low) / ((high - low) or 0.001), 0), 1)
        result.append(frequency * (1 - slowed) + frequency / factor * slowed)
    return torch.tensor(result)


@pytest.mark.parametrize("original, dim", [(SHORT, 16), (4096, 64)], ids=["tiny", "released"])
def test_frequencies_and_softmax_scale_are_those_of_the_formula_in_every_layer(extended, original, dim):
    config = AutoConfig.from_pretrained(extended)
    config.update({"qk_rope_head_dim": dim, "head_dim": dim, "qk_head_dim": 16 + dim})
    config.rope_parameters = config.rope_parameters | {"original_max_position_embeddings": original}
    model = type(load_policy(extended))(config)
    expected = yarn_frequencies(dim, 10000.0, 4, original, 32, 1)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected, rtol=1e-6, atol=0)
    assert model.model.rotary_emb.attention_scaling == 1.0  # cosine and sine stay as they are
    mscale = 0.1 * math.log(4) + 1
    scales = [layer.self_attn.scaling for layer in model.model.layers]  # the MTP module's too
    assert scales == [pytest.approx((16 + dim) ** -0.5 * mscale ** 2)] * 4


def test_only_the_rotary_part_of_the_keys_changes(short, extended):
    before, after = load_policy(short).eval(), load_policy(extended).eval()
    ids = torch.randint(1, 300, (1, SHORT), generator=torch.Generator().manual_seed(0))
    keys = []
    for model in (before, after):
        attention = model.model.layers[0].self_attn
        expand, found = attention.expand_kv, []
        attention.expand_kv = lambda *args, expand=expand, found=found: found.append(expand(*args)) or found[-1]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        keys.append(found[0][0])
    nope = before.config.qk_nope_head_dim
    assert torch.equal(keys[0][..., :nope], keys[1][..., :nope])
    assert not torch.allclose(keys[0][..., nope:], keys[1][..., nope:], atol=1e-3)


def test_transformers_own_class_loads_it_and_computes_the_same_beyond_the_original_length(extended):
    ids = torch.randint(1, 300, (1, 4 * SHORT), generator=torch.Generator().manual_seed(0))
    ours, theirs = load_policy(extended).eval(), DeepseekV3ForCausalLM.from_pretrained(extended, dtype="float32").eval()
    ours.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        assert torch.equal(ours(ids, use_cache=False).logits, theirs(ids, use_cache=False).logits)


def test_a_context_that_was_extended_already_is_a_clear_error(extended, tmp_path):
    with pytest.raises(StageError, match="extended already \\(yarn, factor 4.0\\); leave the section out"):
        extend_context(Path(extended), YARN, tmp_path / "again")
