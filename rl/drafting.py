"""Speculative decoding with the policy's own MTP module, inside the engine's process.

DeepSeek-V3 (arXiv 2412.19437) section 5.4.3: the first module drafts the token after next, and the main model accepts
it or samples another in its place (arXiv 2211.17192), so that what is sampled is distributed as without drafts. Wrong
weights in the drafter therefore change no text; they only let fewer drafts through. vLLM's reload reaches the main
model alone, so the drafter is loaded here, and `rl/sync.py` compares its log-probs with the trainer's.

A fault of vLLM's CPU back end is silent: it spreads temperature, top-k and top-p over the tokens of a batch through
an integer copy that is then dropped, so that drafted tokens are judged under whatever the memory held before. The
remedy spreads them with torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pipeline.stage import StageError

if TYPE_CHECKING:
    import torch
    from vllm import LLM

# A second token would come from the same module on a CPU, whatever the depth of the checkpoint.
OPTIONS = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}, "disable_log_stats": False}


def expand_with_torch() -> None:
    """Replace the broken CPU operation of vLLM's rejection sampler in this process."""
    from vllm.v1.sample import rejection_sampler

    def expand(x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0,
               replace_to: int = 0) -> torch.Tensor:
        counts = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
        return x.masked_fill(x == replace_from, replace_to).repeat_interleave(counts, output_size=num_tokens)

    rejection_sampler.expand_batch_to_tokens = expand


def drafter_of(worker: Any) -> torch.nn.Module:
    """The drafter's model, under vLLM's names: `model.layers.L.mtp_block` for the block of module L."""
    model = worker.get_draft_model()
    if model is None:
        raise StageError("engine.draft: vLLM runs without a drafter; turn engine.draft off")
    return model


def drafter_weights(worker: Any, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, torch.Tensor]]:
    """What the drafter's loader takes of a checkpoint: the MTP modules, the embedding, and for each module the head.

    Raises StageError when no MTP tensor is among the weights; the drafter would keep its old ones.
    """
    model, found = drafter_of(worker).model, False
    modules = tuple(f"model.layers.{layer}." for layer in model.layers)
    for name, tensor in weights:
        if name == "lm_head.weight":
            yield from ((f"{module}shared_head.head.weight", tensor) for module in modules)
        elif name.startswith(modules) and not name.endswith(("embed_tokens.weight", "shared_head.head.weight")):
            found = True
            yield name, tensor
        elif name == "model.embed_tokens.weight":
            yield name, tensor
    if not found:
        raise StageError("engine.draft: no MTP weights were sent for the drafter")


def held_by_drafter(worker: Any) -> dict[str, torch.Tensor]:
    """The drafter's tensors under checkpoint names."""
    model = drafter_of(worker)
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name.replace(".mtp_block.", "."): tensor for name, tensor in held.items()}


def draft_logprobs(llm: LLM, prompts: list[list[int]]) -> list[list[float]]:
    """Log-probability under the first MTP module of each prompt token but the first two."""
    from vllm import SamplingParams

    def watch(worker: Any) -> None:
        module = next(iter(drafter_of(worker).model.layers.values()))
        worker.drafted = []
        worker.watching = module.register_forward_hook(
            lambda _module, _inputs, output: worker.drafted.append(output[0].clone()))

    def read(worker: Any, ids: list[int]) -> list[float]:
        import torch

        worker.watching.remove()
        states = worker.drafted[0][:len(ids) - 2]  # of the prompt; what follows is decoding
        logprobs = torch.log_softmax(drafter_of(worker).compute_logits(states).float(), -1)
        wanted = torch.tensor(ids[2:], device=logprobs.device)
        return logprobs.gather(1, wanted[:, None])[:, 0].tolist()

    answers = []
    for ids in prompts:
        llm.collective_rpc(watch)
        # prompt log-probs are asked for so that no cached prefix stands in for the prompt's own pass
        llm.generate([{"prompt_token_ids": ids}], SamplingParams(temperature=0.0, max_tokens=2, prompt_logprobs=0),
                     use_tqdm=False)
        answers.append(llm.collective_rpc(read, args=(ids,))[0])
    return answers


def draft_counts(llm: LLM) -> tuple[int, int]:
    """Tokens drafted and drafts accepted since the engine started."""
    found = {metric.name: metric.value for metric in llm.get_metrics() if "spec_decode" in metric.name
             and hasattr(metric, "value")}
    return found["vllm:spec_decode_num_draft_tokens"], found["vllm:spec_decode_num_accepted_tokens"]
