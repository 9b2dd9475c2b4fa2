"""What can be found wrong with an experiment before a model is loaded and anything is written."""

import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel

from models.chat import load_tokenizer
from models.engine import EngineConfigurationError
from models.fake_engine import fake_skill
from models.scripted_engine import read_script
from models.specs import (
    VLLM,
    EngineSettings,
    Fake,
    ModelRef,
    OpenAI,
    Optimization,
    PromptTemplate,
    Sampling,
    Scripted,
    TinyTraining,
)
from storage.arithmetic import check_enough
from storage.home import home, home_name
from storage.hub import NotAtHand, Source, count_rows
from storage.opening import what_is_wrong_with_store
from tasks.benchmarking import benchmark_faults
from tasks.benchmarks import Benchmarks
from tasks.blending import Mixture, faults_of
from tasks.loading import demonstrations_of, prompts_of
from tasks.spreading import cluster_faults

T = TypeVar("T")


class Read(NamedTuple):
    """A source that an experiment reads, and what each of its rows must have."""

    name: str
    source: Source
    answers: bool = False
    completions: bool = False
    apart: bool = False  # no prompt may stand in another source that is to be kept apart


class Checkable(Protocol):
    """A recipe's config, as far as the checks know it."""

    @property
    def engine(self) -> EngineSettings: ...

    @property
    def marker(self) -> str: ...

    def reads(self) -> Sequence[Read]:
        """The sources it reads."""

    def templates(self) -> dict[str, tuple[ModelRef | None, PromptTemplate]]:
        """Each way a model is prompted, by a label; None: a model of ours, with the tiny chat template."""


@runtime_checkable
class ChecksItself(Protocol):
    """A config with more than one engine, and faults of its own."""

    def engine_of(self, name: str) -> EngineSettings:
        """The engine that the setting of this dotted name is for."""

    def first_prompt(self) -> str:
        """The first prompt as it is put to its models."""

    def faults(self) -> list[str]:
        """Every fault, each in words after its key, that only this recipe can have."""


class Splits(Protocol):
    """A recipe's config, as far as its three sources of prompts go."""

    @property
    def train(self) -> Source: ...

    @property
    def dev(self) -> Source: ...

    @property
    def test(self) -> Source: ...


def reads_of_splits(config: Splits, *, examples: bool) -> list[Read]:
    """Prompts with gold answers to train on, to decide by and to report, kept apart.

    Args:
        examples: whether training prompts serve as worked examples too, and so need completions.
    """
    return [
        Read("train", config.train, answers=True, completions=examples, apart=True),
        Read("dev", config.dev, answers=True, apart=True),
        Read("test", config.test, answers=True, apart=True),
    ]


def faults(config: Checkable) -> list[str]:
    """Every fault of the experiment, each in words after the key it is about; empty when it can be run."""
    found = [*_home_faults(), *cluster_faults()]
    found += _source_faults(config)
    found += [f"{name}.{fault}" for name, one in parts(config, Mixture) for fault in faults_of(one)]
    for name, model in parts(config, ModelRef):
        found += _model_faults(name, model, engine_of(config, name))
    if isinstance(config, ChecksItself):
        found += config.faults()
    if isinstance(config.engine, OpenAI):
        found += _endpoint_faults(config, config.engine)
    if isinstance(config.engine, Scripted):
        found.append("engine.kind is 'scripted', but a script cannot be trained; it can serve as a supervisor")
    for name, sampling in parts(config, Sampling):
        engine = engine_of(config, name)
        if isinstance(engine, VLLM):
            found += _length_faults(name, sampling, engine.max_model_len)
        found += _temperature_faults(name, sampling)
    found += [fault for name, one in parts(config, Optimization) for fault in _training_faults(name, one)]
    found += [f"{name}: {fault}" for name, one in parts(config, Benchmarks) for fault in benchmark_faults(one)]
    return list(dict.fromkeys(found))


def engine_of(config: Checkable, name: str) -> EngineSettings:
    """The engine that the setting of this dotted name is for."""
    return config.engine_of(name) if isinstance(config, ChecksItself) else config.engine


def parts(config: Any, kind: type[T], name: str = "") -> Iterator[tuple[str, T]]:
    """All settings of one kind in a config, with their dotted names."""
    if isinstance(config, kind):
        yield name, config
    if isinstance(config, BaseModel):
        for field in type(config).model_fields:
            yield from parts(getattr(config, field), kind, f"{name}.{field}".lstrip("."))
    elif isinstance(config, tuple | list):
        for number, item in enumerate(config):
            yield from parts(item, kind, f"{name}[{number}]")


