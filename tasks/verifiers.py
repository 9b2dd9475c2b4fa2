"""Verifiers and cases: how a supervisor is asked for them, apart from each other, and what is read off its replies.

A verifier is Python source that defines `evaluate(response)`. A case is a made-up response with whether it follows the
instruction. The two are written in conversations of their own, else a case would only repeat its verifier's mistakes
(METHODS 5.6.4).
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from string import Template
from typing import NamedTuple

from pydantic import Field, field_validator

from models.specs import Sampling, Settings
from storage.rows import Instruction, Prompt, Rollout, Verifier, VerifierCase
from tasks.instructions import SHOWN, Read, asked, identity, with_names
from tasks.selection import same_text

LONGEST_SOURCE = 20_000  # characters; what is longer is no short function
LONGEST_RESPONSE = 20_000
NAME = "evaluate"

_FENCE = re.compile(r"```[ \t]*(?P<language>[\w+#.-]*)[^\n]*\n(?P<code>.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_PYTHON = frozenset({"", "py", "py3", "python", "python3"})
_BEGINS_CODE = re.compile(r"^\s*(?:def|function|public|fn|func|import|from|class|const|let|var)\b", re.MULTILINE)


class WritingVerifiers(Settings):
    """How verifiers are asked for. Defaults: seed 4, four an instruction (METHODS 5.2)."""

    not_in_key = frozenset({"maximum_unreadable"})

    text: str = (
        "Write a Python function `evaluate(response)` that takes an answer as a string and returns True if it follows "
        "the instruction, else False. Judge the instruction only, not whether the query is answered well; accept every "
        "sensible reading of it; use the standard library alone; let nothing raise. An example, for the instruction "
        '"Use the letter q at least twice.":\n\n'
        "```python\n"
        "def evaluate(response):\n"
        "    # the letter counts in either case\n"
        '    return response.lower().count("q") >= 2\n'
        "```\n\n"
        "Query: $query\nInstruction: $instruction\n\nReply with one Python code block and nothing else."
    )
    sampling: Sampling = Sampling(
        rollouts_per_prompt=4, temperature=1.0, top_k=-1, max_completion_tokens=1024, stop=(), seed=43
    )
    maximum_unreadable: float = Field(default=0.5, ge=0, le=1)  # share of the replies that hold no verifier

    _names = field_validator("text")(lambda text: with_names(text, {"query", "instruction"}))


class WritingCases(Settings):
    """How cases are asked for. Defaults: seed 4, four times two an instruction (METHODS 5.2)."""

    not_in_key = frozenset({"maximum_unreadable"})

    text: str = (
        "Somebody checks by program whether answers follow an instruction, and needs answers to try the program on. "
        "Write two answers: one that follows the instruction and one that does not, but nearly. Write each as a JSON "
        "object on a line of its own, as in\n\n"
        '{"response": "Quick quiz: quote me.", "result": true}\n'
        '{"response": "One q is here.", "result": false}\n\n'
        'which are for "Use the letter q at least three times." Line breaks in an answer are written as \\n.\n\n'
        "Query: $query\nInstruction: $instruction\n\nReply with the two lines and nothing else."
    )
    sampling: Sampling = Sampling(
        rollouts_per_prompt=4, temperature=1.0, top_k=-1, max_completion_tokens=1024, stop=(), seed=44
    )
    maximum_unreadable: float = Field(default=0.5, ge=0, le=1)  # share of the replies that hold no case

    _names = field_validator("text")(lambda text: with_names(text, {"query", "instruction"}))


class Source(NamedTuple):
    """The code of a reply, or why there is none."""

    code: str | None
    reason: str


class Cases(NamedTuple):
    """The cases of a reply, and what its lines were, by reason."""

    cases: list[tuple[str, bool]]
    reasons: Counter[str]


def ask_about(row: Instruction, settings: WritingVerifiers | WritingCases) -> Prompt:
    """What the supervisor is asked about an instruction."""
    return asked(Template(settings.text).substitute(query=row.query, instruction=row.instruction))


def read_verifier(reply: Rollout) -> Source:
    """The first Python code block of a reply; code that does not define `evaluate` is none."""
    if reply.finish_reason == "error":
        return Source(None, "engine error")
    if reply.finish_reason == "length":
        return Source(None, "truncated")
    blocks = list(_FENCE.finditer(reply.completion))
    if not blocks:
        return Source(None, "no code fence" if _BEGINS_CODE.search(reply.completion) else "prose")
    python = [block["code"] for block in blocks if block["language"].lower() in _PYTHON]
    if not python:
        return Source(None, "code in another language")
    trees = [(code, _parsed(code)) for code in python if len(code) <= LONGEST_SOURCE]
    if not trees:
        return Source(None, "too long")
    for code, tree in trees:
        if tree is not None and _defines_evaluate(tree):
            return Source(code, "read")
    return Source(None, "not Python" if all(tree is None for _, tree in trees) else f"no {NAME}")


def verifiers_of(
    replies: Iterable[Rollout], instructions: Mapping[str, Instruction], read: Read, counts: Counter[str]
) -> Iterator[Verifier]:
    """Distinct verifiers, in the replies' order; two that differ in layout and comments only are one.

    Args:
        instructions: what was asked about, by the prompt_id of the asking.
    """
    seen: set[str] = set()
    for reply in replies:
        source, reason = read_verifier(reply)
        read.reasons[reason] += 1
        if source is None:
            if len(read.offending) < SHOWN:
                read.offending.append(f"{reason}: {reply.completion[:200]!r}")
            continue
        instruction_id = instructions[reply.prompt_id].instruction_id
        verifier_id = identity(instruction_id, _same_code(source))
        counts["duplicate" if verifier_id in seen else "verifiers"] += 1
        if verifier_id not in seen:
            seen.add(verifier_id)
            yield Verifier(verifier_id=verifier_id, instruction_id=instruction_id, source=source, writer=reply.policy)


def read_cases(reply: Rollout) -> Cases:
    """The cases of a reply, one JSON object a line; anything else is counted by reason."""
    if reply.finish_reason == "error":
        return Cases([], Counter({"engine error": 1}))
    cases: list[tuple[str, bool]] = []
    reasons: Counter[str] = Counter()
    lines = [line.strip().rstrip(",") for line in reply.completion.splitlines()]
    objects = [line for line in lines if line.startswith("{")]
    if reply.finish_reason == "length" and objects and not objects[-1].endswith("}"):
        objects.pop()
        reasons["truncated"] += 1
    for line in objects:
        case = _case_of(line)
        reasons["read" if isinstance(case, tuple) else case] += 1
        if isinstance(case, tuple):
            cases.append(case)
    if not objects and not reasons:
        reasons["prose" if reply.completion.strip() else "empty"] += 1
    return Cases(cases, reasons)


def cases_of(
    replies: Iterable[Rollout], instructions: Mapping[str, Instruction], read: Read, counts: Counter[str]
) -> Iterator[VerifierCase]:
    """Distinct cases, in the replies' order; a response that is expected to pass and to fail is neither.

    Args:
        instructions: what was asked about, by the prompt_id of the asking.
    """
    rows: dict[tuple[str, str], VerifierCase | None] = {}
    for reply in replies:
        cases, reasons = read_cases(reply)
        main = "read" if cases else next(iter(reasons))
        read.reasons[main] += 1
        counts.update({f"line: {reason}": count for reason, count in reasons.items() if cases and reason != "read"})
        if not cases and len(read.offending) < SHOWN:
            read.offending.append(f"{main}: {reply.completion[:200]!r}")
        for response, expected in cases:
            instruction_id = instructions[reply.prompt_id].instruction_id
            key = (instruction_id, same_text(response))
            if key not in rows:
                rows[key] = VerifierCase(
                    instruction_id=instruction_id, response=response, expected=expected, writer=reply.policy
                )
            elif (twin := rows[key]) is not None and twin.expected is not expected:
                rows[key] = None
            else:
                counts["duplicate"] += 1
    counts["expected both ways"] += sum(row is None for row in rows.values())
    kept = [row for row in rows.values() if row is not None]
    counts["cases"] += len(kept)
    yield from kept


def _case_of(line: str) -> tuple[str, bool] | str:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return "broken JSON"
    response, expected = (found.get("response"), found.get("result")) if isinstance(found, dict) else (None, None)
    if not isinstance(response, str) or len(response) > LONGEST_RESPONSE:
        return "no response text"
    try:
        response.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return "no response text"
    return (response, expected) if isinstance(expected, bool) else "result is no boolean"


def _parsed(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: nested too deeply
        return None


def _defines_evaluate(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == NAME for node in tree.body)


def _same_code(source: str) -> str:
    """What two sources share that differ in layout and comments only."""
    try:
        return ast.dump(ast.parse(source))
    except (RecursionError, MemoryError):
        return source
