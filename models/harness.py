"""Running lm-eval's tasks (0.4.13) on an engine of ours; with models/harness_model.py, all that knows lm-eval.

lm-eval builds the prompts, reads the answers and scores them. Numbers equal those of its own backends on the same
weights (tests/models/test_harness.py).
"""

import functools
import importlib.util
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from models.engine import Engine, Message
from models.harness_model import Told, model_class
from models.ifeval_libraries import EXTRA, BenchmarkError
from models.specs import PromptTemplate

Records = list[Mapping[str, Any]]  # documents of one split

FEWSHOT_SEED = 1234  # lm-eval's default
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
        model = model_class()(engine, template, task.max_completion_tokens, tell)
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
    found = importlib.util.find_spec("lm_eval")  # to import it takes seconds
    assert found is not None  # version() is asked first
    assert found.origin is not None
    return Path(found.origin).parent / "tasks" / folder


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval without its progress bars and remarks, and with draws that nothing else changes or is changed by."""
    import lm_eval.api.task as module

    logger, bars, state = logging.getLogger("lm_eval"), module.tqdm, random.getstate()
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # an error of its log is no failure: IFEval tells of each text without a language
    module.tqdm = lambda items, **_: items
    random.seed(0)
    try:
        yield
    finally:
        logger.setLevel(level)
        module.tqdm = bars
        random.setstate(state)
