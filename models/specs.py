"""Settings of models: which one, how it is sampled, how it is trained. Frozen; a misspelt key is an error.

`Settings.key()` is what a cache key sees: only what can change a result. How the work is split over shards, devices
or processes is left out.
"""

from typing import Annotated, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Settings(BaseModel):
    """Base of all settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)
    not_in_key: ClassVar[frozenset[str]] = frozenset()

    def key(self) -> dict[str, Any]:
        """The settings that can change a result, as plain JSON."""
        fields = {name: getattr(self, name) for name in type(self).model_fields if name not in self.not_in_key}
        return {name: _plain(value) for name, value in fields.items()}


def _plain(value: Any) -> Any:  # a settings tree holds JSON values and other Settings
    if isinstance(value, Settings):
        return value.key()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return value


class ModelRef(Settings):
    """A model: a hub name with a pinned revision, a local folder, or a checkpoint in the home by its digest."""

    name: str  # hub name, folder, "fake:<skill>" or, for a checkpoint, a label to read
    revision: str | None = None  # hub commit
    digest: str | None = None  # content digest; set for checkpoints and, when opened, for local folders
    adapter: str | None = None  # digest of a LoRA adapter in the home, on top of the weights above
    path: str | None = None  # where a local folder lies; its digest is what counts
    chat_template: str | None = None  # Jinja; None: the tokenizer's own
    trust_remote_code: bool = False

    def key(self) -> dict[str, Any]:
        """Identity by content where there is a digest, by name and revision otherwise."""
        weights = {"digest": self.digest} if self.digest else {"name": self.name, "revision": self.revision}
        return {**weights, "adapter": self.adapter, "chat_template": self.chat_template}

    @property
    def identity(self) -> str:
        """One line that names the model by content, as stored in the `policy` column."""
        weights = self.digest or f"{self.name}@{self.revision or 'unpinned'}"
        return f"{weights}+{self.adapter}" if self.adapter else weights


class PromptTemplate(Settings):
    """How a prompt becomes chat messages. `$prompt` is replaced; `$$` is a dollar sign (string.Template)."""

    system: str | None = None
    user: str = "$prompt"

    @model_validator(mode="after")
    def _has_place_for_the_prompt(self) -> "PromptTemplate":
        if "$prompt" not in self.user and "${prompt}" not in self.user:
            raise ValueError(f"the user template holds no $prompt, so every prompt would look the same: {self.user!r}")
        return self


class Sampling(Settings):
    """How a policy is sampled. Defaults are seed 0's data generation (METHODS 2.2)."""

    not_in_key = frozenset({"prompts_per_shard", "maximum_error_rate"})

    rollouts_per_prompt: int = Field(default=16, ge=1)
    temperature: float = Field(default=0.7, ge=0)
    top_k: int = Field(default=40, ge=-1)  # -1: all tokens
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_completion_tokens: int = Field(default=384, ge=1)
    stop: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    prompts_per_shard: int = Field(default=256, ge=1)
    maximum_error_rate: float = Field(default=0.02, ge=0, le=1)  # share of the rollouts the engine may fail to draw

    def for_iteration(self, iteration: int) -> Self:
        """The same settings with a seed of this iteration's own."""
        return self.model_copy(update={"seed": self.seed + iteration})

    def decoding(self) -> dict[str, Any]:
        """What decides how one rollout is drawn, given its own seed: the ledger's key, free of how many are wanted."""
        return {name: value for name, value in self.key().items() if name != "rollouts_per_prompt"}


class Adaptive(Settings):
    """Rollouts in passes: a prompt that has enough is done, and the others get what is left of the budget.

    The budget is `rollouts_per_prompt` for each prompt, on average. The stopping rule is Reinforce-Ada's "balanced" one
    (Xiong et al. 2025, arXiv:2510.04996), for data instead of gradients; these figures are ours.
    """

    first: int = Field(default=4, ge=1)  # rollouts that every prompt gets
    more: int = Field(default=4, ge=1)  # that a prompt which lacks some gets in each later pass
    wanted_correct: int = Field(default=2, ge=0)  # different texts; undecided rollouts are of neither kind
    wanted_incorrect: int = Field(default=2, ge=0)
    cap: int | None = Field(default=None, ge=1)  # the most of one prompt; None: rollouts_per_prompt

    @model_validator(mode="after")
    def _wants_some(self) -> "Adaptive":
        if not self.wanted_correct + self.wanted_incorrect:
            raise ValueError("wanted_correct and wanted_incorrect are both 0, so no prompt lacks any; raise one")
        return self


