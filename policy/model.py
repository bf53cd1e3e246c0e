"""Load, extend and save the policy: transformers' DeepseekV3ForCausalLM with its MTP module kept.

transformers runs `layers[:num_hidden_layers]` and drops the multi-token-prediction weights on load. Here the
MTP modules (`policy/mtp.py`) are the layers from `num_hidden_layers` on in the same list, so that their tensors load,
train and save under the names of the released checkpoint (`model.layers.L.enorm`, `.hnorm`, `.eh_proj`,
`.shared_head.norm` and a block).
Embedding and head are shared with the main model (DeepSeek-V3 section 2.2); the copies the format asks for
are written on save.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.masking_utils import create_causal_mask

from pipeline.records import Checkpoint
from policy.kernels.experts import use_fast_experts
from policy.mtp import MTPLayer, mtp_depth
from policy.presets import ROUTER_KEYS
from policy.router import take_own_routers
from policy.shards import MANIFEST, manifest_digest, read_manifest, write_manifest, write_shards


class DeepseekV3WithMTP(DeepseekV3ForCausalLM):
    """The main model, plus `mtp_hidden_states` for training its MTP modules."""

    # the copies of embedding and head stored with a module are the main model's own tensors
    _keys_to_ignore_on_load_unexpected = [r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight"]
    # transformers looks for its experts decorator in the source of the module that defines the class
    _can_set_experts_implementation_cached_value = True

    def __init__(self, config: DeepseekV3Config):
        super().__init__(config)
        if mtp_depth(config):
            self.model.layers.extend(MTPLayer(config, config.num_hidden_layers + module)
                                     for module in range(mtp_depth(config)))
            self.post_init()
        take_own_routers(self)

    def mtp_hidden_states(self, hidden_states: torch.Tensor, input_ids: torch.Tensor, position_ids: torch.Tensor, *,
                          depth: int = 1, trunk_gradient: bool = True) -> torch.Tensor:
        """States of module `depth` = k that predict token t + k + 1, from those of module k - 1 at t and token t + k.

        hidden_states: [batch, tokens - k + 1, hidden], for k = 1 the main model's output after its last norm, then
        what this returned for the module before; input_ids and position_ids: [batch, tokens], positions restarting at
        each packed sample. Returns [batch, tokens - k, hidden]; pass it through `lm_head`. With `trunk_gradient`
        False the shared embedding gets no gradient.
        """
        layer = self.model.layers[self.config.num_hidden_layers + depth - 1]
        position_ids = position_ids[:, :-depth]
        embeds = self.model.embed_tokens(input_ids[:, depth:])
        # as engines draft: at a sample's first position the state stands alone
        embeds = embeds.masked_fill((position_ids == 0).unsqueeze(-1), 0.0)
        if not trunk_gradient:
            embeds = embeds.detach()
        joined = layer.eh_proj(torch.cat([layer.enorm(embeds), layer.hnorm(hidden_states[:, :-1])], dim=-1))
        mask = create_causal_mask(config=self.config, inputs_embeds=joined, attention_mask=None,
                                  past_key_values=None, position_ids=position_ids)
        rotary = self.model.rotary_emb(joined, position_ids)
        hidden = layer(joined, attention_mask=mask, position_ids=position_ids, position_embeddings=rotary)
        return layer.shared_head["norm"](hidden)


def new_policy(config: DeepseekV3Config, seed: int) -> PreTrainedModel:
    """A freshly initialised FP32 policy.

    The head starts as a copy of the embedding, so that attention which finds a token can also name it.
    """
    torch.manual_seed(seed)
    model = DeepseekV3WithMTP(config)
    model.lm_head.weight.data.copy_(model.model.embed_tokens.weight.data)
    return model


def load_policy(folder: Path | str, dtype: str = "float32") -> PreTrainedModel:
    """Load any Hugging Face causal LM; a DeepSeek-V3 keeps its MTP module.

    Raises FileNotFoundError when `folder` is a path that is not there.
    """
    if "/" in str(folder) and Path(folder).is_absolute() and not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    config = AutoConfig.from_pretrained(folder)
    cls = DeepseekV3WithMTP if config.model_type == "deepseek_v3" else AutoModelForCausalLM
    model = cls.from_pretrained(folder, dtype=getattr(torch, dtype))
    use_fast_experts(model)
    return model


def export_tensors(model: PreTrainedModel, state: dict[str, torch.Tensor] | None = None
                   ) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's tensors under checkpoint names, experts apart, balance bias included, MTP copies left out.

    What transformers holds fused (`experts.gate_up_proj`) is split as `save_pretrained` would. `state` is the whole
    state dict where the model's own processes hold parts of it.
    """
    state = {name: tensor.detach() for name, tensor in (model.state_dict() if state is None else state).items()}
    if getattr(model.config, "tie_word_embeddings", False):
        state.pop("lm_head.weight", None)
    for name, tensor in revert_weight_conversion(model, state).items():
        yield name, tensor.contiguous()


def mtp_copies(config: PreTrainedConfig) -> dict[str, str]:
    """Names of the embedding and head stored with each MTP module -> the main model's tensors that they copy."""
    if config.model_type != "deepseek_v3":
        return {}
    embedding = "model.embed_tokens.weight"
    head = embedding if config.tie_word_embeddings else "lm_head.weight"
    first = config.num_hidden_layers
    return {f"model.layers.{layer}.{copy}.weight": original
            for layer in range(first, first + config.num_nextn_predict_layers)
            for copy, original in (("embed_tokens", embedding), ("shared_head.head", head))}


def save_policy(model: PreTrainedModel, tokenizer, folder: Path, state: dict[str, torch.Tensor] | None = None
                ) -> Checkpoint:
    """Write a Hugging Face folder: weights, config with the routing keys, tokenizer, the manifest `tensors.json`.

    `state` is the whole state dict where the model's own processes hold parts of it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(export_tensors(model, state))
    tensors |= {copy: tensors[original] for copy, original in mtp_copies(model.config).items()}
    config = json.loads(model.config.to_json_string(use_diff=False))
    config["architectures"] = [_hub_architecture(model)]
    if model.config.model_type == "deepseek_v3":
        config |= ROUTER_KEYS
        config["num_local_experts"] = config["n_routed_experts"]
    manifest = write_shards(folder, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_manifest(folder / MANIFEST, manifest)  # last: who finds it finds a whole checkpoint
    return Checkpoint(path=str(folder), digest=manifest_digest(manifest))


def read_checkpoint(folder: Path) -> Checkpoint:
    """The identity of a checkpoint folder, from its manifest or, for a foreign folder, from its weight files."""
    return Checkpoint(path=str(folder), digest=manifest_digest(read_manifest(folder)))


def _hub_architecture(model: PreTrainedModel) -> str:
    return "DeepseekV3ForCausalLM" if isinstance(model, DeepseekV3WithMTP) else type(model).__name__
