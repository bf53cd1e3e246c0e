"""The recipe: typed sections. Defaults are the paper's figures.

DeepSeek-V3 technical report (arXiv 2412.19437) sections 2.1.2, 2.2, 4.2 and 5; DeepSeek-R1
(arXiv 2501.12948) for GRPO and preference data. An unknown key is an error. Each stage sees only its
own section, so a change in one section makes only that stage and those after it stale.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

SPLITS = ("corpus", "sft", "preference", "rl", "heldout")
BFLOAT16_ERROR = 0.05  # between the log-probs of two implementations
FP8_DRIFT = 0.05  # between the log-probs of FP8 and of exact products; about 0.02 on the tiny model
EXPERT_GROUPS = 4  # of the tiny model
Precision = Literal["dtype", "fp8"]
MOST_BETA2 = 1 - 2.0 ** -7  # of AdamW whose second moment is BF16: a slower decay is less than half a BF16 step
Fraction01 = Annotated[float, Field(ge=0, le=1)]
# absolute from the start: the run is read again from other folders
LocalPath = Annotated[str, AfterValidator(lambda path: str(Path(path).expanduser().absolute()))]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message names the path, the value and the remedy."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GeneratedSource(Section):
    """Problems made by a seeded generator of `distill/problems/`."""

    type: Literal["generated"] = "generated"
    generator: Literal["math", "code", "logic", "writing"]
    skills: list[str] | None = Field(None, description="subset of the generator's skills; all by default")


class JsonlSource(Section):
    """One JSONL file per split, in GSM8K form, HumanEval form, or rows of `Problem`."""

    type: Literal["jsonl"] = "jsonl"
    format: Literal["gsm8k", "humaneval", "problem"]
    path: LocalPath
    heldout_path: LocalPath | None = Field(None, description="a file that feeds the held-out split alone")


class DatasetSource(Section):
    """A `datasets` id or a folder `datasets` can load."""

    type: Literal["dataset"] = "dataset"
    format: Literal["gsm8k", "humaneval", "problem"]
    id: str
    config: str | None = None
    split: str = "train"
    heldout_split: str | None = None
    path: LocalPath | None = Field(None, description="local JSONL file or datasets folder used instead of `id`")
    heldout_path: LocalPath | None = Field(None, description="local copy used instead of `heldout_split`")


Source = Annotated[GeneratedSource | JsonlSource | DatasetSource, Field(discriminator="type")]


class ExpectedConfig(Section):
    """What `posttrain run --dry-run` prices generation with; no stage reads it.

    The defaults are of R1: chains of about 6,000 tokens (OpenR1-Math), 16,000 to 20,000 tokens/s from 8 H200.
    """

    prompt_tokens: PositiveInt = Field(300, description="of a problem")
    original_tokens: PositiveInt = Field(1000, description="of an answer in the original form")
    reasoning_tokens: PositiveInt = Field(6000, description="of an answer in the reasoning form")
    judgement_tokens: PositiveInt = Field(500, description="of a judgement, where a judge gives the verdicts")
    right_share: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="of samples, over all problems; problems differ, by a Beta distribution of concentration 2")
    engine_tokens_per_second: PositiveFloat = Field(16000, description="that one engine (engine.gpus) writes")


Form = Literal["original", "reasoning"]


class TeacherConfig(Section):
    """An OpenAI-compatible endpoint that answers a domain's problems in place of an expert, R1 for example.

    Only `model` is part of the stages' fingerprints: a set stays what it is when its endpoint moves.
    """

    url: str = Field(pattern=r"^https?://", description="up to the version: https://api.deepseek.com/v1")
    model: str
    api_key_env: str | None = Field(None, description="name of the environment variable that holds the key")
    concurrency: PositiveInt = Field(32, description="requests under way at a time")
    requests_per_minute: PositiveFloat | None = None
    retries: Annotated[int, Field(ge=0)] = Field(8, description="of a request that met 408, 409, 429, 5xx, a timeout "
                                                 "or an unreadable answer; then the run stops, what is done is kept")
    timeout: PositiveFloat = Field(1800, description="seconds without a byte of an answer")
    input_price: Annotated[float, Field(ge=0)] = Field(0.0, description="USD per million tokens")
    output_price: Annotated[float, Field(ge=0)] = Field(0.0, description="USD per million tokens")
    most_cost: PositiveFloat | None = Field(None, description="USD for the domain, judgements included, after which "
                                            "nothing more is asked and the run stops")

    @model_validator(mode="after")
    def _consistent(self) -> TeacherConfig:
        if self.most_cost is not None and not (self.input_price or self.output_price):
            raise ValueError("most_cost needs input_price or output_price, or nothing is counted")
        return self


class DomainGenerateConfig(Section):
    """What a domain generates otherwise than the section `generate` says."""

    problems: PositiveInt | None = None
    forms: Annotated[tuple[Form, ...], Field(min_length=1)] | None = None
    samples: PositiveInt | None = None
    most_samples: PositiveInt | None = None
    wanted: PositiveInt | None = None
    temperature: PositiveFloat | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_tokens: PositiveInt | None = None
    expected: ExpectedConfig | None = None


class DomainConfig(Section):
    source: Source
    splits: dict[Literal["corpus", "sft", "preference", "rl", "heldout"], Annotated[int, Field(ge=0)]] = Field(
        description="rows per split; splits never share a problem")
    judged: Literal["principles", "match"] | None = Field(
        None, description="where no rule can check the answers: the generative reward model scores them by principles, "
        "or says whether they match a free-form reference")
    principles: list[str] = Field([], description="a constitution: what every answer of the domain is judged by, "
                                  "beside the principles of its own problem")
    license: str | None = Field(None, description="of the source, as the dataset card names it")
    feedback: Literal["reward_model", "self"] = Field(
        "reward_model", description="the judge in RL; self: the policy as it was when RL began, by its own votes "
        "(section 5.4.2)")
    generate: DomainGenerateConfig = DomainGenerateConfig()
    teacher: TeacherConfig | None = Field(None, description="who answers, and judges, in place of an expert")

    @model_validator(mode="after")
    def _consistent(self) -> DomainConfig:
        if self.judged and self.generate.most_samples is not None:
            raise ValueError("generate.most_samples is for domains where rules give verdicts; leave it out where "
                             f"judged is {self.judged}")
        if isinstance(self.source, GeneratedSource):
            wanted = "principles" if self.source.generator == "writing" else None
            if self.judged != wanted:
                raise ValueError(f"judged must be {wanted or 'left out'} with the {self.source.generator} generator "
                                 f"(got {self.judged})")
        if self.principles and self.judged != "principles":
            raise ValueError("principles need judged: principles")
        if self.feedback == "self" and not self.judged:
            raise ValueError("feedback: self needs a judged domain; elsewhere a rule decides")
        return self


class TinyModel(Section):
    """The tiny DeepseekV3ForCausalLM of `policy/presets.py`, trained from nothing by the base stage."""

    type: Literal["tiny"] = "tiny"
    hidden_size: PositiveInt = 128
    layers: Annotated[int, Field(ge=4)] = 4
    routed_experts: Annotated[int, Field(ge=4)] = 16
    vocab_size: Annotated[int, Field(ge=300)] = 1024
    mtp_depth: Annotated[int, Field(ge=0)] = Field(1, description="modules of multi-token prediction (section 2.2)")
    context_length: PositiveInt | None = Field(None, description="of the base, where an extend section lengthens it to "
                                               "model.max_length")
    drill_steps: Annotated[int, Field(ge=0)] = Field(200, description="optimizer steps on rows to repeat, first of all")

    @field_validator("routed_experts")
    @classmethod
    def _in_groups(cls, value: int) -> int:
        if value % EXPERT_GROUPS:
            raise ValueError(f"must be a multiple of the {EXPERT_GROUPS} expert groups")
        return value


class PretrainedModel(Section):
    """Any Hugging Face causal LM: an id or a folder with weights and tokenizer."""

    type: Literal["pretrained"] = "pretrained"
    id: str
    path: LocalPath | None = Field(None, description="local folder used instead of `id`")


class ModelConfig(Section):
    source: Annotated[TinyModel | PretrainedModel, Field(discriminator="type")]
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of weights, in trainers and engines")
    precision: Precision = Field("dtype", description="of the matrix products of training: the weights' own, or FP8 "
                                 "with FP8 cached activations (section 3.3)")
    max_length: PositiveInt = Field(32768, description="tokens of prompt plus completion anywhere in the run")
    reflective_prompt: str = Field(
        "First think between <think> and </think>: work step by step, question what you find, check it, and correct it "
        "where it is wrong. Then, after </think>, give the answer alone.", min_length=1,
        description="system prompt of the reasoning form, which asks for reflection and verification (section 5.1)")


Recompute = Annotated[tuple[Literal["norm", "mla_up", "swiglu"], ...], Field(
    description="what the backward pass computes again instead of keeping (sections 3.2.3 and 3.3.3)")]
Decay = Annotated[float | None, Field(
    gt=0, lt=1, description="of the average of the weights in CPU memory, exported as checkpoint-ema; null keeps none")]


class ParallelConfig(Section):
    """The layout of a training on many processes. DeepSeek-V3 section 3.2; one process is the default."""

    processes: PositiveInt = Field(1, description="processes that train together; losses do not depend on it")
    shard: bool = Field(True, description="FSDP2: weights, gradients and optimizer state are cut over the processes; "
                        "false: each holds all of them (data parallel)")
    expert: PositiveInt = Field(1, description="processes over which the experts are spread")
    dispatch: Literal["fp8", "exact"] = Field(
        "fp8", description="tokens go to experts in FP8 with power-of-two scales, outputs come back in BF16 (section "
        "3.3.3); exact: both in the model's own dtype")

    @model_validator(mode="after")
    def _consistent(self) -> ParallelConfig:
        if self.processes % self.expert:
            raise ValueError(f"expert must divide processes (got {self.expert} and {self.processes})")
        return self


class TrainConfig(Section):
    """Supervised training. DeepSeek-V3 section 5.1: 2 epochs, cosine 5e-6 -> 1e-6; balance: section 2.1.2."""

    epochs: PositiveFloat = 2.0
    max_steps: PositiveInt | None = Field(None, description="stop after so many optimizer steps")
    learning_rate: PositiveFloat = 5e-6
    min_learning_rate: PositiveFloat = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    batch_tokens: PositiveInt = Field(1048576, description="tokens per optimizer step (packs x pack length)")
    pack_length: PositiveInt = 4096
    packs_per_device: PositiveInt = Field(1, description="packs per forward pass; losses do not depend on it")
    muon_learning_rate: PositiveFloat | None = Field(None, description="Muon for weight matrices; AdamW when left out")
    weight_decay: float = 0.1
    adam_beta2: float = 0.95
    max_grad_norm: PositiveFloat = 1.0
    balance_alpha: Annotated[float, Field(ge=0)] = 1e-4
    bias_gamma: Annotated[float, Field(ge=0)] = 1e-3
    mtp_lambda: Annotated[float, Field(ge=0)] = Field(0.1, description="weight of the MTP loss, where the model has "
                                                      "MTP modules")
    mtp_trunk_gradient: bool = Field(True, description="whether the MTP loss trains the main model too, and the "
                                     "embedding and head it shares; false: its modules alone")
    recompute: Recompute = ()
    ema_decay: Decay = None
    save_steps: PositiveInt = 100
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if not self.mtp_lambda and not self.mtp_trunk_gradient:
            raise ValueError("mtp_trunk_gradient false needs an mtp_lambda above 0; at 0 nothing trains MTP modules")
        processes = self.parallel.processes
        if self.batch_tokens % (self.pack_length * self.packs_per_device * processes):
            raise ValueError("batch_tokens must be a multiple of pack_length x packs_per_device x parallel.processes "
                             f"(got {self.batch_tokens} and "
                             f"{self.pack_length} x {self.packs_per_device} x {processes})")
        if processes > 1 and self.muon_learning_rate is not None:
            raise ValueError(f"parallel.processes {processes} needs AdamW, whose state can be cut: leave "
                             f"muon_learning_rate out (got {self.muon_learning_rate:g})")
        if self.parallel.expert > 1 and not self.mtp_trunk_gradient:
            raise ValueError(f"parallel.expert {self.parallel.expert} needs mtp_trunk_gradient true: gradients of "
                             "experts lie apart, and MTP modules cannot be clipped by themselves")
        if processes > 1 and self.ema_decay is not None:
            raise ValueError(f"parallel.processes {processes} with ema_decay {self.ema_decay:g}: the average needs all "
                             "weights in one process; leave one of the two out")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate {self.min_learning_rate} is above learning_rate {self.learning_rate}")
        return self


class YarnConfig(Section):
    """YaRN (arXiv 2309.00071) with the figures of DeepSeek-V3 section 4.3."""

    factor: Annotated[int, Field(ge=2)] = Field(40, description="times the length the base model was trained for")
    beta_fast: PositiveFloat = 32
    beta_slow: PositiveFloat = 1
    mscale: PositiveFloat = 1.0


class ExtendConfig(Section):
    """Context extension (section 4.3): two phases of 1000 steps, 1920 sequences of 32K, then 480 of 128K."""

    yarn: YarnConfig = YarnConfig()
    phases: Annotated[tuple[TrainConfig, ...], Field(min_length=1)] = tuple(
        TrainConfig(max_steps=1000, learning_rate=7.3e-6, min_learning_rate=7.3e-6, pack_length=length,
                    batch_tokens=sequences * length) for length, sequences in ((32768, 1920), (131072, 480)))
    documents: LocalPath | None = Field(None, description="JSONL rows of {text: a long document} to train on beside "
                                        "the needles; the corpus, several of its documents to a row, when left out")
    needle_share: Fraction01 = Field(0.5, description="of the tokens trained on, facts to find in a long context")
    needles: PositiveInt = Field(20, description="contexts per length and depth that measure retrieval")

    @model_validator(mode="after")
    def _consistent(self) -> ExtendConfig:
        for index, phase in enumerate(self.phases):
            if phase.max_steps is None:
                raise ValueError(f"phases.{index}.max_steps: give a number, as rows are made for so many steps")
        return self


class RewardWeights(Section):
    """Weights of a reward's parts (DeepSeek-R1 sections 2.2.2 and 2.3.2: summed with equal weight)."""

    accuracy: Annotated[float, Field(ge=0)] = 1.0
    format: Annotated[float, Field(ge=0)] = 1.0
    language: Annotated[float, Field(ge=0)] = Field(1.0, description="share of words in the script of the question")


