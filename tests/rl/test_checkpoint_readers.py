"""One converted checkpoint in the trainer, in transformers and in vLLM: main model and MTP module.

The engine runs in a process of its own, with the MTP module drafting. vLLM's block-FP8 products need a GPU or AMX, so
of the FP8 folder only the loading is compared: the bytes that vLLM's models hold afterwards.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_tiny
from transformers import DeepseekV3ForCausalLM

from policy.checkpoint import convert
from policy.model import load_policy
from policy.shards import stored_tensors

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5  # of log-probs, in FP32
PROMPTS = [list(range(20, 36)), list(range(100, 120)), [7, 3, 250, 9, 9, 41]]

ENGINE = """
import sys, tempfile, torch, vllm
from rl.engine import EngineActor
from pipeline.recipe import EngineConfig

wide, fp8, result = sys.argv[1:]
drafting = {"method": "mtp", "num_speculative_tokens": 1}
actor = EngineActor(wide, EngineConfig(max_sequences=32, draft=True).model_dump(), "float32", 64, 0)
prompts = torch.load(result)
drafts = []

def watch(worker):
    draft = worker.model_runner.drafter.model
    compute = draft.compute_logits
    def compute_logits(*args, **kwargs):
        drafts.append(compute(*args, **kwargs).clone())
        return drafts[-1]
    draft.compute_logits = compute_logits

main = actor.prompt_logprobs(prompts)
actor.llm.collective_rpc(watch)
found = []
for ids in prompts:
    drafts.clear()
    output = actor.llm.generate([{"prompt_token_ids": ids}], vllm.SamplingParams(temperature=0, max_tokens=1),
                                use_tqdm=False)[0]
    found.append((output.outputs[0].token_ids[0], drafts[0][0].float().log_softmax(-1)))

from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model

CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda cls, *_: (True, None))  # chosen, never run
config = EngineArgs(model=fp8, dtype="bfloat16", enforce_eager=True, max_model_len=64,
                    speculative_config=drafting).create_engine_config()
held = {}
with set_current_vllm_config(config):
    for model_config in (config.model_config, config.speculative_config.draft_model_config):
        model = initialize_model(vllm_config=config, model_config=model_config)
        get_model_loader(config.load_config).load_weights(model, model_config)
        held |= {name: parameter.data for name, parameter in model.named_parameters()}
torch.save({"main": main, "drafts": found, "held": held}, result)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """FP8 made of what the trainer saved, and FP32 and BF16 made of that."""
    root = tmp_path_factory.mktemp("readers")
    saved = save_tiny(root / "saved", hidden_size=256, layers=3, max_length=64)
    convert(saved, root / "fp8", "fp8")
    for to in ("float32", "bfloat16"):
        convert(root / "fp8", root / to, to, shard_bytes=2_000_000)
        assert len(list((root / to).glob("*.safetensors"))) > 1
    return root


@pytest.fixture(scope="module")
def engine(folders):
    result = folders / "result.pt"
    torch.save(PROMPTS, result)
    done = subprocess.run([sys.executable, "-c", ENGINE, folders / "float32", folders / "fp8", result], cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(result)


@pytest.fixture(scope="module")
def trainer(folders):
    return load_policy(folders / "float32").eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_transformers_holds_the_trainers_tensors_and_computes_its_log_probs(folders, dtype):
    """In BF16 a router that ties may choose otherwise, so there the median over positions is compared."""
    ours = load_policy(folders / dtype, dtype).eval()
    theirs = DeepseekV3ForCausalLM.from_pretrained(folders / dtype, dtype=dtype).eval()
    held = ours.state_dict()
    assert all(torch.equal(tensor, held[name]) for name, tensor in theirs.state_dict().items())
    differences = []
    for batch in (torch.tensor([ids]) for ids in PROMPTS):
        logprobs = [model(batch, use_cache=False).logits[0].float().log_softmax(-1) for model in (ours, theirs)]
        differences.append((logprobs[0] - logprobs[1]).abs().amax(-1))
    if dtype == "float32":
        assert torch.cat(differences).max() < TOLERANCE
    else:
        assert torch.cat(differences).median() < 0.05


@torch.no_grad()
def test_vllm_computes_the_trainers_log_probs(trainer, engine):
    for ids, theirs in zip(PROMPTS, engine["main"], strict=True):
        logprobs = trainer(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        ours = logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
        assert (ours - torch.tensor(theirs)).abs().max() < TOLERANCE


@torch.no_grad()
def test_vllm_drafts_with_the_trainers_mtp_distribution(trainer, engine):
    for ids, (token, theirs) in zip(PROMPTS, engine["drafts"], strict=True):
        batch = torch.tensor([[*ids, token]])
        positions = torch.arange(batch.shape[1])[None]
        hidden = trainer.model(batch, use_cache=False).last_hidden_state
        ours = trainer.lm_head(trainer.mtp_hidden_states(hidden, batch, positions))[0, -1].log_softmax(-1)
        assert trainer.lm_head(hidden[0, len(ids) - 1]).argmax() == token
        assert (ours - theirs).abs().max() < TOLERANCE
        assert ours.std() > 0.1  # not merely a flat distribution


def test_vllm_holds_the_bytes_and_scales_of_the_fp8_folder(folders, engine):
    """It joins gate and up projections and experts; the MTP block is called mtp_block there."""
    on_disk = {name: stored.read() for name, stored in stored_tensors(folders / "fp8").items()}
    held, compared = engine["held"], 0
    for name, tensor in held.items():
        name = name.replace(".mtp_block", "")
        if name.endswith(("attn.q_scale", "attn.k_scale", "attn.v_scale", "attn.prob_scale")):
            continue  # of an FP8 cache, which checkpoints do not hold
        kind = name.rpartition(".")[2]
        prefix = name.partition(".routed_experts.")[0]
        if ".gate_up_proj." in name:
            parts = [on_disk[name.replace("gate_up_proj", part)] for part in ("gate_proj", "up_proj")]
            expected = torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
        elif kind.startswith(("w13_", "w2_")):
            parts = ("gate_proj", "up_proj") if kind.startswith("w13_") else ("down_proj",)
            last = kind.partition("_")[2]
            expected = torch.stack([torch.cat([on_disk[f"{prefix}.{expert}.{part}.{last}"].view(torch.uint8)
                                               for part in parts]) for expert in range(8)]).view(tensor.dtype)
        else:
            expected = on_disk[name]
        if "embed_tokens" in name or name.endswith("head.weight"):
            tensor = tensor[:len(expected)]  # padded to a multiple of 64
        compared += 1
        assert torch.equal(tensor.float(), expected.float()), name
        assert tensor.dtype == expected.dtype or expected.dtype == torch.bfloat16, name
    assert compared > 60 and any(name.endswith("w13_weight_scale_inv") and "mtp_block" in name for name in held)