class AnswerSampling(Sampling):
    """Sampling of training prompts that have gold answers. Evaluation cannot be adaptive: it would be biased."""

    adaptive: Adaptive | None = None  # None: rollouts_per_prompt of each

    @model_validator(mode="after")
    def _can_be_met(self) -> "AnswerSampling":
        if (adaptive := self.adaptive) is None:
            return self
        if adaptive.first > self.rollouts_per_prompt:
            raise ValueError(
                f"adaptive.first is {adaptive.first} but rollouts_per_prompt, which is what prompts get on average, "
                f"{self.rollouts_per_prompt}; lower the first or raise the second"
            )
        least = max(adaptive.first, adaptive.wanted_correct + adaptive.wanted_incorrect)
        if self.cap < least:
            raise ValueError(
                f"a prompt may get {self.cap} rollouts (adaptive.cap, else rollouts_per_prompt), but {least} are "
                "needed for adaptive.first and for what is wanted; raise adaptive.cap"
            )
        return self

    @property
    def cap(self) -> int:
        """The most rollouts of one prompt."""
        return (self.adaptive.cap if self.adaptive is not None else None) or self.rollouts_per_prompt

    @property
    def first(self) -> int:
        """The rollouts that every prompt gets, whatever comes of them."""
        return self.rollouts_per_prompt if self.adaptive is None else self.adaptive.first

    @property
    def plain(self) -> Sampling:
        """The same without adaptation: as many rollouts of each prompt."""
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})

    def key(self) -> dict[str, Any]:
        """Of plain sampling where nothing is adapted, so that what was drawn before stays good."""
        return {name: value for name, value in super().key().items() if name != "adaptive" or value is not None}

    def decoding(self) -> dict[str, Any]:
        """That of plain sampling: both draw the same rollouts, only not as many."""
        return self.plain.decoding()


class VLLM(Settings):
    """The vLLM engine on this machine, one child process of ours."""

    not_in_key = frozenset({"max_num_seqs", "gpu_memory_utilization", "kv_cache_gib", "enforce_eager", "threads"})

    kind: Literal["vllm"] = "vllm"
    max_model_len: int = Field(default=2048, ge=16)  # prompt and completion, tokens
    max_num_seqs: int = Field(default=256, ge=1)  # on a CPU, 512 and more are several times faster for tiny models
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    kv_cache_gib: int = Field(default=1, ge=1)  # CPU only
    enforce_eager: bool | None = None  # None: on a CPU only, where compiling takes longer than it saves
    max_lora_rank: int | None = None  # set: adapters are loaded into the live engine
    tensor_parallel_size: int = Field(default=1, ge=1)
    threads: int | None = Field(default=None, ge=1)  # CPU only; None: all but one core


class OpenAI(Settings):
    """OpenAI-compatible endpoints. The API key is read from the environment, never from a preset."""

    not_in_key = frozenset(
        {"endpoints", "concurrency", "timeout_seconds", "max_retries", "api_key_variable", "loads_adapters"}
    )

    kind: Literal["openai"] = "openai"
    endpoints: tuple[str, ...] = Field(min_length=1)  # base URLs, for instance http://10.0.0.7:8000/v1
    api_key_variable: str = "OPENAI_API_KEY"
    concurrency: int = Field(default=64, ge=1)  # requests in flight per endpoint
    timeout_seconds: float = Field(default=600.0, gt=0)
    max_retries: int = Field(default=4, ge=0)
    logprobs: bool = True  # ask for them; False: for servers that refuse, cumulative_logprob is then unknown
    # how continuations are scored: exactly, by `vllm serve`; or, one token each, by what hosted endpoints report
    scoring: Literal["prompt_logprobs", "top_logprobs"] = "prompt_logprobs"
    top_logprobs: int = Field(default=20, ge=2, le=20)  # asked for in the latter case; others are unknown
    loads_adapters: bool = (
        False  # `vllm serve` with adapters of ours, and the home at the same path, see openai_adapters
    )

    def key(self) -> dict[str, Any]:
        """How continuations are scored only where it is not exact, so that ledgers drawn without a judge stay good."""
        unseen = {"scoring", "top_logprobs"} if self.scoring == "prompt_logprobs" else set()
        return {name: value for name, value in super().key().items() if name not in unseen}

    @field_validator("endpoints")
    @classmethod
    def _without_secrets(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for number, endpoint in enumerate(endpoints, start=1):
            if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).hostname:
                raise ValueError(f"endpoint {number} is {endpoint!r}, a URL was expected: http://10.0.0.7:8000/v1")
            if urlsplit(endpoint).username is not None or urlsplit(endpoint).query:
                raise ValueError(
                    f"endpoint {number} holds a user name or a query, and settings are kept on disk; give the URL "
                    "alone and put the key into the environment (api_key_variable)"
                )
        return endpoints