class GrpoConfig(Section):
    """GRPO (DeepSeekMath section 4; DeepSeek-R1 figures): group of G per prompt, clip, k3 KL to the reference."""

    steps: PositiveInt = 1700
    prompts_per_step: PositiveInt = Field(512, description="prompts of one rollout, over all its mini-batches")
    group_size: Annotated[int, Field(ge=2)] = 16
    learning_rate: PositiveFloat = 3e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    kl_coef: Annotated[float, Field(ge=0)] = 1e-3
    clip_epsilon: PositiveFloat = 0.2
    temperature: PositiveFloat = 1.0
    max_completion_length: PositiveInt = 32768
    mini_batches: PositiveInt = Field(16, description="optimizer steps per rollout; one inner epoch")
    device_batch: PositiveInt = Field(8, description="completions per forward pass; losses do not depend on it")
    reasoning_share: Fraction01 = Field(0.5, description="share of prompts with the reflective system prompt")
    rewards: RewardWeights = RewardWeights()
    self_votes: PositiveInt = Field(1, description="votes of the policy's own start, where it is the judge")
    bias_gamma: Annotated[float, Field(ge=0)] = Field(0.0, description="0: the balance bias is frozen in RL")
    routing_replay: bool = Field(False, description="gradient passes send each token to the experts of its rollout; "
                                 "for mixtures of experts alone")
    mtp_lambda: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the MTP cross-entropy on the "
                                                      "rollouts trained on, so that drafts follow the policy")
    mtp_trunk_gradient: bool = Field(False, description="whether that loss trains the main model too, which it pulls "
                                     "towards its rollouts whatever their reward")
    max_grad_norm: PositiveFloat = 1.0
    reference_steps: PositiveInt = Field(400, description="steps after which the KL reference is replaced")
    importance_cap: PositiveFloat = Field(2.0, description="cap of the trainer/engine importance ratio (TIS)")
    max_drift: PositiveFloat = Field(0.1, description="stop when mean |trainer - engine| log-prob exceeds this")
    infra_error_budget: Fraction01 = 0.01
    recompute: Recompute = ()
    ema_decay: Decay = None
    save_steps: PositiveInt = 20

    @model_validator(mode="after")
    def _consistent(self) -> GrpoConfig:
        if self.mtp_trunk_gradient and not self.mtp_lambda:
            raise ValueError("mtp_trunk_gradient true needs an mtp_lambda above 0; at 0 nothing trains MTP modules")
        batch = self.prompts_per_step * self.group_size
        if self.prompts_per_step % self.mini_batches:
            raise ValueError(f"mini_batches must divide prompts_per_step (got {self.mini_batches} and "
                             f"{self.prompts_per_step}): a group stays in one mini-batch")
        if batch // self.mini_batches % self.device_batch:
            raise ValueError(f"device_batch must divide prompts_per_step x group_size / mini_batches "
                             f"(got {self.device_batch} and {batch // self.mini_batches})")
        if self.routing_replay and self.bias_gamma:
            raise ValueError(f"bias_gamma {self.bias_gamma:g} with routing_replay: a replayed load does not answer to "
                             "the bias; set bias_gamma: 0 or routing_replay: false")
        return self


