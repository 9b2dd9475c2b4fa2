"""The vLLM engine, seen from our side: one child process that is kept warm (models/vllm_server.py).

Parent and child speak JSON lines over the child's standard input and output. Each call (`use`, `sample`, `score`) has a
number; replies carry it, so that shards in several threads share one engine and its batch stays full. The child draws
every rollout as a request of its own, with its own seed, and reports it in the step in which it finishes.
"""

import dataclasses
import itertools
import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple, Self, TypeVar

from models.children import Child, environment
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
from models.specs import VLLM, Sampling
from models.vllm_server import Line, built_for_cpu

R = TypeVar("R", Request, ScoreRequest)

logger = logging.getLogger("ratchet.vllm")

PATIENCE_SECONDS = 20.0  # for a child to end by itself, and for an accelerator's memory to be given back
SPARE_MIB = 512  # accelerator memory that may differ from before the start
NOT_THE_SHAPE = ("_name_or_path", "transformers_version", "use_cache")  # keys of config.json that change nothing here


class VLLMEngine:
    """An engine in a child process; see `models.engine.Engine` for what its methods promise."""

    def __init__(self, settings: VLLM) -> None:
        self._settings = settings
        self._model: LocalModel | None = None
        self._link: _Link | None = None
        self._lock = threading.Lock()  # over _model, _link and _generated
        self._generated = 0

    def start(self) -> None:
        """Start the child, which then imports vLLM while the caller does something else."""
        with self._lock:
            self._living_link(offline=True)

    def use(self, model: LocalModel) -> None:
        """Serve this model: by swapping weights or adapter where the architecture is the same, else in a new child."""
        if model.adapter is not None and self._settings.max_lora_rank is None:
            raise EngineConfigurationError(
                f"model {model.ref.identity!r} has a LoRA adapter but the vLLM engine was opened without adapters; "
                "set engine.max_lora_rank to the adapter's rank, or train with lora.merge: true"
            )
        with self._lock:
            if model == self._model and self._link is not None and self._link.death is None:
                return
            if self._link is not None and self._model is not None and not _swappable(self._model, model):
                self._end_link()
            self._model = model
            self._living_link(offline=Path(model.weights).is_dir()).use(model)

    def sample(self, requests: Iterable[Request], sampling: Sampling) -> Iterator[Completion]:
        """Yield each completion in the step it finishes. A request that fails is raised once the others are through."""
        decoding = {"op": "sample", "sampling": sampling.model_dump(mode="json")}
        for key, outcome in self._asked(requests, decoding):
            with self._lock:
                self._generated += 1
            yield Completion(key=key, **outcome)

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[list[float]]:
        """Exact log-probabilities, from vLLM's prompt log-probabilities of the rendered messages and continuation."""
        requests = [
            ScoreRequest(key=str(number), messages=tuple(messages), continuation=text)
            for number, text in enumerate(continuations)
        ]
        found = {scored.key: scored.logprobs for scored in self.score_all(requests)}
        return [[value for value in found[request.key] if value is not None] for request in requests]

    def score_all(self, requests: Iterable[ScoreRequest]) -> Iterator[ScoredTokens]:
        """Exact log-probabilities, yielded in the step in which they are known."""
        for key, outcome in self._asked(requests, {"op": "score"}):
            yield ScoredTokens(key=key, **outcome)

    def _asked(self, requests: Iterable[R], asking: Line) -> Iterator[tuple[str, Line]]:
        """(key, what came of it) of each request. One that fails is raised once the others are through."""
        link, waiting, failure = self._ready_link(), dict[int, str](), None
        numbered = enumerate(requests)
        with link.call() as (call, replies):
            while True:
                room = 2 * self._settings.max_num_seqs - len(waiting) if failure is None else 0
                if batch := list(itertools.islice(numbered, room)):
                    waiting |= {number: request.key for number, request in batch}
                    link.send({**asking, "call": call, "requests": [_plain(*one) for one in batch]})
                if not waiting:
                    break
                for number, outcome in _outcomes(replies.get()):
                    key = waiting.pop(number)
                    if isinstance(outcome, str):
                        failure = failure or EngineConfigurationError(f"request {key!r}: {outcome}")
                        continue
                    yield key, outcome
        if failure is not None:
            raise failure

    def generated(self) -> int:
        """Rollouts drawn since the engine was opened, over all its children."""
        return self._generated

    def close(self) -> None:
        """End the child, and on an accelerator wait until its memory is free."""
        with self._lock:
            self._end_link()
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _ready_link(self) -> "_Link":
        """A living child that has loaded the model; a child that died is replaced."""
        with self._lock:
            if self._model is None:
                raise EngineConfigurationError("the vLLM engine has no model to serve yet; call use(model) first")
            link = self._living_link(offline=Path(self._model.weights).is_dir())
            if link.loading is None:
                link.use(self._model)
        link.wait_until_loaded()
        return link

    def _living_link(self, *, offline: bool) -> "_Link":
        if self._link is not None and (self._link.death is not None or (self._link.offline and not offline)):
            self._end_link()
        if self._link is None:
            self._link = _Link(self._settings, offline=offline)
        return self._link

    def _end_link(self) -> None:
        if self._link is not None:
            self._link.end()
            self._link = None


