"""What an engine is: samples completions for chat messages, and scores given continuations.

An engine is opened once and kept warm; `use` changes the policy under it. All calls are safe from several threads, so
that shards share one engine and its batch stays full. Engines are context managers; leaving one closes it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, Self

from models.specs import VLLM, EngineSettings, ModelRef, OpenAI, Sampling, Scripted

Message = dict[str, str]  # {"role": ..., "content": ...}
PLAIN = "plain"  # the role of a single message that is put to the model as it is, without a chat template


class EngineError(RuntimeError):
    """The engine itself failed: it died, or an endpoint did not answer. Trying again may help."""


class EngineConfigurationError(ValueError):
    """The engine cannot run this model or these settings; trying again would not help."""


class UnknownProbability(EngineConfigurationError):
    """The engine cannot tell how likely a continuation is. That is not to say that it is unlikely.

    Args:
        found: the tokens whose probabilities it did tell.
    """

    def __init__(self, reason: str, *, found: Sequence[str] = ()) -> None:
        super().__init__(reason)
        self.found = tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A model and where its files are on this machine."""

    ref: ModelRef
    weights: str  # folder, or hub name
    adapter: str | None = None  # folder


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One rollout to draw."""

    key: str  # the caller's name for it, unique within a call of `sample`
    messages: tuple[Message, ...]
    seed: int
    cut_prompt: bool = False  # one that leaves no room loses its beginning; False: it is refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One rollout drawn."""

    key: str
    text: str  # without special tokens and without the stop string
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str  # "stop" or "length"
    cumulative_logprob: float | None
    cut_tokens: int = 0  # of the prompt's beginning, left out for want of room


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """One text whose tokens are to be scored."""

    key: str  # the caller's name for it, unique within a call of `score_all`
    messages: tuple[Message, ...]
    continuation: str
    rendering: Literal["apart", "joined", "finished"] = "apart"  # see models.chat.render_scored
    in_full: bool = False  # tell of the prompt's tokens too, and of each token's text
    cut: Literal["refuse", "left", "right"] = "refuse"  # what becomes of a text that is longer than the model takes


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredTokens:
    """Each token of one text, and how likely the model finds it after those before it."""

    key: str
    token_ids: list[int]
    texts: list[str]  # see models.chat.token_texts; empty unless told in full
    logprobs: list[float | None]  # natural; None: the very first token, which nothing comes before
    greedy: list[bool]  # whether no other token was likelier
    prompt_tokens: int  # of these tokens, the first ones are the prompt's; 0 unless told in full
    cut_tokens: int  # left out, as `cut` says


class Engine(Protocol):
    """A policy that can be sampled and scored."""

    def start(self) -> None:
        """Begin what takes long and needs no model yet (imports), and return at once. Calling it is never needed."""

    def use(self, model: LocalModel) -> None:
        """Serve this model from now on; cheap when it is already served. Call it with no request under way.

        It does not wait for a model to load: what is wrong with one may be raised by the next `sample` or `score`.

        Raises:
            EngineConfigurationError: the engine cannot serve this model.
        """

    def sample(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield each request's completion as it finishes, in any order; the requests are taken as needed.

        Raises:
            EngineError: the engine died or stopped answering; completions already yielded are good, and the next call
                starts it afresh.
            EngineConfigurationError: a request cannot be served, for instance because its prompt is too long.
        """

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[list[float]]:
        """Log-probabilities (natural) of each continuation's tokens after the rendered messages, without end of turn.

        Raises:
            EngineError: as in `sample`.
            EngineConfigurationError: as in `sample`, or the engine cannot score.
            UnknownProbability: it can, but not one of these continuations here.
        """

    def score_all(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoredTokens]:
        """Yield each text's tokens as they are scored, in any order; the requests are taken as needed.

        Raises:
            EngineError: as in `sample`.
            EngineConfigurationError: as in `sample`, or the engine cannot score; raised once the others are through.
        """

    def generated(self) -> int:
        """Rollouts this engine has drawn since it was opened."""

    def close(self) -> None:
        """End the engine and wait until its memory is given back; the next call of `use` starts it again."""

    def __enter__(self) -> Self:
        """The engine itself."""

    def __exit__(self, *raised: object) -> None:
        """Close it."""


def open_engine(settings: EngineSettings, ref: ModelRef | None) -> Engine:
    """An engine of this kind, not yet started.

    Args:
        ref: a model to `use` at once, whose name can be opened as it is (a hub name, a folder, "fake:..."); None: the
            caller finds the files and calls `use`.
    Raises:
        EngineConfigurationError: the model's name alone does not say where its files are.
    """
    engine = _engine_of(settings)
    if ref is not None:
        engine.use(LocalModel(ref=ref, weights=_openable_name(ref)))
    return engine


def _engine_of(settings: EngineSettings) -> Engine:
    if isinstance(settings, VLLM):
        from models.vllm_engine import VLLMEngine

        return VLLMEngine(settings)
    if isinstance(settings, OpenAI):
        from models.openai_engine import OpenAIEngine

        return OpenAIEngine(settings)
    if isinstance(settings, Scripted):
        from models.scripted_engine import ScriptedEngine

        return ScriptedEngine()
    from models.fake_engine import FakeEngine

    return FakeEngine(settings)


def _openable_name(ref: ModelRef) -> str:
    """The folder or name from which the model can be loaded as it is."""
    weights = ref.path or ref.name
    if ref.adapter is not None or (ref.digest is not None and not Path(weights).is_dir()):
        raise EngineConfigurationError(
            f"model {ref.identity!r} is a checkpoint in the home and {weights!r} only its label; open the engine "
            "with None and call use() with the folder of the checkpoint"
        )
    return weights