class ExpertConfig(Section):
    plain_thinking: Fraction01 = Field(0.3, description="share of problems whose plain prompt is answered with the "
                                       "chain, so that RL has both patterns to choose from (section 5.1)")
    sft: TrainConfig = TrainConfig()
    rl: GrpoConfig = GrpoConfig()


class GenerateConfig(Section):
    """Expert generation in both sample forms at high temperature (section 5.1)."""

    problems: PositiveInt = Field(375000, description="problems of the sft split per domain")
    forms: Annotated[tuple[Form, ...], Field(min_length=1)] = Field(
        ("original", "reasoning"), description="original: the problem alone; reasoning: with the reflective prompt")
    samples: PositiveInt = Field(4, description="samples per problem and form; of the first round, where there are "
                                 "more")
    most_samples: PositiveInt | None = Field(
        None, description="where rules give verdicts: a problem and form with fewer right samples than wanted gets as "
        "many again, up to so many in all; no further rounds when left out")
    wanted: PositiveInt = Field(1, description="right samples per problem and form that end the rounds")
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: PositiveInt = 16384
    shard_prompts: PositiveInt = Field(512, description="prompts an engine gets at a time: what a crash can lose")
    part_problems: PositiveInt = Field(1024, description="problems per file of samples; memory is bounded by some")
    expected: ExpectedConfig = ExpectedConfig()

    @property
    def cap(self) -> int:
        """Samples that a problem and form can get."""
        return self.most_samples or self.samples

    @model_validator(mode="after")
    def _consistent(self) -> GenerateConfig:
        if self.cap < self.samples:
            raise ValueError(f"most_samples {self.most_samples} is below samples {self.samples}, the first round")
        if self.wanted > self.cap:
            raise ValueError(f"wanted {self.wanted} is above the {self.cap} samples that a problem and form can get")
        if len(set(self.forms)) != len(self.forms):
            raise ValueError(f"forms names one twice (got {list(self.forms)})")
        return self