class Fake(Settings):
    """A deterministic engine without a model, for tests and smoke presets."""

    not_in_key = frozenset({"seconds_per_request", "fail_prompts"})

    kind: Literal["fake"] = "fake"
    seconds_per_request: float = Field(default=0.0, ge=0)
    fail_prompts: tuple[str, ...] = ()  # a prompt that contains one of these brings the engine down


class Scripted(Settings):
    """An engine that answers from a script, the file that its model names (models/scripted_engine.py)."""

    kind: Literal["scripted"] = "scripted"


EngineSettings = Annotated[VLLM | OpenAI | Fake | Scripted, Field(discriminator="kind")]


class LoRA(Settings):
    """Low-rank adapters. Defaults: METHODS 2.2, with the targets that were meant."""

    rank: int = Field(default=128, ge=1)
    alpha: int = Field(default=256, ge=1)
    dropout: float = Field(default=0.05, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "dense")
    merge: bool = True  # merged in fp32 into a full model; False: the policy is base and adapter

    @model_validator(mode="after")
    def _not_on_the_head(self) -> "LoRA":
        if "lm_head" in self.target_modules:
            raise ValueError("target_modules holds lm_head: TRL 1.16 refuses LoRA there (METHODS 7.1); remove it")
        return self


Schedule = Literal["cosine", "linear", "constant", "constant_with_warmup", "trapezoid"]


class Optimization(Settings):
    """What SFT and preference training share. The global batch is declared, accumulation is derived from it."""

    not_in_key = frozenset({"per_device_batch_size", "report_to", "save_steps", "accelerate_config", "threads"})

    learning_rate: float = Field(gt=0)
    global_batch_size: int = Field(ge=1)  # rows per optimizer step, over all devices
    per_device_batch_size: int | None = Field(default=None, ge=1)  # None: a whole batch, but packed on a CPU 1
    epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)  # optimizer steps; wins over epochs
    schedule: Schedule = "cosine"
    warmup_ratio: float = Field(default=0.05, ge=0, lt=1)  # share of optimizer steps
    decay_ratio: float = Field(default=0.4, gt=0, le=1)  # trapezoid only: share of optimizer steps at the end
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta2: float = Field(default=0.999, gt=0, lt=1)
    max_grad_norm: float = Field(default=1.0, gt=0)
    max_length: int = Field(default=1024, ge=8)  # tokens, prompt and completion; longer rows are dropped and counted
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    lora: LoRA | None = None
    seed: int = Field(default=42, ge=0)
    save_steps: int = Field(default=200, ge=1)  # a checkpoint to resume from, every so many optimizer steps
    report_to: tuple[Literal["trackio", "tensorboard", "wandb"], ...] = ()
    threads: int | None = Field(default=None, ge=1)  # CPU threads a process; with 1, equal runs give equal bytes
    accelerate_config: str | None = None  # a file of `accelerate config`; None: one process on this machine

    @model_validator(mode="after")
    def _batch_comes_out_even(self) -> "Optimization":
        if self.per_device_batch_size is not None and self.global_batch_size % self.per_device_batch_size:
            raise ValueError(
                f"per_device_batch_size is {self.per_device_batch_size}, which does not divide global_batch_size "
                f"{self.global_batch_size}; make the latter a multiple of it"
            )
        return self


class ChatTokens(Settings):
    """A chat format with special tokens; those that the model does not know get embeddings, which are trained."""

    template: str  # Jinja; becomes the policy's chat template
    tokens: tuple[str, ...] = Field(min_length=1)
    end: str  # the one that ends the assistant's turn; becomes the end of text

    @model_validator(mode="after")
    def _end_is_one_of_them(self) -> "ChatTokens":
        if self.end not in self.tokens:
            raise ValueError(f"end is {self.end!r}, which is none of the tokens {self.tokens!r}; add it to them")
        return self


