"""The rollout engine: vLLM in a Ray actor, its weights replaced in memory.

Two faults of vLLM's CPU back end are silent, so both remedies stand here and `rl/sync.py` proves each load:
its rotary kernel is wrong for DeepSeek models with more than one head (remedy: torch operators through
`custom_ops: none`), and a weight update leaves experts in an unpacked layout (remedy: drop `moe_kernel`, which is
rebuilt with the layout, before each reload). A third is loud: a seeded request whose prompt is prefilled in
chunks ends the engine, because CPU generators have no offset to turn back (remedy: no chunked prefill).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.actor import ActorHandle

from pipeline.recipe import EngineConfig
from pipeline.stage import StageError
from rl import drafting


@dataclass(frozen=True)
class Request:
    """One completion to sample. The seed makes it repeatable whatever is in the batch beside it."""

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Sampling:
    temperature: float
    max_tokens: int
    top_p: float = 1.0
    routes: bool = False  # ask for the experts of each token; answered where engine.return_routes is on


@dataclass(frozen=True)
class Generation:
    """token_ids ends with the end-of-turn token when finish_reason is "stop".

    logprobs: one per token, under the distribution sampled from (after temperature and top-p).
    finish_reason: "stop", "length", or "too_long" for a prompt that leaves no room for a token.
    routes: vLLM's experts [prompt + completion - 1, layers, top_k], where asked for and returned.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    routes: np.ndarray | None = field(default=None, compare=False)