class RejectConfig(Section):
    keep: PositiveInt = Field(1, description="samples kept per problem and form: the shortest of the correct ones")
    max_tokens: PositiveInt = 8192
    min_judge_score: Fraction01 = Field(0.7, description="floor for samples without a rule to check them")
    review: Annotated[int, Field(ge=0)] = Field(200, description="samples per judged domain put before a person: those "
                                                "whose score is nearest the floor")
    reviews: LocalPath | None = Field(None, description="decisions of a person, as posttrain review writes them")


class CurateConfig(Section):
    total: PositiveInt = 1_500_000
    quotas: dict[str, Fraction01] = Field(default_factory=dict, description="share per domain; even by default")
    reasoning_share: Fraction01 = Field(0.5, description="wanted share of the reasoning form")
    plain_thinking: dict[str, Annotated[float, Field(ge=0, lt=1)]] = Field(
        default_factory=dict, description="per domain, the most of its plainly asked samples that may think, so that "
        "RL has both patterns to choose from; no limit where none is given")
    near_duplicate: Annotated[float, Field(gt=0.5, le=1)] = Field(
        0.85, description="similarity (Jaccard, of runs of five words) from which on two samples are one")
    validation_share: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.002, description="of the problems, whose samples are the set's validation split")
    evaluation_files: tuple[LocalPath, ...] = Field(
        (), description="JSONL files of other evaluation sets; no sample may share 13 words with a text in them, as "
        "none may with the held-out split")

    @model_validator(mode="after")
    def _consistent(self) -> CurateConfig:
        if self.quotas and abs(sum(self.quotas.values()) - 1) > 1e-6:
            raise ValueError(f"quotas must sum to 1 (they sum to {sum(self.quotas.values()):g})")
        return self


