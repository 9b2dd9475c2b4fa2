"""Any OpenAI-compatible endpoints, several at once: `vllm serve` on other machines, or a hosted model as judge.

Requests go to the least loaded endpoint and are tried again, with growing pauses, where that may help. An endpoint that
keeps failing is dropped and its requests move on. The server applies its own chat template to the messages.
"""

import asyncio
import itertools
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from queue import SimpleQueue
from typing import Any, Self, TypeVar

import httpx

from models.engine import (
    PLAIN,
    Completion,
    EngineConfigurationError,
    EngineError,
    LocalModel,
    Message,
    Request,
    ScoredTokens,
    ScoreRequest,
)
from models.openai_adapters import introduce
from models.openai_scores import among_likeliest, behind_prompt
from models.specs import OpenAI, Sampling

Body = dict[str, Any]  # a JSON object of the protocol
R = TypeVar("R")
T = TypeVar("T")

logger = logging.getLogger("ratchet.openai")

FIRST_PAUSE_SECONDS = 0.5  # doubles with each try
LONGEST_PAUSE_SECONDS = 60.0
FINISHED = {"stop": "stop", "eos": "stop", "length": "length", "content_filter": "length"}  # cut short by either


class _Retry(Exception):
    """This try failed and another may not.

    Args:
        wait_seconds: what the server asked for, if it did.
        counts: whether it tells against the endpoint; being asked to slow down does not.
    """

    def __init__(self, reason: str, *, wait_seconds: float | None = None, counts: bool = True) -> None:
        super().__init__(reason)
        self.wait_seconds = wait_seconds
        self.counts = counts


@dataclass
class _Endpoint:
    url: str
    in_flight: int = 0
    failing: bool = False  # its latest reply was a failure
    succeeded_at: float = 0.0  # time.monotonic()
    last_failure: str = ""
    dead: bool = False
    names: dict[LocalModel, str] = field(default_factory=dict)  # what it serves of ours


