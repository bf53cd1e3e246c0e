import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, tiny_policy, tiny_tokenizer
from transformers import DeepseekV3ForCausalLM

from policy.model import export_tensors, load_policy, read_checkpoint, save_policy

IDS = torch.arange(40, 72).view(2, 16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("checkpoint"))


def test_the_mtp_module_lies_on_disk_under_the_names_of_the_released_checkpoint(folder):
    tensors = load_file(folder / "model.safetensors")
    mtp = {name.removeprefix("model.layers.3.") for name in tensors if name.startswith("model.layers.3.")}
    assert {"enorm.weight", "hnorm.weight", "eh_proj.weight", "embed_tokens.weight", "shared_head.norm.weight",
            "shared_head.head.weight", "mlp.gate.e_score_correction_bias", "self_attn.kv_b_proj.weight",
            "mlp.experts.7.down_proj.weight"} <= mtp
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])
    assert tensors["model.layers.3.eh_proj.weight"].shape == (32, 64)


def test_the_config_on_disk_has_the_keys_engines_read(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["topk_method"] == "noaux_tc" and config["scoring_func"] == "sigmoid"
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (3, 1)
    assert config["num_local_experts"] == config["n_routed_experts"] == 8


def test_a_policy_comes_back_bit_for_bit_with_its_biases_and_mtp(folder):
    saved, loaded = tiny_policy().state_dict(), load_policy(folder).state_dict()
    assert saved.keys() == loaded.keys()
    assert [name for name in saved if not torch.equal(saved[name], loaded[name])] == []
    biases = [tensor for name, tensor in loaded.items() if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3 and all(bias.abs().min() > 0 for bias in biases)


def test_saving_what_was_loaded_gives_the_same_digest_and_files(folder, tmp_path):
    again = save_policy(load_policy(folder), tiny_tokenizer(), tmp_path / "again")
    assert again.digest == read_checkpoint(folder).digest == read_checkpoint(tmp_path / "again").digest
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_transformers_own_class_computes_the_same_logits(folder):
    ours, theirs = load_policy(folder).eval(), DeepseekV3ForCausalLM.from_pretrained(folder, dtype="float32").eval()
    ours.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        assert torch.equal(ours(IDS, use_cache=False).logits, theirs(IDS, use_cache=False).logits)


def test_exported_tensors_have_experts_apart_and_no_copies(folder):
    exported = dict(export_tensors(load_policy(folder)))
    on_disk = load_file(folder / "model.safetensors")
    copies = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    assert exported.keys() == on_disk.keys() - copies
    assert all(torch.equal(exported[name], on_disk[name]) for name in exported)


def test_the_digest_changes_with_any_tensor(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    digests = set()
    for changed in [None, *tensors]:
        values = {name: tensor + (name == changed) for name, tensor in tensors.items()}
        save_file(values, tmp_path / "model.safetensors")
        digests.add(read_checkpoint(tmp_path).digest)
    assert len(digests) == len(tensors) + 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert read_checkpoint(tmp_path).digest == read_checkpoint(folder).digest  # listed or computed: the same


def test_a_folder_without_weights_is_a_clear_error(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="no \\*.safetensors"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        load_policy(tmp_path / "missing")


def test_mtp_hidden_states_depend_on_the_next_token_and_not_on_the_one_after(folder):
    model = load_policy(folder).eval()
    positions = torch.arange(16).expand(2, -1)

    def mtp(ids, hidden):
        with torch.no_grad():
            return model.mtp_hidden_states(hidden, ids, positions)

    with torch.no_grad():
        hidden = model.model(IDS, use_cache=False).last_hidden_state
    before = mtp(IDS, hidden)
    assert before.shape == (2, 15, 32)
    changed = IDS.clone()
    changed[:, 8] += 1
    after = mtp(changed, hidden)
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-5, rtol=1e-5)
    assert (before[:, 7] - after[:, 7]).abs().amax(-1).min() > 1e-2  # position 7 reads the embedding of token 8


def test_a_bfloat16_policy_comes_back_bit_for_bit_with_its_bias_in_float32(folder, tmp_path):
    model = load_policy(folder, "bfloat16")
    save_policy(model, tiny_tokenizer(), tmp_path)
    loaded = load_policy(tmp_path, "bfloat16").state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype and torch.equal(tensor, loaded[name]), name
        assert tensor.dtype == (torch.float32 if name.endswith("correction_bias") else torch.bfloat16)


@pytest.mark.parametrize("depth", [0, 2])
def test_other_depths_of_mtp_come_back_bit_for_bit_and_transformers_reads_the_rest(depth, tmp_path):
    model = tiny_policy(mtp_depth=depth).eval()
    save_policy(model, tiny_tokenizer(), tmp_path)
    loaded = load_policy(tmp_path).eval()
    assert [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, loaded.state_dict()[name])
            ] == []
    on_disk = set(load_file(tmp_path / "model.safetensors"))
    modules = {name.split(".")[2] for name in on_disk if name.endswith("shared_head.head.weight")}
    assert modules == {str(3 + module) for module in range(depth)}
    assert json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"] == depth
    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    loaded.set_experts_implementation("grouped_mm")
    with torch.no_grad():
        assert torch.equal(loaded(IDS, use_cache=False).logits, theirs(IDS, use_cache=False).logits)
