"""The only module that knows lm-eval (0.4.13): its tasks and its scoring on an engine of ours.

lm-eval builds the prompts, reads the answers and scores them. What it takes for a rendered prompt is the chat messages
as JSON: an engine renders them like every other prompt (models/chat.py), so one rule holds for sampling, training and
benchmarks. Numbers equal those of lm-eval's own backends on the same weights (tests/models/test_harness.py).
"""

import atexit
import functools
import importlib.util
import json
import logging
import random
import shutil
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from models.chat import messages_of
from models.engine import PLAIN, Engine, EngineConfigurationError, Message, Request, ScoreRequest
from models.specs import PromptTemplate, Sampling

Records = list[Mapping[str, Any]]  # documents of one split
Told = Callable[[int, int], None]  # of progress: done, total

EXTRA = "install lm-eval with what IFEval needs: pip install 'ratchet-lm[evaluation]'"
FEWSHOT_SEED = 1234  # lm-eval's default
STAND_IN = "ratchet-sentences"
ABBREVIATIONS = (
    "a.m al approx apt ave capt co corp dept dr e.g est etc fig gen gov hon i.e inc jr lt ltd maj messrs mr mrs ms mt "
    "no p.m ph.d prof rep rev sen sgt sr st u.k u.n u.s vol vs"
)
_one_at_a_time = threading.Lock()  # what is set aside below, for the time of a benchmark, is the whole process's


class TaskToRun(NamedTuple):
    """One lm-eval task, and how it is to be run."""

    name: str
    folder: str  # in lm_eval/tasks
    documents: Callable[[], Mapping[str, Records]] | None  # by split; None: the hub's
    hub: str  # what is told when the hub does not answer
    revision: str | None
    shots: int
    limit: int | None
    max_completion_tokens: int | None


class Answer(NamedTuple):
    """What came of one document, read by one filter."""

    task: str
    document: int
    filter: str
    messages: tuple[Message, ...]
    continuations: list[str]
    logprobs: list[float]
    completions: list[str]
    answers: list[str]
    target: str
    metrics: list[str]
    values: list[float]
    weights: list[int]
    cut_tokens: int
    documents: int


class BenchmarkError(RuntimeError):
    """A benchmark cannot be run here; says what is missing and what to do."""


def version() -> str:
    """Of lm-eval, as it goes into a cache key.

    Raises:
        BenchmarkError: it is not installed.
    """
    from importlib import metadata

    try:
        return metadata.version("lm-eval")
    except metadata.PackageNotFoundError as error:
        raise BenchmarkError(f"benchmarks need lm-eval, which is not installed; {EXTRA}") from error


def task_names(folder: str, prefix: str) -> list[str]:
    """The tasks of a group that lie in one folder of lm-eval, by the beginning of their names."""
    return sorted(file.stem for file in _task_folder(folder).glob(f"{prefix}*.yaml"))


def run_task(
    task: TaskToRun, engine: Engine, template: PromptTemplate | None, tell: Told = lambda done, total: None
) -> list[Answer]:
    """Put the engine's policy through one task of lm-eval, scored by lm-eval's own code.

    Args:
        template: how a document becomes chat messages; None: plain text, without a chat template.
    Raises:
        BenchmarkError: lm-eval or the documents are not here.
        EngineError, EngineConfigurationError: as the engine's methods do.
    """
    version()
    from jinja2 import UndefinedError
    from lm_eval.evaluator import evaluate

    with _one_at_a_time, _quiet():
        model = _model_class()(engine, template, task.max_completion_tokens, tell)
        try:
            loaded = _load(task)
            found = evaluate(
                lm=model,
                task_dict={"tasks": {task.name: loaded}, "groups": {}},
                limit=task.limit,
                bootstrap_iters=0,
                apply_chat_template=template is not None,
                fewshot_as_multiturn=template is not None,
            )
        except (LookupError, UndefinedError) as error:  # from lm-eval's templates over the documents
            raise BenchmarkError(
                f"benchmark {task.name!r}: a document is not as the hub's data set has it: {type(error).__name__}: "
                f"{error}; correct the local copy, or remove it and let the hub's be taken"
            ) from error
        documents = len(loaded.eval_docs)
    return [_answer(task.name, sample, model, documents) for sample in found["samples"][task.name]]


def _load(task: TaskToRun) -> Any:  # lm_eval's ConfigurableTask, which is untyped here
    from lm_eval.tasks import TaskManager

    changes: dict[str, Any] = {"task": task.name}
    if task.documents is not None:
        changes["custom_dataset"] = functools.partial(_as_datasets, task.name, task.documents)
    if task.shots == 0:  # lm-eval would read the split of the worked examples all the same
        changes |= {"fewshot_split": None, "training_split": None}
    if task.documents is None and task.revision is not None:
        changes["dataset_kwargs"] = {"revision": task.revision}
    manager = TaskManager(include_path=str(_task_folder(task.folder)), include_defaults=False)
    try:
        loaded = manager.load([{"group": "ratchet", "task": [changes]}])["tasks"][task.name]
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"benchmark {task.name!r} needs {error.name}, which is not installed; {EXTRA}") from error
    except (OSError, ValueError, ConnectionError) as error:  # what `datasets` raises, without network or a data set
        if task.documents is not None:
            raise
        raise BenchmarkError(
            f"the documents of benchmark {task.name!r} are neither on this machine nor to be had from the hub: "
            f"{task.hub}; {type(error).__name__}: {error}"
        ) from error
    loaded.set_config(key="num_fewshot", value=task.shots)
    loaded.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded


def _as_datasets(task: str, documents: Callable[[], Mapping[str, Records]], **_: object) -> dict[str, Any]:
    from datasets import Dataset

    return _Splits(task, {split: Dataset.from_list(list(records)) for split, records in documents().items()})


class _Splits(dict[str, Any]):
    """The splits of a benchmark's documents; one that is not there is named."""

    def __init__(self, task: str, splits: Mapping[str, Any]) -> None:
        super().__init__(splits)
        self._task = task

    def __missing__(self, split: str) -> Any:
        raise BenchmarkError(
            f"benchmark {self._task!r} needs the split {split!r}, as documents or for its worked examples; on this "
            f"machine there are: {', '.join(self) or 'none'}; put {split}.jsonl beside them, in the hub's format"
        )


@functools.cache
def _model_class() -> Any:  # a subclass of lm_eval's LM, which can only be made once lm-eval is imported
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


def _answer(task: str, sample: Mapping[str, Any], model: Any, documents: int) -> Answer:
    contexts = [arguments[0] for arguments in sample["arguments"]]
    scores = [responses[0] for responses in sample["resps"]]
    chosen = isinstance(scores[0], tuple)  # of continuations; else completions
    messages = model.read_prompt(contexts[0])
    values = {metric: sample[metric] for metric in sample["metrics"]}
    lists = {metric: value if isinstance(value, list) else [value] for metric, value in values.items()}
    continuations = [arguments[1] for arguments in sample["arguments"]] if chosen else []
    if len(set(contexts)) > 1:  # Winogrande: what differs comes before the continuation
        ends = [model.read_prompt(context)[-1]["content"] for context in contexts]
        continuations = [end + text for end, text in zip(ends, continuations, strict=True)]
    return Answer(
        task=task,
        document=sample["doc_id"],
        filter=sample["filter"],
        messages=messages,
        continuations=continuations,
        logprobs=[score[0] for score in scores] if chosen else [],
        completions=[] if chosen else [str(text) for text in scores],
        answers=[] if chosen else [str(text) for text in sample["filtered_resps"]],
        target=str(sample["target"]),
        metrics=list(values),
        values=[sum(map(float, found)) / len(found) for found in lists.values()],
        weights=[len(found) for found in lists.values()],
        cut_tokens=max(model.cut.get(context, 0) for context in contexts),
        documents=documents,
    )


def _task_folder(folder: str) -> Path:
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent / folder


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its progress bars and remarks, and with draws that nothing else changes or is changed by."""
    import lm_eval.api.task as module

    logger, bars, state = logging.getLogger("lm_eval"), module.tqdm, random.getstate()
    level = logger.level
    logger.setLevel(logging.ERROR)
    module.tqdm = lambda items, **_: items
    random.seed(0)
    try:
        yield
    finally:
        logger.setLevel(level)
        module.tqdm = bars
        random.setstate(state)


# --- what IFEval needs beside lm-eval itself


def missing_for_ifeval() -> str | None:
    """Which of IFEval's libraries is not installed, and what to do; None: all are."""
    for name in ("immutabledict", "langdetect", "nltk"):
        if importlib.util.find_spec(name) is None:
            return f"IFEval needs {name}, which is not installed; {EXTRA}"
    return None


def prepare_ifeval(folders: Sequence[Path]) -> str:
    """Have IFEval's libraries at hand; says how sentences will be told apart: by "punkt_tab", or by `STAND_IN`.

    NLTK's sentence model for English, punkt_tab, is searched for where NLTK looks and in `folders`, then asked for from
    the network. Without it the same splitter works with a few abbreviations and nothing learnt; two of the 25 kinds of
    instructions depend on it.
    """
    if missing := missing_for_ifeval():
        raise BenchmarkError(missing)
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0  # else it draws anew each time
    nltk.data.path += [str(folder) for folder in folders if str(folder) not in nltk.data.path]
    if (found := _punkt(nltk)) is None:
        for _ in nltk.downloader.Downloader().incr_download("punkt_tab"):
            pass  # its messages: the note of the figures says it better
        found = _punkt(nltk)
    if found is None:
        nltk.data.path.append(_stand_in())
        found = _punkt(nltk)
    return STAND_IN if STAND_IN in str(found) else "punkt_tab"


def _punkt(nltk: Any) -> Any:  # nltk and its path pointers are untyped
    try:
        return nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return None


@functools.cache
def _stand_in() -> str:
    """A folder with a sentence model that knows `ABBREVIATIONS` and nothing else; it ends with this process."""
    root = tempfile.mkdtemp(prefix=f"{STAND_IN}-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = Path(root, "tokenizers", "punkt_tab", "english")
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).touch()
    (folder / "abbrev_types.txt").write_text(ABBREVIATIONS.replace(" ", "\n"), encoding="utf-8")
    return root
