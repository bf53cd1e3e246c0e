"""Weight sync and its proof: the engine uses the trainer's weights, or the run stops.

Three checks after each load: every tensor arrives with the sender's checksum; tensors the engine keeps under
their own name and shape (norms and balance biases; matrices it pads, packs or fuses are not among them) are read
back and compared; and the log-probs of fixed prompts agree between engine and trainer within
`engine.max_logprob_error`. Where the engine drafts, the MTP modules go along and the drafter's log-probs are compared
as well: stale drafts change no text, so nothing else would tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from pipeline.stage import StageError
from policy.model import export_tensors, load_policy
from policy.mtp import is_mtp
from policy.precision import exact_products
from policy.shards import checksum
from rl.engine import RolloutEngine

PROBE_LENGTHS = (24, 40, 56)
ROUNDING, ROUNDING_DRAWS = 2e-6, 16  # relative, a few times what float32 loses on its way through the layers


@dataclass(frozen=True)
class SyncProof:
    """What was compared: tensors sent, tensors read back, and the largest log-prob difference."""

    tensors: int
    read_back: int
    max_logprob_error: float


def sync_weights(model: PreTrainedModel, engine: RolloutEngine, version: int, bound: float) -> SyncProof:
    """Send the policy to the engine and prove it. Raises StageError when trainer and engine disagree."""
    tensors = engine_tensors(model, engine)
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    engine.update(tensors, checksums, version)
    return _prove(model, engine, tensors, checksums, bound)


def prove_checkpoint(folder: Path, dtype: str, engine: RolloutEngine, bound: float) -> SyncProof:
    """The same proof for an engine that read a checkpoint folder by itself."""
    model = load_policy(folder, dtype)
    tensors = engine_tensors(model, engine)
    return _prove(model, engine, tensors, {name: checksum(tensor) for name, tensor in tensors.items()}, bound)


def engine_tensors(model: PreTrainedModel, engine: RolloutEngine) -> dict[str, torch.Tensor]:
    """What the engine runs of a policy: MTP modules only where it drafts."""
    return {name: tensor for name, tensor in export_tensors(model) if engine.drafts or not is_mtp(model.config, name)}


def _prove(model: PreTrainedModel, engine: RolloutEngine, tensors: dict[str, torch.Tensor],
           checksums: dict[str, str], bound: float) -> SyncProof:
    held = engine.read_back({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    stale = [name for name, value in held.items() if value != checksums[name]]
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    if stale or not all(name in held for name in biases):
        names = stale or [name for name in biases if name not in held]
        raise StageError(f"weight sync: the engine does not hold the trainer's {names[:3]} ({len(names)} tensors)")
    with exact_products(model):  # the proof is of weights; what FP8 training changes shows in the rollouts' drift
        error = logprob_error(model, engine, bound)
        draft_error = logprob_error(model, engine, bound, drafter=True) if engine.drafts else 0.0
    if not error <= bound:
        raise StageError(
            f"weight sync: log-probs of the fixed prompts differ by {error:.2e} between engine and trainer "
            f"(engine.max_logprob_error is {bound:g}). Weights or kernels of the two do not agree; for a "
            "bfloat16 model a bound near 0.1 is usual, for float32 1e-4")
    if not draft_error <= bound:
        raise StageError(f"weight sync: log-probs of the drafter differ by {draft_error:.2e} from the trainer's "
                         f"MTP module (engine.max_logprob_error is {bound:g}); engine.draft: false goes on without")
    return SyncProof(len(tensors), len(held), max(error, draft_error))


@torch.no_grad()
def logprob_error(model: PreTrainedModel, engine: RolloutEngine, bound: float, drafter: bool = False,
                  lengths: Sequence[int] = PROBE_LENGTHS) -> float:
    """Largest |trainer - engine| log-prob over the tokens of fixed prompts, one of each length.

    `drafter` compares the first MTP module instead.

    A router compares: where two experts (or groups) tie to within rounding, trainer and engine may each be right and
    still far apart. Positions that the trainer itself moves beyond `bound` when its input moves by rounding are left
    out, as long as half of all positions remain.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, min(model.config.vocab_size, 50_000), (length,), generator=generator).tolist()
               for length in lengths]
    tokens = [torch.tensor(ids, device=model.device) for ids in prompts]
    embedded = [model.get_input_embeddings()(ids) for ids in tokens]
    logprobs, answers = (_draft_logprobs, engine.draft_logprobs) if drafter else (_logprobs, engine.prompt_logprobs)
    ours = [logprobs(model, ids, inputs) for ids, inputs in zip(tokens, embedded, strict=True)]
    errors = [(mine - torch.tensor(theirs)).abs() for mine, theirs in zip(ours, answers(prompts), strict=True)]
    worst = float(torch.cat(errors).max())
    if worst <= bound:
        return worst
    settled = torch.cat([_moved_by_rounding(model, ids, inputs, logprobs) <= bound
                         for ids, inputs in zip(tokens, embedded, strict=True)])
    print(f"weight sync: log-probs differ by {worst:.2e}; the trainer's own are unsettled at "
          f"{int((~settled).sum())} of {len(settled)} positions, which are left out", flush=True)
    return float(torch.cat(errors)[settled].max()) if 2 * settled.sum() >= len(settled) else worst


def _moved_by_rounding(model: PreTrainedModel, ids: torch.Tensor, inputs: torch.Tensor,
                       logprobs: Callable[..., torch.Tensor]) -> torch.Tensor:
    """How far the trainer's own `logprobs` move, at most, when `inputs` move by rounding."""
    settled = logprobs(model, ids, inputs)
    noise, moved = max(torch.finfo(model.dtype).eps, ROUNDING), torch.zeros_like(settled)
    for seed in range(ROUNDING_DRAWS):
        draw = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(seed)).to(inputs)
        moved = moved.maximum((logprobs(model, ids, inputs * (1 + noise * draw)) - settled).abs())
    return moved


def _logprobs(model: PreTrainedModel, ids: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """[tokens - 1]: the log-prob of each token but the first, on the CPU, from embedded `inputs` [tokens, hidden]."""
    logits = model(inputs_embeds=inputs[None], use_cache=False).logits[0].float()
    return torch.log_softmax(logits, -1)[:-1].gather(1, ids[1:, None])[:, 0].cpu()


def _draft_logprobs(model: PreTrainedModel, ids: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """[tokens - 2]: the log-prob of each token but the first two under the first MTP module, on the CPU."""
    hidden = model.model(inputs_embeds=inputs[None], use_cache=False).last_hidden_state
    positions = torch.arange(len(ids), device=ids.device)[None]
    logits = model.lm_head(model.mtp_hidden_states(hidden, ids[None], positions))[0].float()
    return torch.log_softmax(logits, -1)[:-1].gather(1, ids[2:, None])[:, 0].cpu()
