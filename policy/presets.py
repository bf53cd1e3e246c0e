"""Architecture presets. `tiny_config` has every part of DeepSeek-V3 at a size two CPU cores can train.

DeepSeek-V3 (arXiv 2412.19437) section 2: multi-head latent attention, leading dense layer, biased sigmoid
group-limited routing with shared expert, multi-token prediction.
"""

from __future__ import annotations

from typing import Any

from transformers import DeepseekV3Config

from pipeline.recipe import EXPERT_GROUPS

# Keys vLLM and DeepSeek's own loader read and transformers' config class does not write by itself.
ROUTER_KEYS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


def tiny_config(*, hidden_size: int = 128, layers: int = 4, routed_experts: int = 16, vocab_size: int = 1024,
                max_length: int = 512, mtp_depth: int = 1, token_ids: dict[str, int] | None = None) -> DeepseekV3Config:
    """A DeepseekV3Config of 2.2M parameters at the defaults.

    Query and key heads are as wide as value heads, so that torch's fused CPU attention takes them.
    One dense layer, `layers - 1` MoE layers of `routed_experts` experts in 4 groups (2 kept, 2 experts per
    token) with 1 shared expert, MLA with 4 heads, `mtp_depth` MTP modules. `token_ids` gives bos/eos/pad ids.
    """
    extra: dict[str, Any] = dict(ROUTER_KEYS)
    return DeepseekV3Config(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=layers, first_k_dense_replace=1,
        intermediate_size=2 * hidden_size, moe_intermediate_size=hidden_size // 2,
        n_routed_experts=routed_experts, n_shared_experts=1, num_experts_per_tok=2, n_group=EXPERT_GROUPS, topk_group=2,
        norm_topk_prob=True, routed_scaling_factor=2.5,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=hidden_size // 2, kv_lora_rank=hidden_size // 2,
        qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=32,
        max_position_embeddings=max_length, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False, attention_bias=False,
        initializer_range=0.05, num_nextn_predict_layers=mtp_depth, use_cache=True, **(token_ids or {}), **extra)
