"""Rows -> the records that other training tools read, and what those tools are told about them.

Layouts, as the tools' own documentation and loaders have them (looked up November 2026):
- TRL 1.16, docs "Dataset formats and types": conversational `messages`, `prompt`/`completion`,
  `prompt`/`chosen`/`rejected`, each a list of {role, content}.
- axolotl, docs/dataset-formats/conversation.qmd (`type: chat_template`) and docs/rlhf.qmd (`chat_template.default`).
- LLaMA-Factory, data/README.md: sharegpt formatting with tags for role and content; `ranking` for pairs.
- verl, docs/preparation/prepare_data.rst (prompts), `messages` of its multi-turn SFT data set, and
  verl/utils/dataset/rm_dataset.py, which reads pairs as plain text.
- OpenRLHF, openrlhf/datasets/sft_dataset.py and reward_dataset.py with --apply_chat_template.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Literal, get_args

from storage.rows import ChatPair, Conversation, Demonstration, Pair, Prompt, Row

Format = Literal["trl", "axolotl", "llama-factory", "verl", "openrlhf", "jsonl"]
FORMATS: dict[str, Format] = {name: name for name in get_args(Format)}
Record = dict[str, Any]
KINDS: dict[type[Row], str] = {
    Conversation: "conversations",
    Demonstration: "conversations",
    ChatPair: "pairs",
    Pair: "pairs",
    Prompt: "prompts",
}
ROLES = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}


def check_format(row_type: type[Row], format_: Format) -> None:
    """Whether rows of this type can be written in this format.

    Raises:
        ValueError: they cannot; says which formats can.
    """
    if format_ == "jsonl":
        return
    if row_type not in KINDS:
        raise ValueError(
            f"{row_type.__name__} rows are nothing that {format_} trains on; export them with --format jsonl, or the "
            f"data set they became: {', '.join(sorted(one.__name__ for one in KINDS))} rows"
        )
    if KINDS[row_type] == "prompts" and format_ in ("axolotl", "llama-factory"):
        raise ValueError(f"{format_} has no format for prompts without completions; use trl, verl, openrlhf or jsonl")


def record(row: Row, format_: Format, index: int) -> Record:
    """The row as the tool reads it.

    Args:
        index: the row's place in the data set.
    Raises:
        ValueError: the format cannot hold this row.
    """
    if format_ == "jsonl":
        return asdict(row)
    kind = KINDS[type(row)]
    writers: dict[str, Callable[[Any, Format, int], Record]] = {
        "conversations": _conversation,
        "pairs": _pair,
        "prompts": _prompt,
    }
    return writers[kind](row, format_, index) | _origin(row)


def extra_files(row_type: type[Row], format_: Format, name: str) -> dict[str, Mapping[str, Any]]:
    """Files that a tool wants beside the data: their names, and what they hold as YAML or JSON."""
    kind = KINDS.get(row_type)
    if format_ == "axolotl" and kind == "conversations":
        return {"axolotl.yaml": {"datasets": [_axolotl(type="chat_template", roles_to_train=["assistant"])]}}
    if format_ == "axolotl":
        fields = {"field_chosen": "chosen", "field_rejected": "rejected"}
        return {"axolotl.yaml": {"rl": "dpo", "datasets": [_axolotl(type="chat_template.default", **fields)]}}
    if format_ == "llama-factory":
        pairs = {"chosen": "chosen", "rejected": "rejected"} if kind == "pairs" else {}
        described: Record = {"file_name": "data", "formatting": "sharegpt"}
        described |= {"ranking": True} if kind == "pairs" else {}
        described |= {"columns": {"messages": "messages", **pairs}, "tags": {**ROLES, "system_tag": "system"}}
        return {"dataset_info.json": {name: described}}
    return {}


def how_to_use(row_type: type[Row], format_: Format, name: str) -> str:
    """The settings with which the tool reads the folder."""
    kind = KINDS.get(row_type, "rows")
    told = {
        ("trl", "conversations"): "`load_dataset`, then `SFTTrainer`; with `assistant_only_loss=True` for `messages`",
        ("trl", "pairs"): "`load_dataset`, then `DPOTrainer`",
        ("trl", "prompts"): "`load_dataset`, then `GRPOTrainer`; the gold answer is in `answer`",
        ("axolotl", "conversations"): "the `datasets` section of `axolotl.yaml`",
        ("axolotl", "pairs"): "the `rl` and `datasets` sections of `axolotl.yaml`",
        ("llama-factory", "conversations"): f"`dataset_dir` is this folder, `dataset: {name}`",
        ("llama-factory", "pairs"): f"`dataset_dir` is this folder, `dataset: {name}`, `stage: dpo`",
        ("verl", "conversations"): "`data.multiturn.enable=true data.multiturn.messages_key=messages`",
        ("verl", "pairs"): "`RMDataset` with its own keys; plain text",
        ("verl", "prompts"): "`data.prompt_key=prompt`; `reward_model.ground_truth` is the gold answer",
        ("openrlhf", "conversations"): "`--input_key messages --apply_chat_template --multiturn`",
        (
            "openrlhf",
            "pairs",
        ): "`--prompt_key prompt --apply_chat_template`",
        ("openrlhf", "prompts"): "`--input_key prompt --label_key label --apply_chat_template`",
    }
    return told.get((format_, kind), "one JSON object a line, the columns as Ratchet stores them")


def _conversation(row: Conversation | Demonstration, format_: Format, index: int) -> Record:
    if isinstance(row, Demonstration) and format_ == "trl":
        return {"prompt": [_said("user", row.prompt)], "completion": [_said("assistant", row.completion)]}
    return {"messages": _messages(row)}


def _pair(row: ChatPair | Pair, format_: Format, index: int) -> Record:
    messages, sides = _messages(row), {"chosen": row.chosen, "rejected": row.rejected}
    if format_ == "verl":
        if len(messages) != 1:
            raise ValueError(
                f"row {index} has a prompt of {len(messages)} messages, and verl reads pairs as plain text; use trl, "
                "axolotl, llama-factory, openrlhf or jsonl"
            )
        return {"prompt": messages[0]["content"], **sides}
    if format_ in ("axolotl", "llama-factory"):
        return {"messages": messages, **{name: _said("assistant", text) for name, text in sides.items()}}
    return {"prompt": messages, **{name: [_said("assistant", text)] for name, text in sides.items()}}


def _prompt(row: Prompt, format_: Format, index: int) -> Record:
    asked = [_said("user", row.prompt)]
    if format_ == "verl":
        return {
            "data_source": row.source,
            "prompt": asked,
            "ability": "math" if row.answer is not None else "general",
            "reward_model": {"style": "rule", "ground_truth": row.answer},
            "extra_info": {"index": index, "prompt_id": row.prompt_id},
        }
    return {"prompt": asked, "label" if format_ == "openrlhf" else "answer": row.answer}


def _messages(row: Conversation | Demonstration | ChatPair | Pair) -> list[Record]:
    if isinstance(row, Demonstration):
        return [_said("user", row.prompt), _said("assistant", row.completion)]
    if isinstance(row, Pair):
        return [_said("user", row.prompt)]
    return [_said(role, text) for role, text in zip(row.roles, row.contents, strict=True)]


def _said(role: str, content: str) -> Record:
    return {"role": role, "content": content}


def _axolotl(**fields: Any) -> Record:
    mapping = {"role": "role", "content": "content"}
    return {"path": "data", "ds_type": "parquet", **fields, "field_messages": "messages"} | {
        "message_property_mappings": mapping
    }


def _origin(row: Row) -> Record:
    return {"source": row.source, "licence": row.licence} if isinstance(row, Conversation | ChatPair) else {}
