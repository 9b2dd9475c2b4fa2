"""An engine of ours as lm-eval sees a model.

What lm-eval takes for a rendered prompt is the chat messages as JSON; the engine renders them (models/chat.py).
"""

import functools
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from models.chat import messages_of
from models.engine import PLAIN, Engine, EngineConfigurationError, Message, Request, ScoreRequest
from models.specs import PromptTemplate, Sampling

Told = Callable[[int, int], None]  # of progress: done, total


@functools.cache
def model_class() -> Any:  # a subclass of lm_eval's LM, which can only be made once lm-eval is imported
    from lm_eval.api.model import LM

    class EngineLM(LM):  # type: ignore[misc]  # LM is untyped here
        """An engine of ours as lm-eval sees a model."""

        tokenizer_name = "ratchet"  # the engine's own

        def __init__(
            self, engine: Engine, template: PromptTemplate | None, max_completion_tokens: int | None, tell: Told
        ) -> None:
            super().__init__()
            self._engine, self._template, self._tell = engine, template, tell
            self._max_completion_tokens = max_completion_tokens
            self.cut: dict[str, int] = {}  # by prompt: tokens left out of it

        def chat_template(self, chat_template: bool | str = False) -> str:
            """What lm-eval notes of the template; it never renders with it."""
            return "the engine's" if chat_template else ""

        def apply_chat_template(self, history: list[Message], add_generation_prompt: bool = True) -> str:
            """The messages as JSON, with the recipe's template in place; `read_prompt` is its reverse."""
            assert self._template is not None
            if not add_generation_prompt:
                raise EngineConfigurationError(
                    "this benchmark opens the assistant's turn itself, which is not done here"
                )
            return json.dumps(_templated(self._template, history))

        def read_prompt(self, context: str) -> tuple[Message, ...]:
            """The messages that lm-eval's context stands for."""
            if self._template is None:
                return ({"role": PLAIN, "content": context},)
            return tuple(json.loads(context))

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            """(log-probability of the continuation, whether it is what greedy decoding gives) for each request."""
            asked = [
                ScoreRequest(
                    key=str(number),
                    messages=self.read_prompt(request.args[0]),
                    continuation=request.args[1],
                    rendering="joined",
                    cut="left",
                )
                for number, request in enumerate(requests)
            ]
            found: dict[int, tuple[float, bool]] = {}
            for scored in self._engine.score_all(asked):
                number = int(scored.key)
                known = [value for value in scored.logprobs if value is not None]
                if not known:
                    raise EngineConfigurationError(
                        f"the continuation {asked[number].continuation!r} has no tokens of its own after its prompt, "
                        "so it cannot be scored; this benchmark cannot be run with this tokenizer"
                    )
                found[number] = (sum(known), all(scored.greedy))
                self._note(requests[number].args[0], scored.cut_tokens)
                self._tell(len(found), len(asked))
            return [found[number] for number in range(len(asked))]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            """The completion of each request, up to the first of its stop strings."""
            found: dict[int, str] = {}
            for sampling, numbers in self._by_decoding(requests).items():
                asked = [
                    Request(
                        key=str(number), messages=self.read_prompt(requests[number].args[0]), seed=0, cut_prompt=True
                    )
                    for number in numbers
                ]
                for completion in self._engine.sample(asked, sampling):
                    found[int(completion.key)] = _before(completion.text, sampling.stop)
                    self._note(requests[int(completion.key)].args[0], completion.cut_tokens)
                    self._tell(len(found), len(requests))
            return [found[number] for number in range(len(requests))]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            """No benchmark known here asks for the perplexity of whole texts."""
            raise EngineConfigurationError("this benchmark asks for perplexities, which no known one does")

        def _by_decoding(self, requests: Sequence[Any]) -> dict[Sampling, list[int]]:
            groups: dict[Sampling, list[int]] = defaultdict(list)
            for number, request in enumerate(requests):
                groups[_sampling(request.args[1], self._max_completion_tokens)].append(number)
            return groups

        def _note(self, context: str, cut_tokens: int) -> None:
            if cut_tokens:
                self.cut[context] = max(cut_tokens, self.cut.get(context, 0))

    return EngineLM


def _templated(template: PromptTemplate, history: Sequence[Message]) -> list[Message]:
    """The messages with the recipe's template around each user's, and its system message before the task's own."""
    messages: list[Message] = []
    system = [message["content"] for message in history if message["role"] == "system"]
    for message in history:
        if message["role"] == "user":
            *first, user = messages_of(template, message["content"])
            if not messages and (parts := [one["content"] for one in first] + system):
                messages.append({"role": "system", "content": "\n\n".join(parts)})
            messages.append(user)
        elif message["role"] != "system":
            messages.append(message)
    return messages


def _sampling(asked: Mapping[str, Any], max_completion_tokens: int | None) -> Sampling:
    """lm-eval's generation settings as ours.

    Raises:
        EngineConfigurationError: the task asks for anything but greedy decoding.
    """
    if asked.get("do_sample") or asked.get("temperature", 0.0) > 0:
        raise EngineConfigurationError(f"this benchmark is to be decoded greedily here, and it asks for {dict(asked)}")
    until = asked.get("until") or ()
    return Sampling(
        rollouts_per_prompt=1,
        temperature=0,
        top_k=-1,
        max_completion_tokens=max_completion_tokens or asked.get("max_gen_toks", 256),  # lm-eval's own default
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
    )


def _before(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        text = text.split(stop)[0]
    return text