class SFT(Optimization):
    """Supervised fine-tuning; the loss is on what the assistant writes only."""

    learning_rate: float = Field(default=2e-5, gt=0)
    global_batch_size: int = Field(default=16, ge=1)  # with packing: sequences of max_length
    packing: bool = False  # several rows in one sequence; refused where attention does not keep them apart
    embedding_noise: float | None = Field(default=None, gt=0)  # NEFTune's alpha
    chat_tokens: ChatTokens | None = None

    @model_validator(mode="after")
    def _new_tokens_are_merged(self) -> "SFT":
        if self.chat_tokens is not None and self.lora is not None and not self.lora.merge:
            raise ValueError("chat_tokens change the base's embeddings, which an adapter cannot; set lora.merge: true")
        return self


LossType = Literal["sigmoid", "sft", "apo_zero", "apo_down", "robust", "hinge"]


class LearnedScale(Settings):
    """A standard deviation for each token and logit, from the reference's last hidden state (DNPO).

    It is trained to shrink the margin that the policy is trained to widen. The paper gives none of these figures
    (METHODS 4.4): the defaults are ours.
    """

    bound: float = Field(default=1.0, gt=0)  # of the standard deviation
    penalty: float = Field(default=0.1, ge=0)  # times the mean variance, added to the loss
    learning_rate: float = Field(default=1e-3, gt=0)


class ReferenceNoise(Settings):
    """Gaussian noise on the reference's logits of the rejected side; the chosen side stays clean (DNPO)."""

    scale: float = Field(default=0.3, gt=0)  # standard deviation, in logits; where it starts if it is learned
    learned: LearnedScale | None = None
    below_margin: float | None = Field(default=None, gt=0)  # only pairs that a judge finds closer; None: all pairs

    @model_validator(mode="after")
    def _starts_within_its_bound(self) -> "ReferenceNoise":
        if self.learned is not None and self.scale >= self.learned.bound:
            raise ValueError(
                f"scale is {self.scale} and learned.bound {self.learned.bound}, so the scale could not start there; "
                "lower the first or raise the second"
            )
        return self


class Preference(Optimization):
    """Preference training with DPOTrainer."""

    learning_rate: float = Field(default=1e-6, gt=0)
    global_batch_size: int = Field(default=32, ge=1)
    loss_type: tuple[LossType, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    precompute_reference: bool = True
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    embedding_noise: float | None = Field(default=None, gt=0)  # NEFTune's alpha; on the policy only, see METHODS 7.4
    reference_noise: ReferenceNoise | None = None

    @model_validator(mode="after")
    def _a_weight_for_each_loss(self) -> "Preference":
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"{len(self.loss_weights)} loss_weights for {len(self.loss_type)} loss_type entries")
        if self.loss_weights is not None and (min(self.loss_weights) < 0 or not any(self.loss_weights)):
            raise ValueError(f"loss_weights are {self.loss_weights}; none may be below 0, and one is to be above it")
        return self

    @model_validator(mode="after")
    def _the_reference_stays_clean(self) -> "Preference":
        on_the_fly = not self.precompute_reference and self.reference_noise is None
        if self.embedding_noise is not None and self.lora is not None and on_the_fly:
            raise ValueError(
                "with embedding_noise and lora the reference is the same noisy model with its adapter off (METHODS "
                "7.4); set precompute_reference: true"
            )
        return self


class TinyTraining(SFT):
    """How a tiny model is trained from scratch. A class of its own, so that setting one field keeps the others."""

    learning_rate: float = Field(default=3e-3, gt=0)
    max_steps: int | None = Field(default=2000, ge=1)
    schedule: Schedule = "trapezoid"
    adam_beta2: float = Field(default=0.98, gt=0, lt=1)
    max_length: int = Field(default=256, ge=8)
    threads: int | None = Field(default=1, ge=1)


class TinyModel(Settings):
    """A small Phi model trained from scratch, for the demo and for tests (TINY.md)."""

    hidden_size: int = Field(default=64, ge=8)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=2, ge=1)
    vocabulary: int = Field(default=770, ge=64)  # BPE tokens at most
    context: int = Field(default=256, ge=32)  # tokens
    whole_numbers: int = Field(default=200, ge=0)  # 0 .. n-1 are single tokens
    training: TinyTraining = TinyTraining()