class PreferenceConfig(Section):
    """Pairs judged in both orders, averaged, kept above a gap (DeepSeek-R1 supplement; section 5.2.1)."""

    pairs: PositiveInt = 66000
    heldout_pairs: PositiveInt = 1000
    votes: Annotated[int, Field(ge=2, multiple_of=2)] = Field(4, description="half in each order")
    min_gap: Annotated[float, Field(ge=0)] = Field(1.0, description="on the 0-10 scale")
    temperature: PositiveFloat = 1.0
    max_tokens: PositiveInt = 8192


class RewardModelConfig(Section):
    train: TrainConfig = TrainConfig(epochs=1, learning_rate=6e-6)
    match_rows: Annotated[int, Field(ge=0)] = Field(
        20000, description="comparisons with a reference to train on, half from verified samples and half from worked "
        "answers; taken where a domain is judged by match")
    votes: PositiveInt = Field(1, description="judgements averaged per scored completion")
    max_tokens: PositiveInt = 8192
    min_accuracy: Fraction01 = Field(0.6, description="held-out pair accuracy below which it may not be a reward")


class EvaluationConfig(Section):
    problems: PositiveInt = Field(500, description="held-out problems per domain")
    judged_problems: PositiveInt = Field(200, description="held-out problems per judged domain, for the win rate")
    k: PositiveInt = 4
    k_problems: PositiveInt = Field(100, description="problems sampled k times for pass@k")
    temperature: PositiveFloat = 0.6
    max_tokens: PositiveInt = 32768


