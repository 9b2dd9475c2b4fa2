"""A supervisor looks again: at verifiers, translated back into instructions, and at completions, as a judge."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from storage.datasets import DatasetRef, read_rows, write_rows
from storage.rows import BackTranslation, CheckedVerifier, Instance, Instruction, Prompt, Rollout, ScoredRollout
from tasks import supervision as rules
from tasks.caching import log_counts, step
from tasks.instructions import SHOWN
from tasks.supervising import SupervisorError
from tasks.supervision import Relevance, Translating


@step(version="1", rows=lambda checked, settings: checked.rows)
def ask_back_translations(checked: DatasetRef, settings: Translating) -> DatasetRef:
    """What the supervisor is asked about each verifier that was kept."""
    asked = (rules.ask_back(row, settings) for row in read_rows(checked, CheckedVerifier) if row.kept)
    return write_rows(_once(asked), Prompt, step="asked", parents=[checked], settings=settings.key())


@step(version="1", rows=lambda checked, instructions, backs, settings: checked.rows)
def ask_to_compare(
    checked: DatasetRef, instructions: DatasetRef, backs: DatasetRef, settings: Translating
) -> DatasetRef:
    """What the supervisor is asked about each instruction beside what its verifier says it is.

    Raises:
        SupervisorError: no verifier could be translated back.
    """
    told, back_of = _instructions(instructions), _backs(backs)
    asked = [
        rules.ask_to_compare(told[row.instruction_id], text, settings)
        for row in read_rows(checked, CheckedVerifier)
        if row.kept and (text := _said(back_of[rules.ask_back(row, settings).prompt_id]))
    ]
    if not asked:
        raise SupervisorError(
            f"none of {backs.rows:,} replies says what its verifier checks; reword back_translation.text, take a more "
            "capable supervisor, or leave back_translation out"
        )
    return write_rows(_once(asked), Prompt, step="asked", parents=[checked, backs], settings=settings.key())


@step(version="1", rows=lambda checked, instructions, backs, compared, settings: checked.rows)
def read_comparisons(
    checked: DatasetRef, instructions: DatasetRef, backs: DatasetRef, compared: DatasetRef, settings: Translating
) -> DatasetRef:
    """How the instruction that each kept verifier says it checks fits the real one.

    Raises:
        SupervisorError: the supervisor left too many open.
    """
    told, back_of, verdict_of = _instructions(instructions), _backs(backs), _backs(compared)
    rows = []
    for row in read_rows(checked, CheckedVerifier):
        if not row.kept:
            continue
        instruction, back = told[row.instruction_id], back_of[rules.ask_back(row, settings).prompt_id]
        text = _said(back)
        asked = rules.ask_to_compare(instruction, text, settings).prompt_id if text else ""
        rows.append(rules.back_translation(row, instruction, back, verdict_of.get(asked)))
    reasons = Counter(row.verdict or row.reason for row in rows)
    log_counts(reasons)
    open_ = [row for row in rows if row.verdict is None]
    if len(open_) > settings.maximum_unreadable * len(rows):
        first = "\n".join(f"  {row.reason}: {row.back[:200]!r}" for row in open_[:SHOWN])
        raise SupervisorError(
            f"the supervisor left {len(open_):,} of {len(rows):,} back-translations open, and back_translation."
            f"maximum_unreadable is {settings.maximum_unreadable:g}. The first:\n{first}\n"
            "Reword back_translation.compare, take a more capable supervisor, or leave back_translation out."
        )
    return write_rows(rows, BackTranslation, step="back_translations", parents=[checked, backs, compared])


@step(version="1", rows=lambda checked, translations, settings, minimum_verifiers: checked.rows)
def drop_contradicted(
    checked: DatasetRef, translations: DatasetRef, settings: Translating, minimum_verifiers: int
) -> DatasetRef:
    """The verifiers, without those that check something else than their instruction asks for."""
    verdicts = {row.verifier_id: row for row in read_rows(translations, BackTranslation)}
    by_instruction: dict[str, list[CheckedVerifier]] = {}
    for row in read_rows(checked, CheckedVerifier):
        by_instruction.setdefault(row.instruction_id, []).append(row)
    rows = [
        row
        for group in by_instruction.values()
        for row in rules.after_translation(group, verdicts, settings, minimum_verifiers)
    ]
    log_counts(Counter(row.reason for row in rows))
    return write_rows(rows, CheckedVerifier, step="checked", parents=[checked, translations], settings=settings.key())


@step(version="1", rows=lambda scored, instances, settings, minimum: scored.rows)
def ask_the_judge(scored: DatasetRef, instances: DatasetRef, settings: Relevance, minimum: float) -> DatasetRef:
    """What the judge is asked about each different completion whose reward is at least the minimum.

    Raises:
        SupervisorError: there is none.
    """
    by_id = {row.prompt_id: row for row in read_rows(instances, Instance)}
    rows = (row for row in read_rows(scored, ScoredRollout) if row.reward is not None and row.reward >= minimum)
    asked = list(_once(rules.ask_the_judge(row, by_id[row.prompt_id], settings) for row in rows))
    if not asked:
        first = islice(read_rows(scored, ScoredRollout), SHOWN)
        told = "\n".join(f"  {row.reason}: {row.completion[:200]!r}" for row in first)
        raise SupervisorError(
            f"none of {scored.rows:,} completions passes {minimum:g} of its verifiers, so there is nothing to judge "
            f"and nothing to choose. The first:\n{told}\nStart from a policy that follows instructions at times, draw "
            "more completions, or lower pairing.chosen_minimum."
        )
    return write_rows(asked, Prompt, step="asked", parents=[scored], settings=settings.key())


@step(version="1", rows=lambda scored, instances, replies, settings: scored.rows)
def apply_judge(scored: DatasetRef, instances: DatasetRef, replies: DatasetRef, settings: Relevance) -> DatasetRef:
    """The scored completions, without a reward where they do not answer their query.

    Raises:
        SupervisorError: the judge gave too few numbers.
    """
    by_id = {row.prompt_id: row for row in read_rows(instances, Instance)}
    said = _backs(replies)
    mute = [row for row in said.values() if rules.read_rating(row.completion) is None]
    counts = Counter({"judged": len(said), "no number": len(mute)})
    if len(mute) > settings.maximum_unreadable * len(said):
        first = "\n".join(f"  {row.completion[:200]!r}" for row in mute[:SHOWN])
        raise SupervisorError(
            f"the judge gave no number from 0 to 10 in {len(mute):,} of {len(said):,} replies, and judge."
            f"maximum_unreadable is {settings.maximum_unreadable:g}. The first:\n{first}\n"
            "Reword judge.text, take a more capable supervisor, or leave judge out."
        )

    def rows() -> Iterator[ScoredRollout]:
        for row in read_rows(scored, ScoredRollout):
            asked = rules.ask_the_judge(row, by_id[row.prompt_id], settings)
            after = rules.judged(row, said.get(asked.prompt_id), settings)
            counts["refused"] += after is not row
            yield after

    reference = write_rows(rows(), ScoredRollout, step="scored", parents=[scored, replies], settings=settings.key())
    log_counts(+counts)
    return reference


def _instructions(instructions: DatasetRef) -> dict[str, str]:
    return {row.instruction_id: row.instruction for row in read_rows(instructions, Instruction)}


def _backs(replies: DatasetRef) -> dict[str, Rollout]:
    """The first reply to each asking."""
    first: dict[str, Rollout] = {}
    for row in read_rows(replies, Rollout):
        first.setdefault(row.prompt_id, row)
    return first


def _said(reply: Rollout) -> str:
    return reply.completion.strip() if reply.finish_reason == "stop" else ""


def _once(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
    seen: set[str] = set()
    for row in prompts:
        if row.prompt_id not in seen:
            seen.add(row.prompt_id)
            yield row
