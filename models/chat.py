"""The only place a chat template is applied, for sampling and training alike.

A training row is `render_prompt(...) + render_completion(...)`: token for token what a sampled and finished rollout of
that completion looks like. The template decides what comes before a completion and which token ends it; the completion
itself goes through unchanged, also where a template would trim it or put an empty reasoning block before it.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from models.engine import PLAIN, EngineConfigurationError, Message
from models.specs import PromptTemplate

Tokenizer = Any  # transformers' classes are untyped here: pyproject.toml tells mypy to skip them

PINNED_DAY = datetime(2024, 7, 26)  # the day Llama 3's template falls back to
LONGEST_CHARACTER = 12  # tokens; UTF-8 takes 4 bytes, and an emoji of several joined ones comes out piece by piece
GENERIC_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer.json is all there is to them
PROBE = "The answer is 42."  # a completion no template changes, to see what it puts around one


def messages_of(template: PromptTemplate, prompt: str) -> tuple[Message, ...]:
    """The chat messages that ask for a completion of this prompt; a `$` inside the prompt stays a `$`.

    Raises:
        ValueError: the template holds a `$name` other than `$prompt`.
    """
    system = [] if template.system is None else [{"role": "system", "content": _filled(template.system, prompt)}]
    return (*system, {"role": "user", "content": _filled(template.user, prompt)})


def chat_of(roles: Sequence[str], contents: Sequence[str], system: str | None) -> tuple[Message, ...]:
    """The messages of a stored chat as they are, after the system text where they have none."""
    messages = tuple({"role": role, "content": text} for role, text in zip(roles, contents, strict=True))
    if system is None or roles[0] == "system":
        return messages
    return ({"role": "system", "content": system}, *messages)


def load_tokenizer(
    weights: str, chat_template: str | None, trust_remote_code: bool, *, revision: str | None = None
) -> Tokenizer:
    """The tokenizer of a model, with a chat template that can be used.

    Args:
        weights: a folder or a hub name.
        chat_template: Jinja; None: the tokenizer's own.
    Raises:
        EngineConfigurationError: there is no tokenizer, no chat template, or one that `check_chat` finds fault with.
    """
    try:
        tokenizer = _tokenizer_class(weights).from_pretrained(
            weights, trust_remote_code=trust_remote_code, revision=revision
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineConfigurationError(
            f"{weights!r} holds no tokenizer that transformers can load: tokenizer.json and tokenizer_config.json were "
            f"expected beside the weights; found: {error}. Save the tokenizer into that folder."
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    if not tokenizer.chat_template:
        raise EngineConfigurationError(
            f"the tokenizer of {weights!r} has no chat template, so there is no saying how a prompt is put to it; "
            "set base.chat_template (Jinja) in the preset, or save the tokenizer with one"
        )
    if problems := check_chat(tokenizer):
        raise EngineConfigurationError(
            f"the chat template of {weights!r} cannot be used: {'; '.join(problems)}. "
            "Set base.chat_template (Jinja) to one without this fault."
        )
    return tokenizer


def template_only(chat_template: str) -> Tokenizer:
    """A tokenizer that can render messages as text and nothing else, for a look at a model that is not here.

    Raises:
        TemplateError: of jinja2; this is no template.
    """
    return _TemplateOnly(chat_template)


def render_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """What `render_prompt` tokenises, to be looked at."""
    return _text(tokenizer, messages, open_turn=True)


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages and the opening of the assistant's turn, ready to be continued."""
    return _ids(tokenizer, _text(tokenizer, messages, open_turn=True), plain=_is_plain(messages))


def render_completion(tokenizer: Tokenizer, messages: Sequence[Message], completion: str) -> list[int]:
    """Token ids that follow `render_prompt` in a finished rollout: the completion and the token that ends the turn.

    Raises:
        EngineConfigurationError: the template does not render a conversation as a continuation of its prompt.
    """
    if _is_plain(messages):
        return [*_ids(tokenizer, completion), *([] if (end := tokenizer.eos_token_id) is None else [end])]
    closing = _closing(tokenizer, messages)
    return _up_to_the_end(tokenizer, _ids(tokenizer, completion + closing), _ids(tokenizer, closing))


