"""A deterministic policy that adds two integers with a given skill: whole flows run on it in seconds.

A model is named "fake:0.4", or is a folder with `fake.json` ({"skill": 0.55}) such as `train_fake` leaves. What it
writes is decided by hashes of skill, prompt and seed, the same in every process, so that stored rows can be compared.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from math import log
from pathlib import Path
from typing import NamedTuple, Self

from models.engine import (
    Completion,
    EngineConfigurationError,
    EngineError,
    LocalModel,
    Message,
    Request,
    ScoredTokens,
    ScoreRequest,
)
from models.specs import Fake, Sampling

CHECKPOINT = "fake.json"
BEST_SKILL = 0.95
SLIPS = (  # (share of the completions that are not right, what is wrong)
    (0.50, "wrong sum"),
    (0.35, "no marker"),
    (0.08, "two answers"),
    (0.07, "truncated"),
)


YES, NO = frozenset({"Correct", "True", "Yes"}), frozenset({"Incorrect", "Wrong", "False", "No"})
_SHOWN = re.compile(r"(\d+) \+ (\d+)\?.*?(\d+)(?=\D*\Z)", re.DOTALL)  # a question for a sum, and the last number after


class FakeEngine:
    """An engine without a model; see `models.engine.Engine` for what its methods promise."""

    def __init__(self, settings: Fake) -> None:
        self._settings = settings
        self._skill: float | None = None
        self._generated = 0
        self._lock = threading.Lock()  # over _generated

    def start(self) -> None:
        """Nothing takes long here."""

    def use(self, model: LocalModel) -> None:
        """Write with this model's skill from now on."""
        self._skill = fake_skill(model.weights)

    def sample(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield a completion for each request, in their order."""
        skill = self._ready_skill()
        for request in requests:
            self._refuse_failing(request.messages)
            time.sleep(self._settings.seconds_per_request)
            with self._lock:
                self._generated += 1
            yield _completion(skill, request, sampling)

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[list[float]]:
        """One log-probability for each word of a continuation, between -3 and 0.

        Asked whether a sum is right, it judges with some skill: the words of `YES` and `NO` share nearly all chance.
        """
        skill, prompt = self._ready_skill(), _prompt(messages)
        self._refuse_failing(messages)
        if (shown := _shown_sum(prompt)) is not None and all(text in YES | NO for text in continuations):
            sure = _verdict(skill, prompt, right=shown)
            return [[log(0.98 * (sure if text in YES else 1 - sure))] for text in continuations]
        return [
            [-3 * _draw(skill, prompt, continuation, place) for place, _ in enumerate(continuation.split())]
            for continuation in continuations
        ]

    def score_all(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoredTokens]:
        """Yield each text's words as tokens, in the requests' order; nothing is too long here."""
        for request in requests:
            words = re.findall(r"\S+\s*", request.continuation)
            logprobs = self.score(request.messages, [request.continuation])[0]
            before = re.findall(r"\S+\s*", _prompt(request.messages)) if request.in_full else []
            known = [None, *(-3 * _draw(self._ready_skill(), word, place) for place, word in enumerate(before[1:]))]
            yield ScoredTokens(
                key=request.key,
                token_ids=[int(10_000 * _draw(word)) for word in [*before, *words]],
                texts=[*before, *words] if request.in_full else [],
                logprobs=[*known[: len(before)], *logprobs],
                greedy=[False] * len([*before, *words]),
                prompt_tokens=len(before),
                cut_tokens=0,
            )

    def generated(self) -> int:
        """Completions written since the engine was opened."""
        return self._generated

    def close(self) -> None:
        """Forget the model."""
        self._skill = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _ready_skill(self) -> float:
        if self._skill is None:
            raise EngineConfigurationError("the fake engine has no model to serve yet; call use(model) first")
        return self._skill

    def _refuse_failing(self, messages: Sequence[Message]) -> None:
        prompt = _prompt(messages)
        for text in self._settings.fail_prompts:
            if text in prompt:
                raise EngineError(f"the fake engine was told to die at prompts that contain {text!r}: {prompt!r}")


def is_fake(weights: str) -> bool:
    """Whether these weights are a fake model's."""
    return weights.startswith("fake:") or (Path(weights) / CHECKPOINT).is_file()


def fake_skill(weights: str) -> float:
    """The share of right completions of a fake model.

    Args:
        weights: "fake:<skill>", or a folder with fake.json.
    Raises:
        EngineConfigurationError: it is neither.
    """
    file = Path(weights) / CHECKPOINT
    try:
        named = weights.removeprefix("fake:")
        skill = float(json.loads(file.read_text())["skill"] if file.is_file() else named)
    except (ValueError, KeyError, TypeError) as error:
        raise EngineConfigurationError(
            f"{weights!r} is no fake model: expected 'fake:0.4' or a folder with {CHECKPOINT} such as "
            f'{{"skill": 0.55}}; found: {error}'
        ) from error
    if not 0 <= skill <= 1:
        raise EngineConfigurationError(f"the skill of fake model {weights!r} is {skill}; it must be between 0 and 1")
    return skill


def train_fake(weights: str, completions_correct_share: float, rows: int, output: Path) -> None:
    """Save the fake checkpoint that training would yield: more and better rows bring the skill closer to 0.95.

    Args:
        weights: the fake model that training starts from.
        completions_correct_share: share of the rows, in [0, 1], whose completion is right.
        output: a folder, made if it is not there.
    """
    skill = fake_skill(weights)
    learnt = (completions_correct_share - skill) * rows / (rows + 40)  # half of the way at 40 rows; bad rows do harm
    output.mkdir(parents=True, exist_ok=True)
    trained = {"skill": round(max(0.0, min(BEST_SKILL, skill + learnt)), 6)}
    (output / CHECKPOINT).write_text(json.dumps(trained) + "\n", encoding="utf-8")


class _Sum(NamedTuple):
    left: int
    right: int


def _completion(skill: float, request: Request, sampling: Sampling) -> Completion:
    prompt = _prompt(request.messages)
    seed = request.seed if sampling.temperature > 0 else "greedy"
    right = _draw(skill, prompt, seed, "right") < skill
    text, reason = _written(_asked(prompt), "" if right else _slip(skill, prompt, seed), _draw(prompt, seed, "wrong"))
    words = re.findall(r"\S+\s*", text)
    if len(words) > sampling.max_completion_tokens:
        text, reason = "".join(words[: sampling.max_completion_tokens]), "length"
    for stop in sampling.stop:
        text = text.split(stop)[0]
    tokens = min(len(words), sampling.max_completion_tokens)
    return Completion(
        key=request.key,
        text=text,
        prompt_tokens=len(prompt.split()),
        completion_tokens=tokens,
        finish_reason=reason,
        cumulative_logprob=-tokens * ((0.1 if right else 0.4) + 0.2 * _draw(skill, prompt, seed, "logprob")),
    )


def _slip(skill: float, prompt: str, seed: int | str) -> str:
    draw = _draw(skill, prompt, seed, "slip")
    for share, slip in SLIPS:
        if draw < share:
            return slip
        draw -= share
    return SLIPS[0][1]


def _written(asked: _Sum | None, slip: str, draw: float) -> tuple[str, str]:
    """(text, finish reason); `draw` in [0, 1) says how far off a wrong sum is."""
    if asked is None:
        return "I do not know.\nFINAL ANSWER: unknown", "stop"
    step, total = f"{asked.left} + {asked.right} = ", asked.left + asked.right
    wrong = total + 1 + int(9 * draw)
    texts = {
        "": f"{step}{total}\nFINAL ANSWER: {total}",
        "wrong sum": f"{step}{wrong}\nFINAL ANSWER: {wrong}",
        "no marker": f"{step}{total}\nSo it is {total}.",
        "two answers": f"{step}{total}\nFINAL ANSWER: {total}\nFINAL ANSWER: {wrong}",
        "truncated": f"{step}{total}\nFINAL",
    }
    return texts[slip], "length" if slip == "truncated" else "stop"


def _asked(prompt: str) -> _Sum | None:
    """The last two integers of the prompt: few-shot examples come before the question."""
    numbers = [int(number) for number in re.findall(r"\d+", prompt)]
    return _Sum(numbers[-2], numbers[-1]) if len(numbers) >= 2 else None


def _shown_sum(prompt: str) -> bool | None:
    """Whether the last number shown is the sum asked for; None: no such thing is shown."""
    found = _SHOWN.search(prompt)
    return None if found is None else int(found[1]) + int(found[2]) == int(found[3])


def _verdict(skill: float, prompt: str, *, right: bool) -> float:
    """The chance of a positive label: on the right side more often, the higher the skill."""
    sees_it = _draw(skill, prompt, "judge") < 0.6 + 0.4 * skill
    sure = 0.5 + 0.49 * _draw(skill, prompt, "sure")
    return sure if right is sees_it else 1 - sure


def _prompt(messages: Sequence[Message]) -> str:
    return "\n".join(message["content"] for message in messages)


def _draw(*parts: object) -> float:
    """A number in [0, 1) that looks random and is the same wherever it is asked for."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big") / 2**56