class EngineConfig(Section):
    """The vLLM engine. `kv_cache_gib` is for the CPU back end; tensor parallel for GPUs."""

    replicas: PositiveInt = Field(1, description="engines that generate and judge the SFT set at a time, each with its "
                                  "gpus; no part of any stage's fingerprint")
    kv_cache_gib: PositiveInt = 1
    max_sequences: PositiveInt = 128
    tensor_parallel: PositiveInt = 1
    gpus: Annotated[float, Field(ge=0)] = 0
    return_routes: bool = Field(False, description="routing replay takes the engine's own routes, which only vLLM's "
                                "GPU model runner returns; elsewhere the trainer recomputes them at the same weights")
    draft: bool = Field(False, description="speculative decoding: the first MTP module drafts a token, the main model "
                        "accepts or replaces it, so samples are distributed as without; slower on the tiny model")
    probe_checkpoints: bool = Field(True, description="compare log-probs with transformers after each load from disk; "
                                    "turn off for models that do not fit beside the engine")
    max_logprob_error: PositiveFloat = Field(1e-4, description="proof bound after each sync; 0.1 suits bfloat16")

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.tensor_parallel > 1 and self.gpus < self.tensor_parallel:
            raise ValueError(f"tensor_parallel {self.tensor_parallel} needs as many gpus (got {self.gpus:g})")
        if self.return_routes and not self.gpus:
            raise ValueError("return_routes needs gpus (got 0): the CPU back end returns no routes; leave it out, and "
                             "the trainer recomputes them")
        if self.draft and self.return_routes:
            raise ValueError("draft true with return_routes true: the routes vLLM returns were never compared under "
                             "drafts; set one of them")
        return self


