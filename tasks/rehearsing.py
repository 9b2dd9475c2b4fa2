"""The first prompt of each stage as the engine will get it, and what its tokenizer makes of it. No model is loaded.

A tokenizer is looked for on this machine only: in the base's folder, in the hub's cache, or beside the tiny base that
this experiment has built already. Where there is none, what could not be checked is said.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from jinja2 import TemplateError

from models.chat import (
    messages_of,
    render_continuation,
    render_prompt,
    render_text,
    template_only,
)
from models.engine import Message
from models.fake_engine import is_fake
from models.specs import VLLM, EngineSettings, ModelRef, OpenAI, PromptTemplate, Sampling, Scripted
from storage.hub import NotAtHand, Source, is_at_hand, source_name
from tasks.asks import Asks, LabelsAsk, PairwiseAsk, ScoresAsk
from tasks.blending import ChatSource, Mixture, first_prompt
from tasks.checking import Checkable, ChecksItself, engine_of, parts
from tasks.judgements import Judge, as_it_is
from tasks.licences import doubt_about
from tasks.loading import prompts_of
from tasks.planning import PlannedStep
from tasks.tokenizing import PROBE, examined, label_lengths, tokenizer_of


class FirstPrompt(NamedTuple):
    """What an engine is given first at one stage."""

    text: str
    tokens: int | None  # None: there is no tokenizer to count them
    note: str  # what is not as it will be; empty: nothing


def first_prompts(config: Checkable, built: ModelRef | None = None) -> dict[str, FirstPrompt]:
    """The first prompt of each stage.

    Args:
        built: the tiny base of the experiment, if there is one already.
    """
    prompt, shown = _first_prompt(config), dict[str, FirstPrompt]()
    for label, (ref, template) in config.templates().items():
        engine = engine_of(config, "supervisor") if label.startswith("supervisor") else config.engine
        shown[label] = _rendered(ref, built, engine, messages_of(template, prompt))
    for label, ref, template, engine in _pair_judges(config):
        shown[label] = _rendered(ref, None, engine, messages_of(template, prompt))
    ref, template = list(config.templates().values())[_trained(config)]
    for read in config.reads():
        if read.apart and read.answers and read.name in ("dev", "test"):
            held_out = _first_of(partial(_first_in, read.source))
            shown[f"evaluation on {read.name}"] = _rendered(ref, built, config.engine, messages_of(template, held_out))
    return shown


def tokenizer_checks(config: Checkable, built: ModelRef | None = None) -> list[str]:
    """What was found about each model's tokenizer, or why nothing could be."""
    told = []
    models = dict.fromkeys(ref for ref, _ in config.templates().values())
    models |= dict.fromkeys(ref for _, ref, _, engine in _pair_judges(config) if isinstance(engine, VLLM))
    for ref in models:
        name = "the tiny base" if ref is None else ref.name
        if ref is not None and is_fake(ref.name):
            told.append(f"{name}: a fake model has no tokenizer")
        elif ref is not None and Path(ref.name).suffix in (".yaml", ".yml"):
            told.append(f"{name}: a script has no tokenizer")
        elif (tokenizer := tokenizer_of(ref, built)) is None:
            missing = "is not built yet" if ref is None else "has no tokenizer on this machine"
            told.append(f"{name} {missing}; EOS, BOS and labels are checked when it is there")
        else:
            told.append(f"{name}: {examined(tokenizer)}")
            told += [f"{name}: {key}: {label_lengths(tokenizer, judge)}" for key, judge in parts(config, Judge)]
    return list(dict.fromkeys(told))


def licence_notices(config: Checkable) -> list[str]:
    """What is known of the licence of each source that is not made up here, and of the models."""
    chats = {f"{name}.source": entry for name, entry in parts(config, ChatSource)}
    told = []
    for name, source in parts(config, Source):
        if source.hub is None and source.path is None:
            continue
        entry = chats.get(name)
        licence = entry.licence if entry else None
        if source.path is not None and licence is None:
            said = "a file of yours; whether it may be trained on is for you to know"
        else:
            said = doubt_about(source.hub, licence) or f"{licence}"
        accepted = ", accepted by accept_unclear_licence" if entry and entry.accept_unclear_licence else ""
        told.append(f"{source_name(source)}: {said}{accepted}")
    for _, ref in parts(config, ModelRef):
        if not (is_fake(ref.name) or Path(ref.name).exists()):
            told.append(f"{ref.name}: the licence of the model is its page's on the hub; it holds for what comes of it")
    return list(dict.fromkeys(told))


def not_at_hand(config: Checkable) -> list[str]:
    """The sources whose rows a run downloads first, so that nothing is known of them yet."""
    missing = [source_name(source) for _, source in parts(config, Source) if not is_at_hand(source)]
    return list(dict.fromkeys(missing))


