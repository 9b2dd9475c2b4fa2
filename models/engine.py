"""What an engine is: samples completions for chat messages, and scores given continuations.

An engine is opened once and kept warm; `use` changes the policy under it. All calls are safe from several threads, so
that shards share one engine and its batch stays full.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from models.specs import ModelRef, Sampling

Message = dict[str, str]  # {"role": ..., "content": ...}


class EngineError(RuntimeError):
    """The engine itself failed: it died, or an endpoint did not answer. Trying again may help."""


class EngineConfigurationError(ValueError):
    """The engine cannot run this model or these settings; trying again would not help."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One rollout drawn."""

    key: str
    text: str  # without special tokens and without the stop string
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str  # "stop" or "length"
    cumulative_logprob: float | None


class Engine(Protocol):
    """A policy that can be sampled and scored."""

    def use(self, model: LocalModel) -> None:
        """Serve this model from now on; cheap when it is already served. Call it with no request under way."""

    def sample(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield each request's completion as it finishes, in any order.

        Raises:
            EngineError: the engine died or stopped answering; completions already yielded are good.
        """

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[list[float]]:
        """Log-probabilities (natural) of each continuation's tokens after the rendered messages."""

    def generated(self) -> int:
        """Rollouts this engine has drawn since it was opened."""

    def close(self) -> None:
        """End the engine and wait until its memory is given back."""
