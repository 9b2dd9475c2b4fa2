"""An engine that answers from a script, for demos and tests: what a supervisor would have written, written beforehand.

A script is YAML:

    rules:
      - when: ['write a function', 'Begin with the word (?P<first>\\w+)']   # each is found in the last message
        replies: ["...$first...", "..."]                                    # one is drawn by the request's seed
        choices: {last: [Done, Bye]}                                        # more values for `$names`, drawn as well

The first rule that fits answers. `$first` is what the group of that name found; `$$` is a dollar sign.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from models.engine import (
    Completion,
    EngineConfigurationError,
    LocalModel,
    Message,
    Request,
    ScoredTokens,
    ScoreRequest,
)
from models.specs import Sampling

CANNOT_SCORE = "a scripted engine cannot score continuations; use engine.kind 'vllm'"


class Rule(BaseModel):
    """When it answers, and with what."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    when: tuple[re.Pattern[str], ...]
    replies: tuple[str, ...] = Field(min_length=1)
    choices: dict[str, tuple[str, ...]] = {}

    @field_validator("when", mode="after")
    @classmethod
    def _can_be_found_over_lines(cls, when: tuple[re.Pattern[str], ...]) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(pattern.pattern, re.DOTALL) for pattern in when)

    def answer(self, prompt: str, seed: int) -> str | None:
        """The reply drawn by this seed; None: the rule is about something else."""
        found = [pattern.search(prompt) for pattern in self.when]
        values = {name: value for match in found if match for name, value in match.groupdict("").items()}
        if not all(found):
            return None
        rng = random.Random(seed)
        reply = rng.choice(self.replies)
        return Template(reply).substitute(
            values | {name: rng.choice(options) for name, options in self.choices.items()}
        )


class Script(BaseModel):
    """The rules, in order."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rules: tuple[Rule, ...] = Field(min_length=1)


class ScriptedEngine:
    """An engine without a model; see `models.engine.Engine` for what its methods promise."""

    def __init__(self) -> None:
        self._scripts: dict[str, Script] = {}
        self._weights = ""
        self._generated = 0

    def start(self) -> None:
        """Nothing takes long here."""

    def use(self, model: LocalModel) -> None:
        """Answer from this file from now on."""
        if model.weights not in self._scripts:
            self._scripts[model.weights] = read_script(model.weights)
        self._weights = model.weights

    def sample(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield a completion for each request, in their order."""
        script = self._scripts[self._weights]
        for request in requests:
            self._generated += 1
            yield _completion(script, self._weights, request, sampling)

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[list[float]]:
        """A script has no probabilities."""
        raise EngineConfigurationError(CANNOT_SCORE)

    def score_all(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoredTokens]:
        """A script has no probabilities."""
        raise EngineConfigurationError(CANNOT_SCORE)

    def generated(self) -> int:
        """Completions written since the engine was opened."""
        return self._generated

    def close(self) -> None:
        """Forget the scripts."""
        self._scripts.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def read_script(file: str) -> Script:
    """The rules of a script.

    Raises:
        EngineConfigurationError: the file is not there or no script.
    """
    try:
        content: Any = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        return Script.model_validate(content)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise EngineConfigurationError(f"the script {file!r} cannot be read: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise EngineConfigurationError(
            f"{file!r} is no script: {where}: {first['msg']}; expected `rules`, each with `when` and `replies`"
        ) from error


def _completion(script: Script, file: str, request: Request, sampling: Sampling) -> Completion:
    prompt = request.messages[-1]["content"]
    seed = request.seed if sampling.temperature > 0 else 0
    try:
        text = next((reply for rule in script.rules if (reply := rule.answer(prompt, seed)) is not None), None)
    except (KeyError, ValueError) as error:
        raise EngineConfigurationError(
            f"a reply of the script {file!r} holds a $name that its rule neither finds nor chooses ({error}); "
            "write $$ for a dollar sign"
        ) from error
    if text is None:
        raise EngineConfigurationError(f"the script {file!r} has no rule for {prompt[-300:]!r}; add one")
    for stop in sampling.stop:
        text = text.split(stop)[0]
    words = re.findall(r"\s*\S+", text)
    cut = len(words) > sampling.max_completion_tokens
    return Completion(
        key=request.key,
        text="".join(words[: sampling.max_completion_tokens]) if cut else text,
        prompt_tokens=len(prompt.split()),
        completion_tokens=min(len(words), sampling.max_completion_tokens),
        finish_reason="length" if cut else "stop",
        cumulative_logprob=None,
    )
