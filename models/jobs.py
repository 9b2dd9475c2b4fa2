"""Trainings as data: what a child process is given to do, and what it says came of it."""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import Field

from models.specs import SFT, Preference, PromptTemplate, Settings, TinyModel


class Job(Settings):
    """What all trainings have in common."""

    rows: tuple[Path, ...] = Field(min_length=1)  # Parquet files
    template: PromptTemplate = PromptTemplate()
    output: Path  # folder that receives the model, or the adapter
    checkpoints: Path  # folder for work in progress; delete it when the job is done
    metrics: Path  # JSON lines: optimizer_step, name, value


class PolicyJob(Job):
    """A training that starts from a policy."""

    weights: str  # folder or hub name
    revision: str | None = None  # hub commit
    adapter: Path | None = None  # folder of a LoRA adapter on top of the weights
    chat_template: str | None = None
    trust_remote_code: bool = False


class SFTJob(PolicyJob):
    """Train on demonstrations: columns prompt, completion."""

    kind: Literal["sft"] = "sft"
    settings: SFT
    held_out: tuple[Path, ...] = ()  # Parquet files like `rows`, not trained on: their loss is logged for each task


class PreferenceJob(PolicyJob):
    """Train on pairs: columns prompt, chosen, rejected. The reference is the policy as it starts."""

    kind: Literal["preference"] = "preference"
    settings: Preference


class TinyJob(Job):
    """Build the tiny model from demonstrations (models/tiny.py)."""

    kind: Literal["tiny"] = "tiny"
    settings: TinyModel


TrainingJob = Annotated[SFTJob | PreferenceJob | TinyJob, Field(discriminator="kind")]


class TrainingOutcome(NamedTuple):
    """What a training did. The weights are in the job's output folder."""

    optimizer_steps: int
    rows: int  # trained on
    dropped: dict[str, int]  # reason -> rows left out
    tokens: int  # seen, over all epochs, padding not counted
    seconds: float  # of optimizer steps, without loading and saving
    metrics: Path
