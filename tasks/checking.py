"""What can be found wrong with an experiment before a model is loaded and anything is written."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from pydantic import BaseModel

from models.chat import load_tokenizer, messages_of, render_text, template_only
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
from storage.home import home
from storage.hub import Source
from tasks.benchmarking import benchmark_faults
from tasks.benchmarks import Benchmarks
from tasks.blending import Mixture, faults_of, first_prompt
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
        """Every fault, in words, that only this recipe can have."""


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
    """Every fault of the experiment, in words; empty when it can be run."""
    found = [*_home_faults(), *cluster_faults()]
    found += _source_faults(config)
    found += [f"{name}: {fault}" for name, one in _parts(config, Mixture) for fault in faults_of(one)]
    for name, model in _parts(config, ModelRef):
        found += _model_faults(name, model, _engine_of(config, name))
    if isinstance(config, ChecksItself):
        found += config.faults()
    if isinstance(config.engine, OpenAI):
        found += _endpoint_faults(config, config.engine)
    if isinstance(config.engine, Scripted):
        found.append("engine.kind is 'scripted', but a script cannot be trained; it can serve as a supervisor")
    for name, sampling in _parts(config, Sampling):
        engine = _engine_of(config, name)
        if isinstance(engine, VLLM):
            found += _length_faults(name, sampling, engine.max_model_len)
    found += [fault for name, one in _parts(config, Optimization) for fault in _training_faults(name, one)]
    found += [fault for _, one in _parts(config, Benchmarks) for fault in benchmark_faults(one)]
    return found


def first_prompts(config: Checkable) -> dict[str, str]:
    """The first training prompt as the engine will get it, for each way the experiment prompts a model."""
    mixtures = [mixture for _, mixture in _parts(config, Mixture)]
    if isinstance(config, ChecksItself):
        prompt = config.first_prompt()
    elif mixtures:
        prompt = first_prompt(mixtures[0])
    else:
        prompt = next(iter(prompts_of(config.reads()[0].source))).prompt
    return {label: _rendered(ref, template, prompt) for label, (ref, template) in config.templates().items()}


def _rendered(ref: ModelRef | None, template: PromptTemplate, prompt: str) -> str:
    messages = messages_of(template, prompt)
    if ref is None:
        from models.tiny import CHAT_TEMPLATE

        return render_text(template_only(CHAT_TEMPLATE), messages)
    if Path(ref.name).is_dir():
        return render_text(load_tokenizer(ref.name, ref.chat_template, ref.trust_remote_code), messages)
    if ref.chat_template is not None:
        return render_text(template_only(ref.chat_template), messages)
    told = "\n".join(f"[{message['role']}] {message['content']}" for message in messages)
    return f"{told}\n(the tokenizer of {ref.name} is not on this machine; its chat template is put around this)"


def _home_faults() -> Iterator[str]:
    nearest = next(parent for parent in (home(), *home().parents) if parent.exists())
    try:
        tempfile.TemporaryDirectory(dir=nearest).cleanup()
    except OSError as error:
        yield (
            f"the home {home()} cannot be written ({error.strerror}); "
            "name another with --home or RATCHET_HOME, or make it writable"
        )


def _endpoint_faults(config: Checkable, engine: OpenAI) -> Iterator[str]:
    if not engine.loads_adapters:
        yield (
            "engine.kind is 'openai', but an endpoint cannot serve the policies that are trained here; use 'vllm' "
            "(endpoints serve judges and supervisors), or adapters with engine.loads_adapters"
        )
        return
    for name, one in _parts(config, Optimization):
        if not isinstance(one, TinyTraining) and (one.lora is None or one.lora.merge):
            yield f"{name}: endpoints are given adapters, not weights; set {name}.lora, and {name}.lora.merge: false"


def _source_faults(config: Checkable) -> list[str]:
    found: list[str] = []
    owners: dict[str, str] = {}
    for read in config.reads():
        try:
            found += _row_faults(read, config.marker, owners)
        except (ValueError, OSError) as error:
            found.append(f"{read.name}: {error}")
    return found


def _row_faults(read: Read, marker: str, owners: dict[str, str]) -> Iterator[str]:
    if read.completions:
        for _ in demonstrations_of(read.source, marker):
            pass
    if not (read.answers or read.apart):
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
        yield f"{read.name}: the source has no rows; see {read.name}.rows and {read.name}.limit"


def _engine_of(config: Checkable, name: str) -> EngineSettings:
    return config.engine_of(name) if isinstance(config, ChecksItself) else config.engine


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


def _length_faults(name: str, sampling: Sampling, limit: int) -> Iterator[str]:
    if sampling.max_completion_tokens >= limit:
        yield (
            f"{name}.max_completion_tokens is {sampling.max_completion_tokens} but engine.max_model_len is {limit}, "
            "which leaves no room for a prompt; raise the latter or lower the former"
        )


def _training_faults(name: str, settings: Optimization) -> Iterator[str]:
    file = settings.accelerate_config
    if file is not None and not Path(file).is_file():
        yield f"{name}.accelerate_config: there is no file {file!r}; see deployments/accelerate/"


def _parts(config: Any, kind: type[T], name: str = "") -> Iterator[tuple[str, T]]:
    """All settings of one kind in a config, with their dotted names."""
    if isinstance(config, kind):
        yield name, config
    if isinstance(config, BaseModel):
        for field in type(config).model_fields:
            yield from _parts(getattr(config, field), kind, f"{name}.{field}".lstrip("."))
    elif isinstance(config, tuple | list):
        for number, item in enumerate(config):
            yield from _parts(item, kind, f"{name}[{number}]")
