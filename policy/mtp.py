"""Multi-token prediction: D modules behind the main model, each predicting one token further ahead.

DeepSeek-V3 (arXiv 2412.19437) section 2.2. Module k joins the states of module k - 1 at token t with the embedding of
token t + k and predicts token t + k + 1; the complete causal chain is kept at each depth. Embedding and head are the
main model's own. The first module also drafts a token for speculative decoding (section 5.4.3).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import DeepseekV3Config, PreTrainedModel
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm


class MTPLayer(DeepseekV3DecoderLayer):
    """One module: RMSNorm(Emb(t + k)) joined with RMSNorm(h) -> linear 2d -> d -> one block.

    The order of the two halves is that of the released weights (embedding first).
    """

    def __init__(self, config: DeepseekV3Config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.enorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.shared_head = nn.ModuleDict({"norm": DeepseekV3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)})


@dataclass(frozen=True)
class Prediction:
    """What module `depth` made of the labelled tokens: [batch, tokens - depth - 1] each.

    losses: cross-entropy, 0 where `labelled` is False; correct: whether the label was the likeliest token.
    """

    depth: int
    losses: torch.Tensor
    labelled: torch.Tensor
    correct: torch.Tensor

    @property
    def metric(self) -> str:
        """Under which the curve has the accuracy."""
        return "mtp_accuracy" if self.depth == 1 else f"mtp_accuracy_{self.depth}"

    def accuracy(self) -> float:
        return float(self.correct.sum() / self.labelled.sum().clamp(min=1))


def mtp_depth(config: DeepseekV3Config) -> int:
    """The number of MTP modules; 0 for models of another kind."""
    return getattr(config, "num_nextn_predict_layers", 0) or 0


def is_mtp(config: DeepseekV3Config, name: str) -> bool:
    """Whether a tensor belongs to an MTP module, by its name in memory or in a checkpoint."""
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    return bool(mtp_depth(config) and layer) and int(layer[1]) >= config.num_hidden_layers


def predictions(model: PreTrainedModel, hidden_states: torch.Tensor, input_ids: torch.Tensor,
                position_ids: torch.Tensor, labels: torch.Tensor, trunk_gradient: bool) -> Iterator[Prediction]:
    """Run the modules one after the other and compare each with the labels it can see.

    hidden_states [batch, tokens, hidden]: the main model's, after its last norm. input_ids, position_ids and labels
    [batch, tokens]: positions restart at each packed sample, and no module predicts across samples; labels of tokens
    without loss are negative. With `trunk_gradient` False the losses have no gradient in the main model, nor in the
    embedding and head it shares.
    """
    from policy.kernels.logprob import linear_logprobs  # imports TRL, which an engine's process does without

    weight = model.lm_head.weight if trunk_gradient else model.lm_head.weight.detach()
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()  # FSDP2 shards it
    for depth in range(1, mtp_depth(model.config) + 1):
        if not trunk_gradient and depth == 1:
            hidden_states = hidden_states.detach()
        hidden_states = model.mtp_hidden_states(hidden_states, input_ids, position_ids, depth=depth,
                                                trunk_gradient=trunk_gradient)
        ahead = depth + 1
        same_sample = position_ids[:, ahead:] == position_ids[:, :-ahead] + ahead
        wanted = labels[:, ahead:]
        labelled = same_sample & (wanted >= 0)
        logprobs, _, is_mode = linear_logprobs(hidden_states[:, :-1][labelled], weight, wanted[labelled])
        yield Prediction(depth, logprobs.new_zeros(labelled.shape).masked_scatter(labelled, -logprobs), labelled,
                         torch.zeros_like(labelled).masked_scatter(labelled, is_mode))