def rehearsal_faults(config: Checkable) -> list[str]:
    """What would go wrong with the first prompts, each in words after its key; the settings themselves are sound."""
    found = []
    for name, model in parts(config, ModelRef):
        if model.chat_template is not None and not Path(model.name).is_dir():
            try:
                render_text(template_only(model.chat_template), PROBE)
            except TemplateError as error:
                found.append(f"{name}.chat_template: is no template that can be rendered: {error}")
    if found:
        return found
    for ref, template in dict.fromkeys(config.templates().values()):
        tokenizer = tokenizer_of(ref, None)
        if tokenizer is not None and isinstance(config.engine, VLLM):
            taken = len(render_prompt(tokenizer, messages_of(template, _first_prompt(config))))
            found += _room_faults(config, taken, config.engine.max_model_len)
    for key, judge in parts(config, Judge):
        tokenizer = tokenizer_of(_judging_model(config, key), None)
        if tokenizer is not None and judge.label_tokens == "one":
            lengths = [len(render_continuation(tokenizer, label)) for label in (judge.positive, judge.negative)]
            if lengths != [1, 1]:
                found.append(
                    f"{key}.label_tokens: is 'one', but {label_lengths(tokenizer, judge)}; choose other labels, or "
                    "say 'any'"
                )
    return list(dict.fromkeys(found))


def built_base(planned: Sequence[PlannedStep]) -> ModelRef | None:
    """The tiny base, if it is stored already."""
    return next((step.made for step in planned if step.step == "build_base" and step.cached), None)


def _first_prompt(config: Checkable) -> str:
    mixtures = [mixture for _, mixture in parts(config, Mixture)]
    if isinstance(config, ChecksItself):
        return _first_of(config.first_prompt)
    if mixtures:
        return _first_of(lambda: first_prompt(mixtures[0]))
    first = config.reads()[0]
    return _first_of(partial(_first_in, first.source))


def _first_in(source: Source) -> str:
    return next(iter(prompts_of(source))).prompt


def _first_of(read: Callable[[], str]) -> str:
    try:
        return read()
    except NotAtHand as error:
        return f"({error}; its first prompt stands here)"


def _trained(config: Checkable) -> int:
    """Which of the templates is for policies that are evaluated: the last that is a policy's."""
    labels = list(config.templates())
    return max(n for n, label in enumerate(labels) if not label.startswith(("judge", "supervisor")))


def _pair_judges(config: Checkable) -> Iterator[tuple[str, ModelRef | None, PromptTemplate, EngineSettings]]:
    """How judges of pairs are asked: label, model, template and engine of each."""
    for key, asks in parts(config, Asks):
        owner = _at(config, key.rpartition(".")[0])
        ref = owner.base if isinstance(owner.base, ModelRef) else None
        yield "judge", ref, _asked(asks, owner.template), owner.engine or config.engine


def _asked(asks: Asks, template: PromptTemplate) -> PromptTemplate:
    text = asks.judge.text if isinstance(asks, LabelsAsk) else None
    if isinstance(asks, PairwiseAsk | ScoresAsk):
        text = asks.text
    if text is None:  # a reward model, or likelihoods: the prompt itself, the completion behind it
        return template
    named = {"completion": "(a completion)", "first": "(a completion)", "second": "(the other completion)"}
    return as_it_is(template).model_copy(update={"user": Template(text).safe_substitute(named)})


def _judging_model(config: Checkable, key: str) -> ModelRef | None:
    """The model that a judge's labels are for: that of the nearest section around them that names a base."""
    while True:
        key = key.rpartition(".")[0]
        base = getattr(_at(config, key), "base", None)
        if base is not None or not key:
            return base if isinstance(base, ModelRef) else None


def _at(config: Any, key: str) -> Any:
    for name in filter(None, key.split(".")):
        config = getattr(config, name)
    return config


def _rendered(
    ref: ModelRef | None, built: ModelRef | None, engine: EngineSettings, messages: Sequence[Message]
) -> FirstPrompt:
    plain = "\n".join(f"[{message['role']}] {message['content']}" for message in messages)
    if isinstance(engine, OpenAI):
        return FirstPrompt(plain, None, "sent as messages; the endpoint puts its own chat template around them")
    if isinstance(engine, Scripted) or (ref is not None and is_fake(ref.name)):
        return FirstPrompt(plain, None, "read as messages; no chat template")
    tokenizer = tokenizer_of(ref, built)
    if tokenizer is not None:
        return FirstPrompt(render_text(tokenizer, messages), len(render_prompt(tokenizer, messages)), "")
    if ref is None:
        from models.tiny import CHAT_TEMPLATE

        return FirstPrompt(render_text(template_only(CHAT_TEMPLATE), messages), None, "the tiny base is not built yet")
    if ref.chat_template is not None:
        note = f"the tokenizer of {ref.name} is not on this machine"
        return FirstPrompt(render_text(template_only(ref.chat_template), messages), None, note)
    note = f"the tokenizer of {ref.name} is not on this machine; its chat template is put around this"
    return FirstPrompt(plain, None, note)


def _room_faults(config: Checkable, taken: int, limit: int) -> Iterator[str]:
    for name, sampling in parts(config, Sampling):
        if engine_of(config, name) == config.engine and taken + sampling.max_completion_tokens > limit:
            yield (
                f"{name}.max_completion_tokens: is {sampling.max_completion_tokens}, and the first prompt takes "
                f"{taken} tokens, but engine.max_model_len is {limit}; raise it or shorten one of the two"
            )
