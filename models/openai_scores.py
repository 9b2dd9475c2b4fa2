"""What the replies of an endpoint say about the log-probs of given continuations: exact, or a clear no.

Two ways, by `OpenAI.scoring`. prompt_logprobs, which `vllm serve` knows: exact for continuations of any length. The
reply to the messages, and the one to the messages with the continuation, both hold a log-prob for every prompt token.
top_logprobs, which hosted endpoints know: the likeliest first tokens of the reply, at most 20. A continuation that is
none of them, or is longer than one token, has an unknown probability, which is not zero.
"""

from collections.abc import Mapping, Sequence
from math import exp, log
from typing import Any

from models.engine import EngineConfigurationError, UnknownProbability

Body = Mapping[str, Any]  # a JSON object of the protocol


def behind_prompt(opened: Body, scored: Body) -> list[float]:
    """Log-probs of the tokens that the second reply's prompt has and the first one's has not.

    Raises:
        EngineConfigurationError: the endpoint does not tell, or does not render the messages alike both times.
    """
    first, places = opened.get("prompt_logprobs"), scored.get("prompt_logprobs")
    if not first or not places or len(places) <= len(first):
        raise EngineConfigurationError(
            "the endpoint cannot score: the reply was expected to hold prompt_logprobs for the prompt and its "
            f"continuation, found {places!r:.200}; score with a `vllm serve` endpoint or the vllm engine, or, labels "
            "of one token each, with engine.scoring: top_logprobs"
        )
    differ = next((n for n in range(1, len(first)) if list(first[n]) != list(places[n])), None)  # 0 has no log-prob
    if differ is not None:
        raise EngineConfigurationError(
            f"the endpoint cannot score: token {differ} of the prompt is {first[differ]!r:.100} when a reply is asked "
            f"for and {places[differ]!r:.100} before a given one, so the two are not of one text; give its server a "
            "chat template that ends its prompt in white space or a special token, and strips nothing"
        )
    return [next(iter(place.values()))["logprob"] for place in places[len(first) :]]


def among_likeliest(choice: Body, continuations: Sequence[str], asked_for: int) -> list[list[float]]:
    """The log-prob of each continuation as the reply's first token; white space around a token does not count.

    Raises:
        EngineConfigurationError: the endpoint reports no log-probs.
        UnknownProbability: a continuation is not among the tokens reported.
    """
    try:
        likeliest = choice["logprobs"]["content"][0]["top_logprobs"]
        reported = [(str(one["token"]), float(one["logprob"])) for one in likeliest]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise EngineConfigurationError(
            "the endpoint cannot score: the choice was expected to hold logprobs.content[0].top_logprobs, each with "
            f"token and logprob, found {choice.get('logprobs')!r:.200}; use an endpoint that returns log-probs"
        ) from error
    scores = []
    for text in continuations:
        chance = sum(exp(logprob) for token, logprob in reported if token.strip() == text.strip())
        if text and not chance:
            raise UnknownProbability(
                f"{text!r} is not among the {asked_for} likeliest first tokens, so its probability is not known",
                found=tuple(token for token, _ in reported),
            )
        scores.append([log(chance)] if text else [])
    return scores