class _Loading(NamedTuple):
    call: int
    replies: "SimpleQueue[Line]"


class _Link:
    """One child's life: the pipes to it, and the calls that wait for its replies.

    Args:
        offline: no look at the Hugging Face hub; right when the weights are a folder.
    """

    def __init__(self, settings: VLLM, *, offline: bool) -> None:
        self.offline = offline
        self.death: str | None = None
        self.loading: _Loading | None = None  # the latest `use`, until somebody has waited for it
        self._waiting: dict[int, SimpleQueue[Line]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()  # over death and _waiting
        self._sending, self._loaded = threading.Lock(), threading.Lock()
        self._memory_before = _accelerator_memory()
        self._child = Child(
            ["-m", "models.vllm_server", settings.model_dump_json()],
            environment=environment(offline=offline, **_variables(settings)),
            on_line=lambda line: logger.info("%s", line),
            talks=True,
        )
        threading.Thread(target=self._read, daemon=True, name="ratchet-vllm-replies").start()

    def send(self, message: Line) -> None:
        """Send one message; if the child is dead, the calls that wait hear it from the reader."""
        pipe = self._child.process.stdin
        assert pipe is not None
        with self._sending:
            try:
                pipe.write(json.dumps(message).encode() + b"\n")
                pipe.flush()
            except (OSError, ValueError):  # broken, or closed by `end`
                logger.debug("the vLLM child is gone; a message to it was dropped")

    @contextmanager
    def call(self) -> Iterator[tuple[int, "SimpleQueue[Line]"]]:
        """A number for a call and the queue of its replies; requests left over at the end are aborted."""
        number, replies = self._open_call()
        try:
            yield number, replies
        finally:
            self._close_call(number)
            self.send({"op": "abort", "call": number})

    def use(self, model: LocalModel) -> None:
        """Have the child load or swap to this model, without waiting for it."""
        self.loading = _Loading(*self._open_call())
        fields = model.ref.model_dump(include={"revision", "digest", "chat_template", "trust_remote_code"})
        fields |= {"weights": model.weights, "adapter": model.adapter}
        self.send({"op": "use", "call": self.loading.call, "model": fields})

    def wait_until_loaded(self) -> None:
        """Wait for the latest `use`.

        Raises:
            EngineError, EngineConfigurationError: the child could not load the model; it is ended.
        """
        with self._loaded:
            assert self.loading is not None
            reply = self.loading.replies.get()
            self.loading.replies.put(reply)  # for the next thread that waits
        try:
            _checked(reply)
        except (EngineError, EngineConfigurationError):
            self._die(reply.get("death") or reply["error"])
            raise

    def end(self) -> None:
        """End the child and what it started, and wait until the accelerator's memory is free."""
        self._child.end(patience_seconds=PATIENCE_SECONDS)
        self._child.kill()  # workers of its own that outlived it
        deadline = time.monotonic() + PATIENCE_SECONDS
        while any(now > was + SPARE_MIB for was, now in zip(self._memory_before, _accelerator_memory(), strict=False)):
            if time.monotonic() > deadline:
                logger.warning("accelerator memory is still in use after the vLLM engine ended; is it another process?")
                return
            time.sleep(0.2)

    def _open_call(self) -> tuple[int, "SimpleQueue[Line]"]:
        replies: SimpleQueue[Line] = SimpleQueue()
        with self._lock:
            number = next(self._numbers)
            self._waiting[number] = replies
            if self.death is not None:
                replies.put({"death": self.death})
        return number, replies

    def _close_call(self, number: int) -> None:
        with self._lock:
            del self._waiting[number]

    def _read(self) -> None:
        """Hand each reply to the call that waits for it, until the child ends."""
        pipe = self._child.process.stdout
        assert pipe is not None
        for line in pipe:
            reply = json.loads(line)
            with self._lock:
                replies = self._waiting.get(reply["call"])
            if replies is not None:  # None: the caller left
                replies.put(reply)
        status = self._child.wait()
        self._die(f"the vLLM engine's process ended with status {status}; its last lines:\n{self._child.tail()}")

    def _die(self, death: str) -> None:
        with self._lock:
            self.death = self.death or death
            for replies in self._waiting.values():
                replies.put({"death": self.death})


def _checked(reply: Line) -> Line:
    """The reply, unless it says that the engine is dead or refuses the model."""
    if death := reply.get("death"):
        if "OutOfMemoryError" in death:
            raise EngineConfigurationError(f"{death}\nLower engine.max_num_seqs, max_model_len or the model's size.")
        raise EngineError(death)
    if error := reply.get("error"):
        raise (EngineConfigurationError if reply["configuration"] else EngineError)(error)
    return reply


def _outcomes(reply: Line) -> list[tuple[int, Line | str]]:
    """(number of the request in its call, what came out or what was wrong with it)."""
    return [(number, outcome) for number, outcome in _checked(reply)["outcomes"]]


def _plain(number: int, request: Request | ScoreRequest) -> list[Any]:
    if isinstance(request, Request):
        return [number, list(request.messages), request.seed, request.cut_prompt]
    return [number, {**dataclasses.asdict(request), "messages": list(request.messages)}]


def _variables(settings: VLLM) -> dict[str, str]:
    """Environment of the child; on a CPU the engine core runs in the child itself, which halves its start (TINY.md)."""
    variables = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO")}
    if not built_for_cpu():
        return variables
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) - 1)
    return variables | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "OMP_NUM_THREADS": str(threads),
        **({"TORCH_COMPILE_DISABLE": "1"} if settings.enforce_eager is not False else {}),
    }


