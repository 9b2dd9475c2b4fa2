"""Demonstrations or pairs -> policy, trained in a child process so that its memory comes back (DESIGN 8)."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any

from models import fake_engine
from models.jobs import PreferenceJob, SFTJob, TinyJob, TrainingOutcome
from models.specs import SFT, ModelRef, Preference, PromptTemplate, TinyModel
from models.training_callbacks import read_line
from models.worker import get_ready, run_job
from storage.checkpoints import commit_checkpoint, scratch_folder
from storage.datasets import DatasetRef, data_files, read_rows, write_rows
from storage.rows import ChatPair, Conversation, Demonstration, Pair, TrainingMetric
from tasks.caching import current_key, current_step, log_counts, step
from tasks.recording import Progress, announce, current_iteration, current_split
from tasks.serving import give_back_accelerator, has_accelerator, local_model

log = logging.getLogger("ratchet")


@step(version="1")
def build_base(corpus: DatasetRef, tiny: TinyModel, template: PromptTemplate) -> ModelRef:
    """A tiny model with a tokenizer of its own, trained from scratch on the corpus of demonstrations."""
    job = TinyJob(template=template, rows=_files([corpus]), settings=tiny, **_folders())
    return _trained(job, [corpus], ModelRef(name="tiny base"))


@step(version="1")
def train_sft(
    start: ModelRef,
    demonstrations: tuple[DatasetRef, ...],
    template: PromptTemplate,
    sft: SFT,
    held_out: tuple[DatasetRef, ...] = (),
) -> ModelRef:
    """Fine-tune the starting model on all these demonstrations or conversations, loss on what is to be imitated only.

    Args:
        held_out: demonstrations not trained on; the loss of each of their tasks is logged before and after.
    """
    if fake_engine.is_fake(local_model(start).weights):
        rewards = [reward for ref in demonstrations for reward in _rewards(ref)]
        return _train_fake(start, [reward or 0.0 for reward in rewards], demonstrations)
    job = SFTJob(
        template=template,
        rows=_files(demonstrations),
        held_out=_files(held_out),
        settings=sft,
        **_start(start),
        **_folders(),
    )
    return _trained(job, demonstrations, start)


@step(version="1")
def train_preferences(
    start: ModelRef, pairs: tuple[DatasetRef, ...], template: PromptTemplate, preference: Preference
) -> ModelRef:
    """Train the starting model on pairs; as it starts it is also the reference, frozen."""
    if fake_engine.is_fake(local_model(start).weights):
        rewards = [reward or 0.0 for ref in pairs for reward in _rewards(ref)]
        return _train_fake(start, rewards, pairs)
    job = PreferenceJob(template=template, rows=_files(pairs), settings=preference, **_start(start), **_folders())
    return _trained(job, pairs, start)


def _start(start: ModelRef) -> dict[str, Any]:
    local = local_model(start)
    return {
        "weights": local.weights,
        "revision": start.revision,
        "adapter": local.adapter,
        "chat_template": start.chat_template,
        "trust_remote_code": start.trust_remote_code,
    }


def _files(references: Sequence[DatasetRef]) -> tuple[Path, ...]:
    return tuple(file for reference in references for file in data_files(reference))


def _folders() -> dict[str, Any]:
    scratch = scratch_folder(current_key())  # the same after a kill, so that training goes on from its checkpoint
    return {
        "output": scratch / "model",
        "checkpoints": scratch / "checkpoints",
        "metrics": scratch / "metrics.jsonl",
    }


def _trained(job: SFTJob | PreferenceJob | TinyJob, parents: Sequence[DatasetRef], start: ModelRef) -> ModelRef:
    give_back_accelerator()
    context = copy_context()  # of this step, for the thread that hears the child
    outcome = run_job(job, on_line=lambda line: context.run(_hear, line))
    if not has_accelerator():  # where trainings are short; whether a GPU's memory stays free then is not known
        get_ready(job)
    log_counts({"trained_on": outcome.rows, **outcome.dropped, "optimizer_steps": outcome.optimizer_steps})
    digest = commit_checkpoint(
        job.output,
        step=current_step(),
        parents=[parent.digest for parent in parents],
        settings=job.settings.key(),
        metrics=write_rows(_metrics(outcome), TrainingMetric, step="training_metrics", parents=parents),
        counts={"rows": outcome.rows, **outcome.dropped},
    )
    settings = job.settings
    if not isinstance(settings, TinyModel) and settings.lora is not None and not settings.lora.merge:
        return start.model_copy(update={"adapter": digest})
    return ModelRef(name=f"{current_step()}-{digest[:8]}", digest=digest, trust_remote_code=start.trust_remote_code)


def _hear(line: str) -> None:
    """Pass on what a training prints: to the log, and how far it is to who watches."""
    log.info("%s", line)
    if (told := read_line(line)) is not None:
        announce(
            Progress(
                step=current_step(),
                iteration=current_iteration(),
                done=told.optimizer_step,
                total=told.optimizer_steps,
                tokens=0,
                reused=0,
                split=current_split(),
                unit="optimizer steps",
                detail=told.told,
            )
        )


def _metrics(outcome: TrainingOutcome) -> Iterator[TrainingMetric]:
    for line in outcome.metrics.read_text().splitlines():
        yield TrainingMetric(**json.loads(line))


def _rewards(ref: DatasetRef) -> Iterator[float | None]:
    """How good a fake training takes each row to be; chats of a data set are right."""
    if ref.row_type in (Conversation.__name__, ChatPair.__name__):
        return iter([1.0] * ref.rows)
    if ref.row_type == Pair.__name__:
        return (_taken_for(row) for row in read_rows(ref, Pair))
    return (row.reward for row in read_rows(ref, Demonstration))


def _taken_for(pair: Pair) -> float:
    """How good a fake training takes a chosen side to be: a demonstration is right unless a judge doubts it."""
    if pair.rule == "gold":
        return 1.0 if pair.chosen_reward is None else round(pair.chosen_reward)
    return pair.chosen_reward or 0.0


def _train_fake(start: ModelRef, rewards: Sequence[float], parents: Sequence[DatasetRef]) -> ModelRef:
    folder = scratch_folder(current_key()) / "model"
    share = sum(reward == 1 for reward in rewards) / len(rewards)
    fake_engine.train_fake(local_model(start).weights, share, len(rewards), folder)
    log_counts({"trained_on": len(rewards)})
    digest = commit_checkpoint(folder, step=current_step(), parents=[parent.digest for parent in parents])
    return ModelRef(name=f"fake-{digest[:8]}", digest=digest)