class Rendered(NamedTuple):
    """A whole conversation as token ids; `trained` says which of them the assistant wrote, ends of turn included."""

    ids: list[int]
    trained: list[bool]
    rewritten: int  # earlier replies that the template renders otherwise later on, of which nothing is trained


def render_conversation(tokenizer: Tokenizer, messages: Sequence[Message]) -> Rendered:
    """The conversation up to its last reply, as it would come to stand turn by turn.

    An earlier reply counts as the assistant's where prompt and completion of that turn are, token for token, how the
    whole begins; a template that takes something away from earlier turns leaves none to train on.
    """
    before, last = messages[:-1], messages[-1]
    ids = render_prompt(tokenizer, before)
    trained, rewritten = [False] * len(ids), 0
    for place, message in enumerate(before):
        if message["role"] != "assistant":
            continue
        prompt = render_prompt(tokenizer, messages[:place])
        reply = render_completion(tokenizer, messages[:place], message["content"])
        if ids[: len(prompt) + len(reply)] != prompt + reply:
            rewritten += 1
            continue
        trained[len(prompt) : len(prompt) + len(reply)] = [True] * len(reply)
    completion = render_completion(tokenizer, before, last["content"])
    return Rendered(ids + completion, trained + [True] * len(completion), rewritten)


def render_continuation(tokenizer: Tokenizer, continuation: str) -> list[int]:
    """Token ids of text that continues `render_prompt`, without an end of turn; this is what an engine scores."""
    return _ids(tokenizer, continuation)