def _accelerator_memory() -> list[int]:
    """MiB in use on each NVIDIA device of the machine; empty without one."""
    if built_for_cpu():
        return []
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [int(line) for line in answer.split() if line.isdigit()]


def _swappable(old: LocalModel, new: LocalModel) -> bool:
    """Whether a living engine can go from one model to the other: same architecture, tokenizer and stop tokens."""
    if old.ref.trust_remote_code != new.ref.trust_remote_code:
        return False
    if (old.weights, old.ref.revision) == (new.weights, new.ref.revision):
        return True
    if not (Path(old.weights).is_dir() and Path(new.weights).is_dir()):
        return False
    return _shape(Path(old.weights)) == _shape(Path(new.weights))


def _shape(folder: Path) -> tuple[object, ...]:
    """What must be equal for weights to be swapped; what trainers rewrite without effect is left out."""
    config, tokenizer = _json(folder / "config.json"), _json(folder / "tokenizer.json")
    settings = _json(folder / "generation_config.json")
    vocabularies = (
        [(folder / name) for name in ("tokenizer.model", "vocab.json", "merges.txt")] if not tokenizer else []
    )
    return (
        {name: value for name, value in config.items() if name not in NOT_THE_SHAPE},
        {name: value for name, value in tokenizer.items() if name not in ("padding", "truncation")},
        settings.get("eos_token_id"),
        [file.read_bytes() for file in vocabularies if file.exists()],
    )


def _json(file: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content
