"""Tokenizers that are on this machine, and what they make of a chat: what ends a turn, what begins it, labels."""

import os
from functools import lru_cache
from pathlib import Path

from models.chat import Tokenizer, end_of_turn, load_tokenizer, render_completion, render_continuation, render_prompt
from models.engine import EngineConfigurationError, Message
from models.specs import ModelRef
from storage.checkpoints import checkpoint_path
from tasks.judgements import Judge

PROBE: list[Message] = [{"role": "user", "content": "What is 40 + 2?"}]


def tokenizer_of(ref: ModelRef | None, built: ModelRef | None) -> Tokenizer | None:
    """The tokenizer of a model, None where it is not on this machine; None as the model: the tiny base, if built."""
    if ref is None:
        return None if built is None or built.digest is None else _load(str(checkpoint_path(built.digest)), None, False)
    folder = Path(ref.name) if Path(ref.name).is_dir() else _snapshot(ref)
    return None if folder is None else _load(str(folder), ref.chat_template, ref.trust_remote_code)


def examined(tokenizer: Tokenizer) -> str:
    """How the tokenizer ends a turn and begins a text, in words."""
    end, prompt = end_of_turn(tokenizer), render_prompt(tokenizer, PROBE)
    finished = render_completion(tokenizer, PROBE, "42")
    trained = "trained as the last token and where sampling stops" if finished[-1:] == [end] else "NOT trained"
    shown = [f"a turn ends with {tokenizer.convert_ids_to_tokens(end)!r}, {trained}"]
    if tokenizer.eos_token_id != end:
        shown.append(f"EOS is {tokenizer.eos_token!r}, where sampling stops too")
    bos = tokenizer.bos_token_id
    times = 0 if bos is None else prompt.count(bos)
    shown.append(f"BOS {tokenizer.bos_token!r} {'once' if times else 'not written'}" if bos is not None else "no BOS")
    shown.append(f"what comes before a completion is not trained ({len(prompt)} tokens around a probe)")
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        shown.append("the padding token is EOS; padding is told by the attention mask")
    return "; ".join(shown)


def label_lengths(tokenizer: Tokenizer, judge: Judge) -> str:
    """How many tokens a judge's labels take, in words."""
    lengths = {label: len(render_continuation(tokenizer, label)) for label in (judge.positive, judge.negative)}
    return "the labels take " + " and ".join(
        f"{count} token{'s' if count > 1 else ''} ({label!r})" for label, count in lengths.items()
    )


@lru_cache(maxsize=8)
def _load(folder: str, chat_template: str | None, trust_remote_code: bool) -> Tokenizer | None:
    try:
        return load_tokenizer(folder, chat_template, trust_remote_code)
    except EngineConfigurationError:  # tasks.checking tells what is wrong with it
        return None


def _snapshot(ref: ModelRef) -> Path | None:
    """Where the hub's own library keeps this model's tokenizer, if it has it."""
    hub = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    model = Path(os.environ.get("HF_HUB_CACHE") or hub) / f"models--{ref.name.replace('/', '--')}"
    branch = model / "refs" / (ref.revision or "main")
    commit = branch.read_text().strip() if branch.is_file() else ref.revision or ""
    folder = model / "snapshots" / commit
    return folder if commit and (folder / "tokenizer_config.json").is_file() else None
