"""Presets as configs, whole runs without Prefect, and what a run stored in a form that can be compared."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from flows.presets import Preset
from flows.rest_em import RestEM, rest_em
from models.fake_engine import CHECKPOINT
from storage.datasets import DatasetRef, what_is_wrong
from storage.experiments import Experiment, StepRecord
from tasks.recording import Progress, listening

REPOSITORY = Path(__file__).parents[2]
PRESETS = REPOSITORY / "deployments" / "presets"
SMOKE = PRESETS / "rest_em" / "smoke.yaml"
MARK = "RATCHET_TEST_MARK"


def config_of(preset: Path, *overrides: str) -> RestEM:
    """A preset's config."""
    return Preset(preset, overrides).config(RestEM)


def run_plainly(*overrides: str) -> Experiment:
    """Run the smoke preset without Prefect."""
    config = config_of(SMOKE, *overrides)
    rest_em.fn(config)
    return Experiment(config.experiment)


def train_noised(_weights: str, _share: float, _rows: int, output: Path) -> None:
    """In place of the fake training: what it leaves has lost nearly all skill."""
    output.mkdir(parents=True, exist_ok=True)
    (output / CHECKPOINT).write_text('{"skill": 0.02}\n')


def stored(experiment: Experiment) -> dict[str, Any]:
    """What an experiment's iterations made, by content: equal for runs with equal settings, wherever they ran."""
    return {
        record.label: (record.policy, record.references, record.metrics, record.funnel, record.drops, record.promoted)
        for record in experiment.iterations()
    }


def damaged(experiment: Experiment) -> list[str]:
    """What is wrong with the data sets that an experiment refers to."""
    references = [ref for record in experiment.iterations() for ref in record.references.values()]
    return [told for ref in references if (told := what_is_wrong(DatasetRef(**ref), deep=True))]


@contextmanager
def heard() -> Iterator[list[StepRecord]]:
    """The steps that finish meanwhile."""
    records: list[StepRecord] = []

    def listen(event: StepRecord | Progress) -> None:
        if isinstance(event, StepRecord):
            records.append(event)

    with listening(listen):
        yield records


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file and folder with size and time of last change: equal when nothing was written."""
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*"))}


def processes_marked(mark: str) -> list[str]:
    """The command lines of living processes that were started, directly or not, with this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(" ".join(process.cmdline()))
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found