class OpenAIEngine:
    """An engine behind HTTP; see `models.engine.Engine` for what its methods promise."""

    def __init__(self, settings: OpenAI) -> None:
        self._settings = settings
        self._model: LocalModel | None = None
        self._endpoints = [_Endpoint(url.rstrip("/")) for url in settings.endpoints]
        self._pool: _Pool | None = None
        self._lock = threading.Lock()  # over _pool and _generated
        self._generated = 0

    def start(self) -> None:
        """Nothing takes long here."""

    def use(self, model: LocalModel) -> None:
        """Ask for the model by its name from now on, and give dropped endpoints another chance."""
        if model.ref.digest is not None and not self._settings.loads_adapters:
            raise EngineConfigurationError(
                f"model {model.ref.name!r} is a folder here, and an endpoint serves what it was started with; "
                "sample it with engine.kind: vllm, or see engine.loads_adapters"
            )
        if model.ref.chat_template is not None or (model.adapter is not None and not self._settings.loads_adapters):
            raise EngineConfigurationError(
                f"model {model.ref.name!r} comes with a chat template or an adapter of its own, but an endpoint serves "
                "what it was started with; start the server with them and remove them from the preset"
            )
        self._model = model
        self._revive()

    def sample(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield each completion as it arrives. A request that fails is raised once the others are through."""
        for completion in self._all(requests, lambda pool, request: self._drawn(pool, request, sampling)):
            with self._lock:
                self._generated += 1
            yield completion

    def _all(self, requests: Iterable[R], work: Callable[["_Pool", R], Coroutine[Any, Any, T]]) -> Iterator[T]:
        """What comes of each request. One that fails is raised once the others are through."""
        pool, failure = self._ready_pool(), None
        replies: SimpleQueue[Future[T]] = SimpleQueue()
        waiting: set[Future[T]] = set()
        remaining = iter(requests)
        try:
            while True:
                room = 2 * self._settings.concurrency * len(self._endpoints) - len(waiting) if failure is None else 0
                for request in itertools.islice(remaining, room):
                    waiting.add(future := pool.submit(work(pool, request)))
                    future.add_done_callback(replies.put)
                if not waiting:
                    break
                waiting.remove(done := replies.get())
                if error := done.exception():
                    failure = failure or error
                    continue
                yield done.result()
        finally:
            for future in waiting:
                future.cancel()
        if failure is not None:
            raise failure

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[list[float]]:
        """Log-probabilities as `models.openai_scores` reads them from replies, by the way the settings name."""
        pool = self._ready_pool()
        if self._settings.scoring == "top_logprobs":
            return pool.submit(self._scored_by_first_token(pool, messages, continuations)).result()
        return pool.submit(self._scored_behind_prompt(pool, messages, continuations)).result()

    def score_all(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoredTokens]:
        """Yield each text as it is scored. The server renders and tokenises, so `rendering` and `cut` are its own."""
        return self._all(requests, self._told)

    def generated(self) -> int:
        """Completions received since the engine was opened."""
        return self._generated

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            if self._pool is not None:
                self._pool.close()
                self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _ready_pool(self) -> "_Pool":
        if self._model is None:
            raise EngineConfigurationError("the OpenAI engine has no model to ask for yet; call use(model) first")
        with self._lock:
            if all(endpoint.dead for endpoint in self._endpoints):
                self._revive()
            if self._pool is None:
                self._pool = _Pool(self._settings, self._endpoints)
            return self._pool

    def _revive(self) -> None:
        for endpoint in self._endpoints:
            endpoint.failing, endpoint.dead = False, False

    async def _drawn(self, pool: "_Pool", request: Request, sampling: Sampling) -> Completion:
        fields = _decoding(sampling) | ({"logprobs": True} if self._settings.logprobs else {})
        body = self._body(request.messages, seed=request.seed, n=1, **fields)
        choice, answer = await pool.post("/chat/completions", body)
        logprobs = [token["logprob"] for token in (choice.get("logprobs") or {}).get("content") or []]
        usage = answer.get("usage") or {}
        if "completion_tokens" not in usage and not logprobs:
            raise EngineConfigurationError(
                f"the endpoint reports neither usage nor logprobs for {request.key!r}, so its tokens cannot be "
                "counted; use a server that reports usage"
            )
        return Completion(
            key=request.key,
            text=choice["message"].get("content") or "",
            prompt_tokens=usage.get("prompt_tokens", 0),  # unknown to a server that reports logprobs only
            completion_tokens=usage.get("completion_tokens", len(logprobs)),
            finish_reason=FINISHED[choice["finish_reason"]],
            cumulative_logprob=sum(logprobs) if logprobs else None,
        )

    async def _scored_behind_prompt(
        self, pool: "_Pool", messages: Sequence[Message], continuations: Sequence[str]
    ) -> list[list[float]]:
        one = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}

        async def reply(body: Body) -> Body:
            return (await pool.post("/chat/completions", body))[1]

        bodies = [self._body(messages, **one)]
        for text in filter(None, continuations):
            more = [*messages, {"role": "assistant", "content": text}]
            bodies.append(self._body(more, add_generation_prompt=False, continue_final_message=True, **one))
        opened, *scored = await asyncio.gather(*map(reply, bodies))
        remaining = iter(scored)
        return [behind_prompt(opened, next(remaining)) if text else [] for text in continuations]

    async def _scored_by_first_token(
        self, pool: "_Pool", messages: Sequence[Message], continuations: Sequence[str]
    ) -> list[list[float]]:
        wanted = self._settings.top_logprobs  # at temperature 1, where nobody can have scaled them
        body = self._body(messages, max_tokens=1, temperature=1.0, logprobs=True, top_logprobs=wanted)
        choice, _ = await pool.post("/chat/completions", body)
        return among_likeliest(choice, continuations, wanted)

    async def _told(self, pool: "_Pool", request: ScoreRequest) -> ScoredTokens:
        one = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        _, opened = await pool.post("/chat/completions", self._body(request.messages, **one))
        more = [*request.messages, {"role": "assistant", "content": request.continuation}]
        ending = {"add_generation_prompt": False, "continue_final_message": request.rendering != "finished"}
        _, scored = await pool.post("/chat/completions", self._body(more, **ending, **one))
        behind_prompt(opened, scored)  # or a clear no
        first, places = opened["prompt_logprobs"], scored["prompt_logprobs"]
        told = [next(iter((place or {"-1": {}}).items())) for place in places[0 if request.in_full else len(first) :]]
        return ScoredTokens(
            key=request.key,
            token_ids=[int(token) for token, _ in told],
            texts=[known.get("decoded_token") or "" for _, known in told] if request.in_full else [],
            logprobs=[known.get("logprob") for _, known in told],
            greedy=[known.get("rank") == 1 for _, known in told],
            prompt_tokens=len(first) if request.in_full else 0,
            cut_tokens=0,
        )

    def _body(self, messages: Sequence[Message], **fields: object) -> Body:
        assert self._model is not None
        if any(message["role"] == PLAIN for message in messages):
            raise EngineConfigurationError(
                "an endpoint puts its own chat template around every text; give it chat messages, or use "
                "engine.kind: vllm for texts without a template"
            )
        return {"model": self._model, "messages": list(messages), **fields}  # named as the endpoint knows it


class _Pool:
    """An event loop in a thread of its own, and the connections to the endpoints."""

    def __init__(self, settings: OpenAI, endpoints: Sequence[_Endpoint]) -> None:
        self._settings = settings
        self._endpoints = endpoints
        self._key = os.environ.get(settings.api_key_variable)
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=settings.timeout_seconds,
            limits=httpx.Limits(max_connections=None),
        )
        self._free = asyncio.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="ratchet-openai")
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run this in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        """Cancel what is under way and close the connections."""
        self.submit(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def post(self, path: str, body: Body) -> tuple[Body, Body]:
        """(first choice, whole answer) of the first try that works.

        Raises:
            EngineError: every try failed, or no endpoint is left.
            EngineConfigurationError: the server refuses the request.
        """
        began: dict[str, float] = {}  # by endpoint: when this request was first put to it
        tries: Counter[str] = Counter()
        while True:
            endpoint = await self._least_loaded()
            began.setdefault(endpoint.url, time.monotonic())
            tries[endpoint.url] += 1
            try:
                answer = await self._try(endpoint, path, body | {"model": await self._name_at(endpoint, body["model"])})
            except _Retry as failed:
                endpoint.failing, endpoint.last_failure = True, str(failed)
                if tries[endpoint.url] > self._settings.max_retries:
                    self._give_up(endpoint, failed, since=began[endpoint.url])
                    continue
                pause = _pause(tries[endpoint.url], failed.wait_seconds)
            else:
                endpoint.failing, endpoint.succeeded_at = False, time.monotonic()
                return answer
            finally:
                await self._give_back(endpoint)
            await asyncio.sleep(pause)

    async def _name_at(self, endpoint: _Endpoint, model: LocalModel) -> str:
        if not self._settings.loads_adapters:
            return model.ref.name
        if model not in endpoint.names:
            endpoint.names[model] = await introduce(model, endpoint.url, self._ask)
        return endpoint.names[model]

    async def _ask(self, method: str, url: str, body: Body | None) -> httpx.Response:
        try:
            reply = await self._client.request(method, url, json=body)
        except httpx.TransportError as error:  # no connection, time-out, body cut short
            raise _Retry(f"{type(error).__name__} {error}") from error
        if reply.status_code >= 500:
            asked = _seconds(reply.headers.get("retry-after"))
            raise _Retry(f"HTTP {reply.status_code}: {self._said(reply)}", wait_seconds=asked)
        return reply

    async def _try(self, endpoint: _Endpoint, path: str, body: Body) -> tuple[Body, Body]:
        url = endpoint.url + path
        reply = await self._ask("POST", url, body)
        if reply.status_code == 404 and endpoint.names:
            endpoint.names.clear()  # it was started again, and has to be told once more
            raise _Retry(f"HTTP 404: {self._said(reply)}")
        if reply.status_code in (408, 429):
            asked = _seconds(reply.headers.get("retry-after"))
            raise _Retry(f"HTTP {reply.status_code}: {self._said(reply)}", wait_seconds=asked, counts=False)
        if reply.status_code != 200:
            raise EngineConfigurationError(
                f"{url} refuses requests for model {body['model']!r} with HTTP {reply.status_code}: {self._said(reply)}"
            )
        return _read(reply)

    def _said(self, reply: httpx.Response) -> str:
        """What a server says of a failure, for an error message: these are kept, and some servers quote the key."""
        return (reply.text.replace(self._key, "[api key]") if self._key else reply.text)[:500]

    async def _least_loaded(self) -> _Endpoint:
        """An endpoint with room, now taken; those that failed last are the last choice."""
        async with self._free:
            while True:
                alive = [endpoint for endpoint in self._endpoints if not endpoint.dead]
                if not alive:
                    failures = "; ".join(f"{endpoint.url}: {endpoint.last_failure}" for endpoint in self._endpoints)
                    raise EngineError(f"no endpoint is left, each failed several times in a row: {failures}")
                free = [endpoint for endpoint in alive if endpoint.in_flight < self._settings.concurrency]
                if free:
                    chosen = min(free, key=lambda endpoint: (endpoint.failing, endpoint.in_flight))
                    chosen.in_flight += 1
                    return chosen
                await self._free.wait()

    async def _give_back(self, endpoint: _Endpoint) -> None:
        async with self._free:
            endpoint.in_flight -= 1
            self._free.notify_all()

    def _give_up(self, endpoint: _Endpoint, failed: _Retry, *, since: float) -> None:
        """Drop the endpoint if nothing has worked there since this request was first put to it.

        Raises:
            EngineError: other requests did work there, so it is this one that fails.
        """
        if not failed.counts or endpoint.succeeded_at > since:
            raise EngineError(
                f"{endpoint.url} failed {self._settings.max_retries + 1} times for one request, at last with: "
                f"{failed}; see the server's log, or raise engine.max_retries or engine.timeout_seconds"
            ) from failed
        if not endpoint.dead:
            endpoint.dead = True
            logger.warning("dropped endpoint %s, where nothing works any more: %s", endpoint.url, failed)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()


def _decoding(sampling: Sampling) -> Body:
    """Fields of the request; `top_k` and `stop` only where they say something, since many servers refuse top_k."""
    fields: Body = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_completion_tokens,
    }
    if sampling.top_k > 0:
        fields["top_k"] = sampling.top_k
    if sampling.stop:
        fields["stop"] = list(sampling.stop)
    return fields


def _read(reply: httpx.Response) -> tuple[Body, Body]:
    """(first choice, whole answer), if the answer is complete."""
    try:
        answer: Body = reply.json()
        choice: Body = answer["choices"][0]
        if not isinstance(choice["message"], dict) or choice["finish_reason"] not in FINISHED:
            raise ValueError(f"finish_reason {choice['finish_reason']!r}")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Retry(f"no complete choice in the reply ({type(error).__name__}: {error}): {reply.text:.200}") from error
    return choice, answer


def _pause(tries: int, asked: float | None) -> float:
    """Seconds until the next try: what the server asked for, or twice as long each time, a little spread out."""
    pause: float = FIRST_PAUSE_SECONDS * 2.0 ** (tries - 1) * random.uniform(0.8, 1.2) if asked is None else asked
    return min(pause, LONGEST_PAUSE_SECONDS)


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for: a number of seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        moment: datetime = parsedate_to_datetime(retry_after)
    except ValueError:
        return None
    return max(0.0, (moment - datetime.now(UTC)).total_seconds()) if moment.tzinfo else None
