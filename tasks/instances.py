"""Instances: which queries an instruction is put to, and which instructions are held out of training."""

import random
from collections.abc import Iterator, Sequence
from string import Template

from pydantic import Field, field_validator

from models.specs import Settings
from storage.rows import Instance, Instruction, Prompt
from tasks.instructions import ASKED, with_names
from tasks.prompts import prompt_id


class Combining(Settings):
    """Which queries an instruction is put to, and which instructions nobody is trained on."""

    text: str = "$query\n$instruction"  # the prompt, as trained on and evaluated with
    queries_per_instruction: int = Field(default=1, ge=1)  # the first is the one it was proposed for; the paper: 16
    held_out_queries: int = Field(default=1, ge=1)  # for one of dev or test; intervals take them for independent
    dev_share: float = Field(default=0.1, gt=0, lt=0.5)  # of the instructions
    test_share: float = Field(default=0.1, gt=0, lt=0.5)
    seed: int = Field(default=0, ge=0)

    _names = field_validator("text")(lambda text: with_names(text, {"query", "instruction"}))


def split_of(instructions: Sequence[Instruction], settings: Combining) -> dict[str, str]:
    """instruction_id -> "train", "dev" or "test"; each of the latter two has at least one.

    Raises:
        ValueError: there are fewer than three instructions.
    """
    if len(instructions) < 3:
        raise ValueError(
            f"{len(instructions)} instructions cannot be split into train, dev and test; propose more: more queries, "
            "or a larger proposing.sampling.rollouts_per_prompt"
        )
    shuffled = sorted(row.instruction_id for row in instructions)
    random.Random(f"{settings.seed}:split").shuffle(shuffled)
    dev, test = (max(1, round(share * len(shuffled))) for share in (settings.dev_share, settings.test_share))
    splits = {name: "train" for name in shuffled}
    return splits | dict.fromkeys(shuffled[:dev], "dev") | dict.fromkeys(shuffled[dev : dev + test], "test")


def combine(
    instructions: Sequence[Instruction], queries: Sequence[Prompt], split: str, settings: Combining
) -> Iterator[Instance]:
    """Instances of one split: each of its instructions with queries of that split.

    In training the first query is the one that the instruction was proposed for.
    """
    splits, by_id = split_of(instructions, settings), {query.prompt_id: query for query in queries}
    wanted = settings.queries_per_instruction if split == "train" else settings.held_out_queries
    for row in instructions:
        if splits[row.instruction_id] != split:
            continue
        own = [by_id[row.query_id]] if split == "train" else []
        for query in [*own, *_others(row, queries, wanted - len(own), settings)]:
            prompt = Template(settings.text).substitute(query=query.prompt, instruction=row.instruction)
            yield Instance(
                prompt_id=prompt_id(ASKED, prompt),
                instruction_id=row.instruction_id,
                query_id=query.prompt_id,
                prompt=prompt,
                query=query.prompt,
                instruction=row.instruction,
                split=split,
            )


def _others(row: Instruction, queries: Sequence[Prompt], count: int, settings: Combining) -> list[Prompt]:
    rng = random.Random(f"{settings.seed}:{row.instruction_id}")
    drawn = rng.sample(queries, min(count + 1, len(queries))) if count > 0 else []
    return [query for query in drawn if query.prompt_id != row.query_id][:count]