def _home_faults() -> Iterator[str]:
    if wrong := what_is_wrong_with_store():
        yield wrong
    nearest = next(parent for parent in (home(), *home().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):  # looked at only: a plan writes nothing
        why = errno.EROFS if os.statvfs(nearest).f_flag & os.ST_RDONLY else errno.EACCES
        yield (
            f"the home {home_name()} cannot be written ({os.strerror(why)}); "
            "name another with --home or RATCHET_HOME, or make it writable"
        )


def _endpoint_faults(config: Checkable, engine: OpenAI) -> Iterator[str]:
    if not engine.loads_adapters:
        yield (
            "engine.kind is 'openai', but an endpoint cannot serve the policies that are trained here; use 'vllm' "
            "(endpoints serve judges and supervisors), or adapters with engine.loads_adapters"
        )
        return
    for name, one in parts(config, Optimization):
        if not isinstance(one, TinyTraining) and (one.lora is None or one.lora.merge):
            yield f"{name}: endpoints are given adapters, not weights; set {name}.lora, and {name}.lora.merge: false"


def _source_faults(config: Checkable) -> list[str]:
    found: list[str] = []
    owners: dict[str, str] = {}
    if any(read.answers for read in config.reads()) and not config.marker.strip():
        found.append("marker: is empty, but the final answer of a completion stands after it; name one")
    for read in config.reads():
        try:
            found += _row_faults(read, config.marker, owners)
        except NotAtHand:  # a plan says so
            continue
        except (ValueError, OSError) as error:
            found.append(f"{read.name}: {error}")
    return found


def _row_faults(read: Read, marker: str, owners: dict[str, str]) -> Iterator[str]:
    made_up = read.source.arithmetic
    if made_up is not None:  # every row has all it can have
        check_enough(made_up)
    elif read.completions:
        for _ in demonstrations_of(read.source, marker):
            pass
    if not read.apart and (made_up is not None or not read.answers):
        if not count_rows(read.source):
            yield _no_rows(read.name)
        return
    count = 0
    for prompt in prompts_of(read.source):
        count += 1
        if read.answers and prompt.answer is None:
            yield f"{read.name}: {prompt.source} has no gold answers; name their column in {read.name}.columns.answer"
            return
        if read.apart and owners.setdefault(prompt.prompt, read.name) != read.name:
            yield (
                f"{read.name}: the prompt {prompt.prompt[:80]!r} also stands in {owners[prompt.prompt]}, so the "
                "figures would be of prompts that were trained on or chosen by; take other rows"
            )
            return
    if not count:
        yield _no_rows(read.name)


def _no_rows(name: str) -> str:
    return f"{name}: the source has no rows; see {name}.rows and {name}.limit"


def _model_faults(name: str, ref: ModelRef, engine: EngineSettings) -> Iterator[str]:
    if isinstance(engine, Scripted):
        try:
            read_script(ref.name)
        except EngineConfigurationError as error:
            yield f"{name}.name: {error}"
        return
    fake = ref.name.startswith("fake:")
    if fake != isinstance(engine, Fake):
        rule = "only a fake engine can serve it" if fake else "a fake engine serves names like 'fake:0.4' only"
        yield f"{name}.name is {ref.name!r} with engine.kind {engine.kind!r}; {rule}"
    if fake:
        try:
            fake_skill(ref.name)
        except EngineConfigurationError as error:
            yield f"{name}.name: {error}"
    elif Path(ref.name).is_dir():
        try:
            load_tokenizer(ref.name, ref.chat_template, ref.trust_remote_code)
        except EngineConfigurationError as error:
            yield f"{name}: {error}"
    elif ref.name.startswith((".", "/", "~")) or ref.name.count("/") > 1:
        yield f"{name}.name: there is no folder {ref.name!r}; give a folder with model files, or a hub name"
    elif isinstance(engine, VLLM) and ref.revision is None and ref.digest is None:
        yield (
            f"{name}.revision: is missing; {ref.name!r} may be another model tomorrow, and what is cached of this one "
            "would be taken for its; pin a commit of the hub, or give a folder"
        )


def _length_faults(name: str, sampling: Sampling, limit: int) -> Iterator[str]:
    if sampling.max_completion_tokens >= limit:
        yield (
            f"{name}.max_completion_tokens is {sampling.max_completion_tokens} but engine.max_model_len is {limit}, "
            "which leaves no room for a prompt; raise the latter or lower the former"
        )


def _temperature_faults(name: str, sampling: Sampling) -> Iterator[str]:
    if sampling.temperature == 0 and sampling.rollouts_per_prompt > 1:
        yield (
            f"{name}.rollouts_per_prompt: is {sampling.rollouts_per_prompt} at temperature 0, where all rollouts of a "
            "prompt are the same; set it to 1 or raise the temperature"
        )


def _training_faults(name: str, settings: Optimization) -> Iterator[str]:
    file = settings.accelerate_config
    if file is not None and not Path(file).is_file():
        yield f"{name}.accelerate_config: there is no file {file!r}; see deployments/accelerate/"