class EngineActor:
    """Runs inside the actor's process; `RolloutEngine` is its client."""

    def __init__(self, folder: str, config: dict[str, Any], dtype: str, max_length: int, seed: int):
        settings = EngineConfig.model_validate(config)
        os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="WARNING",
                          VLLM_NO_USAGE_STATS="1",
                          # a collective_rpc of a function is pickled; both sides are this process
                          VLLM_ALLOW_INSECURE_SERIALIZATION="1")
        options: dict[str, Any] = {}
        if not settings.gpus:
            os.environ.update(VLLM_CPU_KVCACHE_SPACE=str(settings.kv_cache_gib), VLLM_MLA_DISABLE="1",
                              VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS=str(os.cpu_count() or 1))
            options = {"distributed_executor_backend": "uni", "compilation_config": {"custom_ops": ["none"]},
                       "enable_chunked_prefill": False, "max_num_batched_tokens": max(8192, max_length)}
        if settings.return_routes:  # not run on a GPU; the CPU's model runner refuses it
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
            options |= {"enable_return_routed_experts": True, "enable_prefix_caching": True}
        if settings.draft:
            options |= drafting.OPTIONS
            if not settings.gpus:
                drafting.expand_with_torch()
        from vllm import LLM

        self.max_length = max_length
        self.version = 0
        self.drafts = settings.draft
        self.llm = LLM(folder, dtype=dtype, enforce_eager=True, max_model_len=max_length, seed=seed,
                       max_num_seqs=settings.max_sequences, tensor_parallel_size=settings.tensor_parallel,
                       logprobs_mode="processed_logprobs", generation_config="vllm", **options)

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Generation]:
        from vllm import SamplingParams

        fits = [index for index, request in enumerate(requests) if len(request.prompt_ids) < self.max_length]
        prompts = [{"prompt_token_ids": list(requests[index].prompt_ids)} for index in fits]
        params = [SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, logprobs=0, seed=requests[index].seed,
            max_tokens=min(sampling.max_tokens, self.max_length - len(requests[index].prompt_ids))) for index in fits]
        results = [Generation((), (), "too_long")] * len(requests)
        if not fits:
            return results
        for index, output in zip(fits, self.llm.generate(prompts, params, use_tqdm=False), strict=True):
            completion = output.outputs[0]
            token_ids = tuple(completion.token_ids)
            logprobs = tuple(step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True))
            results[index] = Generation(token_ids, logprobs, completion.finish_reason or "stop",
                                        completion.routed_experts if sampling.routes else None)
        return results

    def prompt_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probability of each prompt token but the first, at temperature 1."""
        from vllm import SamplingParams

        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts],
                                    SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0), use_tqdm=False)
        return [[output.prompt_logprobs[i][token].logprob for i, token in enumerate(ids) if i]
                for ids, output in zip(prompts, outputs, strict=True)]

    def draft_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        """Log-probability under the drafter of each prompt token but the first two."""
        return drafting.draft_logprobs(self.llm, prompts)

    def draft_counts(self) -> tuple[int, int]:
        """Tokens drafted and drafts accepted since the start."""
        return drafting.draft_counts(self.llm)

    def update(self, names: list[str], tensors: list[Any], checksums: dict[str, str], version: int) -> None:
        """Check what arrived against the sender's checksums, then load it and drop cached prefixes."""
        import torch

        from policy.shards import checksum

        weights = []
        for (name, dtype, shape), data in zip(names, tensors, strict=True):
            # Ray's shared memory is read-only; vLLM copies from it and never writes
            tensor = torch.frombuffer(memoryview(data), dtype=torch.uint8).view(getattr(torch, dtype)).view(shape)
            if checksum(tensor) != checksums[name]:
                raise StageError(f"weight sync: {name} arrived damaged (checksum differs)")
            weights.append((name, tensor))
        self._reload(lambda: weights, version)

    def load_folder(self, folder: str) -> None:
        """Replace the weights by those of a checkpoint folder, read shard by shard."""
        from safetensors import safe_open

        def read() -> Iterable[tuple[str, Any]]:
            for file in sorted(Path(folder).glob("*.safetensors")):
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 (not a dict)
                        yield name, opened.get_tensor(name)

        self._reload(read, 0)

    def _reload(self, weights: Callable[[], Iterable[tuple[str, Any]]], version: int) -> None:
        drafts = self.drafts

        def unpack(model) -> None:
            for module in model.modules():
                method = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None:
                    method.moe_kernel = None

        def load(worker) -> None:
            unpack(worker.model_runner.get_model())
            worker.model_runner.reload_weights(weights_iterator=iter(weights()), is_checkpoint_format=True)
            if drafts:
                from vllm.model_executor.model_loader.reload.inplace import reload_weights

                unpack(drafting.drafter_of(worker))
                reload_weights(worker.model_runner.vllm_config, drafting.drafter_of(worker),
                               drafting.drafter_weights(worker, weights()), None, is_checkpoint_format=True)

        self.llm.collective_rpc(load)
        self.llm.reset_prefix_cache()
        self.version = version

    def read_back(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
        """Checksums of the engine's own tensors, for those it holds under the same name and shape."""
        from policy.shards import checksum

        drafts = self.drafts

        def read(worker) -> dict[str, str]:
            model = worker.model_runner.get_model()
            held = drafting.held_by_drafter(worker) if drafts else {}
            held |= dict(model.named_parameters()) | dict(model.named_buffers())
            return {name: checksum(held[name].data) for name, shape in shapes.items()
                    if name in held and tuple(held[name].shape) == tuple(shape)}

        return self.llm.collective_rpc(read)[0]


class EngineDied(StageError):
    """The actor of an engine is gone. What it was asked can be asked of another."""


class RolloutEngine:
    """Client of one engine actor. Use `open_engine`, which reuses an actor that fits."""

    def __init__(self, actor: ActorHandle, drafts: bool):
        self.actor, self.drafts = actor, drafts

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Generation]:
        """Sample one completion per request, in order. A dead engine is an EngineDied naming the remedy."""
        return self._call("generate", list(requests), sampling)

    def generate_batches(self, batches: Sequence[Sequence[Request]], sampling: Sampling
                         ) -> Iterator[tuple[int, list[Generation]]]:
        """(place among the batches, its generations), one batch after another."""
        for place, batch in enumerate(batches):
            yield place, self.generate(batch, sampling)

    def wait(self) -> None:
        """Returns when the engine has started; raises EngineDied when it could not."""
        self._call("__ray_ready__")

    def kill(self) -> None:
        ray.kill(self.actor)

    def prompt_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        return self._call("prompt_logprobs", prompts)

    def draft_logprobs(self, prompts: list[list[int]]) -> list[list[float]]:
        return self._call("draft_logprobs", prompts)

    def draft_counts(self) -> tuple[int, int]:
        return self._call("draft_counts")

    def load_folder(self, folder: Path) -> None:
        self._call("load_folder", str(folder))

    def read_back(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
        return self._call("read_back", shapes)

    def update(self, tensors: dict[str, Any], checksums: dict[str, str], version: int) -> None:
        """Send tensors through shared memory and load them; returns when the engine uses them."""
        import torch

        heads = [(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
                 for name, tensor in tensors.items()]
        # raw bytes, because NumPy has no bfloat16 and Ray shares NumPy arrays without a copy
        payload = [tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
                   for tensor in tensors.values()]
        self._call("update", heads, payload, checksums, version)

    def _call(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self.actor, method).options(name=f"engine:{method}").remote(*args))
        except ray.exceptions.RayActorError as error:
            raise EngineDied(f"the rollout engine died during {method} ({error}); often memory: lower "
                             "engine.kv_cache_gib or engine.max_sequences and run the same command to resume") from None


# config.json keys that say where a checkpoint comes from, not what shape it has
NOT_ARCHITECTURE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype"})


def open_engine(folder: Path, config: EngineConfig, *, dtype: str, max_length: int, seed: int,
                role: str = "policy") -> RolloutEngine:
    """An engine with the weights of `folder`.

    A running engine of the same role and architecture takes the weights in memory (0.1 s on the tiny model);
    otherwise a new actor starts (about 15 s on two cores). Raises StageError when it shall draft and cannot.
    """
    architecture = {key: value for key, value in json.loads((folder / "config.json").read_text()).items()
                    if key not in NOT_ARCHITECTURE}
    if config.draft and not architecture.get("num_nextn_predict_layers"):
        raise StageError(f"engine.draft needs a model with an MTP module, and {folder} has none; leave it out")
    signature = json.dumps([architecture, config.model_dump(), dtype, max_length], sort_keys=True, default=str)
    name = f"engine-{role}-{hashlib.sha256(signature.encode()).hexdigest()[:8]}-{os.getpid()}"
    try:
        engine = RolloutEngine(ray.get_actor(name), config.draft)
        engine.load_folder(folder)
        return engine
    except (ValueError, EngineDied):
        pass  # no such actor yet, or it has died
    stop_engines(f"engine-{role}-")
    actor_class = ray.remote(EngineActor).options(name=name, num_cpus=0, num_gpus=config.gpus, max_restarts=0)
    actor = actor_class.remote(str(folder), config.model_dump(), dtype, max_length, seed)
    _OPEN[name] = actor  # a named actor lives as long as a handle of its owner
    return RolloutEngine(actor, config.draft)


_OPEN: dict[str, ActorHandle] = {}
TRAINING_COPIES = 6  # weights, gradients, two Adam moments, and about two for activations and logits


def make_room(folder: Path) -> None:
    """End this process's engines when training the checkpoint in `folder` would not fit beside them.

    For a training that rolls nothing out. Where it fits an engine stays: starting it again takes longer.
    """
    import psutil

    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if TRAINING_COPIES * weights > psutil.virtual_memory().available:
        stop_engines("engine-")


def stop_engines(prefix: str) -> None:
    """End this process's engines whose names begin so, before something else takes their memory."""
    for name in [name for name in list(_OPEN) if name.startswith(prefix)]:
        ray.kill(_OPEN.pop(name))


def chat_generator(engine: RolloutEngine, encode: Callable[[Any], list[int]], decode: Callable[[tuple[int, ...]], str],
                   sampling: Sampling) -> Callable[[list[Any], int, int], list[list[str]]]:
    """`generate(conversations, n, seed) -> n texts each`, the form `rewards.judge.Judge` asks for."""

    def generate(conversations: list[Any], n: int, seed: int) -> list[list[str]]:
        requests = [Request(tuple(encode(messages)), (seed * 1_000_003 + index * n + vote) % 2**31)
                    for index, messages in enumerate(conversations) for vote in range(n)]
        texts = [decode(generation.token_ids) for generation in engine.generate(requests, sampling)]
        return [texts[start:start + n] for start in range(0, len(texts), n)]

    return generate


def selftest() -> str:
    """Start an engine on a tiny untrained policy and compare its log-probs with transformers; one line on success.

    Runs in this process, without Ray. Raises StageError when the two disagree.
    """
    import random
    import tempfile

    import torch

    from policy.model import load_policy, new_policy, save_policy
    from policy.presets import tiny_config
    from policy.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["1 + 2 = 3"], 300, 64)
    with tempfile.TemporaryDirectory() as folder:
        save_policy(new_policy(tiny_config(vocab_size=300, max_length=64), 0), tokenizer, Path(folder))
        actor = EngineActor(folder, EngineConfig().model_dump(), "float32", 64, 0)
        model = load_policy(folder)
        prompt = [random.Random(0).randrange(256) for _ in range(16)]
        sampled = actor.generate([Request(tuple(prompt), 0)], Sampling(1.0, 8))[0]
        ids = torch.tensor([prompt + list(sampled.token_ids)])
        with torch.no_grad():
            ours = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1], -1)
    error = max(abs(float(ours[i, token]) - sampled.logprobs[i]) for i, token in enumerate(sampled.token_ids))
    if error > 1e-4:
        raise StageError(f"vLLM and transformers disagree on a tiny model by {error:.2g} in log-prob")
    return f"generated {len(sampled.token_ids)} tokens; log-probs agree with transformers to {error:.1e}"


if __name__ == "__main__":
    print(selftest())