def render_scored(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    continuation: str,
    rendering: str,
    *,
    prompt_of: Callable[[Tokenizer, Sequence[Message]], list[int]] = render_prompt,
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, and of what is to be scored after it.

    Args:
        prompt_of: `render_prompt`, or what remembers its results.
        rendering: "apart": the continuation is tokenised by itself, as a policy is trained and sampled here, without an
            end of turn. "finished": the same with the end of turn, a whole training row. "joined": prompt and
            continuation are tokenised as one text and split after, as lm-eval 0.4.13 does for every benchmark.
    """
    if rendering == "joined":
        return _joined(tokenizer, messages, continuation)
    prompt = prompt_of(tokenizer, messages)
    if rendering == "finished":
        return prompt, render_completion(tokenizer, messages, continuation)
    return prompt, render_continuation(tokenizer, continuation)


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token; joined, they are the text of all, special tokens included.

    A character that several tokens make up stands at the last of them; the others have no text of their own.
    """
    texts = [""] * len(ids)
    known, done = 0, 0  # tokens before `done` have their texts; those from `known` on are decoded again, for the spaces
    for place in range(len(ids)):
        before, now = _decoded(tokenizer, ids[known:done]), _decoded(tokenizer, ids[known : place + 1])
        if now.endswith("\ufffd") and place + 1 < len(ids) and place - done < LONGEST_CHARACTER:
            continue
        texts[place] = now[len(before) :]
        known, done = done, place + 1
    return texts


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """Id of the special token with which the template ends the assistant's turn; sampling stops there, as at EOS."""
    special = _special_ids(tokenizer)
    closing = _ids(tokenizer, _closing(tokenizer, [{"role": "user", "content": "What is 40 + 2?"}]))
    return next((token for token in closing if token in special), None)


def check_chat(tokenizer: Tokenizer) -> list[str]:
    """What is wrong with the tokenizer's chat template, in words; empty when it can be sampled and trained with."""
    from jinja2 import TemplateError

    probe = [{"role": "user", "content": "What is 40 + 2?"}]
    try:
        prompt, end = render_prompt(tokenizer, probe), end_of_turn(tokenizer)
    except (TemplateError, EngineConfigurationError) as error:
        return [str(error)]
    problems = []
    if end is None:
        problems.append(
            "it does not end the assistant's turn with a special token "
            f"(EOS is {tokenizer.eos_token!r}), so a model trained with it would never learn to stop"
        )
    if tokenizer.bos_token_id is not None and prompt[:2] == [tokenizer.bos_token_id] * 2:
        problems.append(f"it writes {tokenizer.bos_token!r} (BOS) twice")
    if not prompt:
        problems.append("it renders a user message as nothing at all")
    return problems


def _tokenizer_class(weights: str) -> Any:
    """transformers' class for this tokenizer; where the files say that they are all there is to it, without torch."""
    folder = Path(weights)
    if (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file():
        with contextlib.suppress(ValueError):  # no JSON: let it be told by who tries to load it
            named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
            if named.get("tokenizer_class") in GENERIC_CLASSES and "auto_map" not in named:
                from transformers import PreTrainedTokenizerFast

                return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


class _TemplateOnly:
    """Renders as transformers does (utils/chat_template_utils.py), whose import takes seconds."""

    eos_token, bos_token = "</s>", None

    def __init__(self, chat_template: str) -> None:
        import jinja2
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        class Generation(Extension):
            """{% generation %} marks what the assistant writes; as text, it is what stands inside."""

            tags = {"generation"}  # noqa: RUF012 # as jinja2 declares it

            def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
                next(parser.stream)
                return parser.parse_statements(("name:endgeneration",), drop_needle=True)

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        environment.globals["raise_exception"] = refuse
        self._template = environment.from_string(chat_template)

    def apply_chat_template(self, messages: list[Message], *, tokenize: bool, **names: Any) -> str:
        """The messages as text."""
        assert not tokenize
        return self._template.render(messages=messages, eos_token=self.eos_token, bos_token="", **names)


def _filled(text: str, prompt: str) -> str:
    try:
        return Template(text).substitute(prompt=prompt)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"the prompt template {text!r} holds a placeholder other than $prompt ({error}); write $$ for a dollar sign"
        ) from error


def _joined(tokenizer: Tokenizer, messages: Sequence[Message], continuation: str) -> tuple[list[int], list[int]]:
    """As lm-eval's TemplateLM._encode_pair: blanks at the prompt's end belong to the continuation."""
    text = render_text(tokenizer, messages)
    plain = _is_plain(messages)
    if not text:  # what is nothing else to go by is scored after BOS or, without one, EOS
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = _ids(tokenizer, continuation)
        return [start], ids[1:] if ids[:1] == [start] else ids
    stripped = text.rstrip()
    whole = _ids(tokenizer, text + continuation, plain=plain)
    prompt = _ids(tokenizer, stripped, plain=plain) if stripped else []
    return whole[: len(prompt)], whole[len(prompt) :]


def _is_plain(messages: Sequence[Message]) -> bool:
    return len(messages) == 1 and messages[0]["role"] == PLAIN


def _decoded(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _text(tokenizer: Tokenizer, messages: Sequence[Message], *, open_turn: bool) -> str:
    if _is_plain(messages):
        return messages[0]["content"]
    # A template that asks for today's date would make every prompt another one tomorrow, hence the pinned day.
    rendered: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=open_turn, strftime_now=PINNED_DAY.strftime
    )
    return rendered


def _ids(tokenizer: Tokenizer, text: str, *, plain: bool = False) -> list[int]:
    # A template writes BOS itself where the model wants one, and so may a plain text; there must not be a second.
    special = plain and not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _closing(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """What the template writes after a completion."""
    prompt = _text(tokenizer, messages, open_turn=True)
    whole = _text(tokenizer, [*messages, {"role": "assistant", "content": PROBE}], open_turn=False)
    if not whole.startswith(prompt) or PROBE not in whole[len(prompt) :]:
        raise EngineConfigurationError(
            "the chat template does not extend its prompt: with the assistant's turn it was expected to begin with "
            f"{prompt[-80:]!r}, found {whole[-160:]!r}; a model would train on another prompt than it is sampled with. "
            "Set base.chat_template to one that writes the same generation prompt."
        )
    return whole[len(prompt) :].rpartition(PROBE)[2]


def _up_to_the_end(tokenizer: Tokenizer, ids: list[int], closing: list[int]) -> list[int]:
    """The ids up to the end of the turn; templates write line breaks or more after it, which no rollout has.

    Args:
        closing: the ids of what the template writes after the completion, with which `ids` ends.
    """
    special = _special_ids(tokenizer)
    behind = sum(token in special for token in closing)  # the completion may hold special tokens too: count from behind
    places = [place for place, token in enumerate(ids) if token in special]
    return ids[: places[-behind] + 1] if behind else ids


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset({*added, *tokenizer.all_special_ids})