class Recipe(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    workflow: str = "deepseek_v3"
    seed: int = 0
    isolation: Literal["bubblewrap", "rlimits"] = Field(
        "bubblewrap", description="of code under test; rlimits, for machines without namespaces, leaves it the network "
        "and every readable file, and each verdict says so")
    model: ModelConfig
    domains: Annotated[dict[str, DomainConfig], Field(min_length=1)]
    engine: EngineConfig = EngineConfig()
    base: TrainConfig = Field(TrainConfig(), description="pre-training of the tiny model; unused by a pretrained one")
    extend: ExtendConfig | None = Field(None, description="context extension of the base; none by default, as released "
                                        "models come extended")
    expert: ExpertConfig = ExpertConfig()
    generate: GenerateConfig = GenerateConfig()
    reject: RejectConfig = RejectConfig()
    curate: CurateConfig = CurateConfig()
    sft: TrainConfig = TrainConfig()
    preference: PreferenceConfig = PreferenceConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    rl: GrpoConfig = GrpoConfig(temperature=0.7)
    evaluation: EvaluationConfig = EvaluationConfig()

    def generation(self, domain: str) -> GenerateConfig:
        """What `generate` says, with what the domain says otherwise; a judged domain has one round."""
        own = self.domains[domain].generate
        rounds = {"most_samples": None, "wanted": 1} if self.domains[domain].judged else {}
        changed = {name: value for name in type(own).model_fields if (value := getattr(own, name)) is not None}
        return GenerateConfig.model_validate({**dict(self.generate), **rounds, **changed})

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        for name in self.domains:
            try:
                longest = self.generation(name).max_tokens
            except ValidationError as error:
                message = error.errors()[0]["msg"].removeprefix("Value error, ")
                raise ValueError(f"domains.{name}.generate with generate: {message}") from None
            if longest > self.model.max_length and self.domains[name].generate.max_tokens:
                raise ValueError(f"domains.{name}.generate.max_tokens {longest} is above model.max_length "
                                 f"{self.model.max_length}")
        for path, shares in (("curate.quotas", self.curate.quotas),
                             ("curate.plain_thinking", self.curate.plain_thinking)):
            if unknown := set(shares) - set(self.domains):
                raise ValueError(f"{path} names {sorted(unknown)}, not among the domains {sorted(self.domains)}")
        for path, length in (("expert.rl.max_completion_length", self.expert.rl.max_completion_length),
                             ("rl.max_completion_length", self.rl.max_completion_length),
                             ("generate.max_tokens", self.generate.max_tokens),
                             ("evaluation.max_tokens", self.evaluation.max_tokens),
                             *(("preference.max_tokens", self.preference.max_tokens) for domain in
                               self.domains.values() if domain.judged == "principles")):
            if length > self.model.max_length:
                raise ValueError(f"{path} {length} is above model.max_length {self.model.max_length}")
        if self.engine.return_routes and not (self.rl.routing_replay or self.expert.rl.routing_replay):
            raise ValueError("engine.return_routes is for rl.routing_replay or expert.rl.routing_replay, and both are "
                             "false; set one, or leave engine.return_routes out")
        if self.model.source.type == "tiny" and not self.model.source.mtp_depth:
            for path, wanted in (("engine.draft", self.engine.draft), ("rl.mtp_lambda", self.rl.mtp_lambda),
                                 ("expert.rl.mtp_lambda", self.expert.rl.mtp_lambda)):
                if wanted:
                    raise ValueError(f"{path} {wanted} needs an MTP module; model.source.mtp_depth is 0")
        if self.model.source.type == "tiny":
            self._check_tiny_context(self.model.source.context_length)
        for path, train in (("base", self.base), ("expert.sft", self.expert.sft), ("sft", self.sft),
                            ("reward_model.train", self.reward_model.train)):
            parallel, source = train.parallel, self.model.source
            parts = parallel.processes if parallel.shard and parallel.expert > 1 else parallel.expert
            if source.type == "tiny" and source.routed_experts % parts:
                raise ValueError(f"{path}.parallel spreads experts over {parts} processes, which must divide "
                                 f"model.source.routed_experts {source.routed_experts}; lower expert or processes")
            if parallel.processes > 1 and self.model.precision == "fp8":
                raise ValueError(f"{path}.parallel.processes {parallel.processes} with model.precision fp8: FP8 "
                                 "products take whole weights; leave one of the two out")
        if self.model.source.type == "tiny" and self.model.dtype != "float32":
            raise ValueError(f"model.dtype must be float32 for a tiny model (got {self.model.dtype})")
        for path, rl in (("expert.rl", self.expert.rl), ("rl", self.rl)):
            if self.model.precision == "fp8" and rl.max_drift < FP8_DRIFT:
                raise ValueError(f"{path}.max_drift {rl.max_drift:g} is below what fp8 products drift; give at least "
                                 f"{FP8_DRIFT:g}, or model.precision dtype")
        if self.model.precision == "fp8" or self.model.dtype == "bfloat16":
            for path, train in (("base", self.base), ("expert.sft", self.expert.sft), ("sft", self.sft),
                                ("reward_model.train", self.reward_model.train)):
                if train.adam_beta2 > MOST_BETA2:
                    raise ValueError(f"{path}.adam_beta2 {train.adam_beta2:g} is more than BF16 moments hold; give at "
                                     f"most {MOST_BETA2:.4g}, or model.precision dtype and model.dtype float32")
        if self.model.dtype == "bfloat16" and self.engine.max_logprob_error < BFLOAT16_ERROR:
            raise ValueError(f"engine.max_logprob_error {self.engine.max_logprob_error:g} is below what bfloat16 can "
                             f"hold; give at least {BFLOAT16_ERROR:g}, or model.dtype float32")
        return self

    def _check_tiny_context(self, length: int | None) -> None:
        """A tiny base has a short context if and only if a section lengthens it, far enough for the rest of the run."""
        if (self.extend is None) != (length is None):
            raise ValueError("model.source.context_length and extend belong together: the one gives the tiny base a "
                             f"short context, the other lengthens it (got {length} and "
                             f"{'no section' if self.extend is None else 'a section'})")
        if self.extend is None or length is None:
            return
        reached = length * self.extend.yarn.factor
        if reached < self.model.max_length:
            raise ValueError(f"extend.yarn.factor {self.extend.yarn.factor} makes {reached} tokens of model.source."
                             f"context_length {length}, fewer than model.max_length {self.model.max_length}")
        for path, pack, most in (("base.pack_length", self.base.pack_length, length),
                                 *((f"extend.phases.{index}.pack_length", phase.pack_length, reached)
                                   for index, phase in enumerate(self.extend.phases))):
            if pack > most:
                raise ValueError(f"{path} {pack} is above the context of that model, {most}; lower it")
