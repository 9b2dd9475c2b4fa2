"""What a data set card and a model card say, from the record alone: front matter for the Hub, then Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from storage.experiments import IterationRecord


class Share(NamedTuple):
    """Rows of one source."""

    source: str
    licence: str
    rows: int


class DatasetFacts(NamedTuple):
    """What a data set card tells."""

    name: str
    reference: str  # datasets/<step>/<digest>
    row_type: str
    rows: int
    format: str
    use: str
    shares: Sequence[Share]
    parents: Sequence[str]
    settings: str  # YAML
    data_files: str  # a pattern


class ModelFacts(NamedTuple):
    """What a model card tells."""

    name: str
    identity: str
    experiment: str
    recipe: str
    label: str  # in the report
    base: str
    trained_on: Sequence[str]
    settings: str  # YAML
    rows: Mapping[str, int]
    iterations: Sequence[IterationRecord]
    decision: str
    drops: Mapping[str, int]
    versions: Mapping[str, str]
    licence: str | None
    adapter: bool


def dataset_front_matter(facts: DatasetFacts, licence: str | None) -> dict[str, Any]:
    """The fields that the Hub reads of a data set card."""
    front: dict[str, Any] = {} if (known := licence or _one_licence(facts.shares)) is None else {"license": known}
    front |= {"tags": ["ratchet", facts.format], "size_categories": [_size(facts.rows)]}
    files = [{"split": "train", "path": facts.data_files}]
    return front | {"configs": [{"config_name": "default", "data_files": files}]}


def dataset_card(facts: DatasetFacts) -> str:
    """The text of a data set card."""
    shares = _table(("source", "licence", "rows"), [(one.source, one.licence, f"{one.rows:,}") for one in facts.shares])
    return _page(
        f"# {facts.name}",
        f"{facts.rows:,} {facts.row_type} rows made with Ratchet, `{facts.reference}`, written for **{facts.format}**.",
        f"How to read it: {facts.use}.",
        "## Sources and licences",
        shares or "The rows name no source; see the lineage.",
        "A licence that is unclear here is unclear for you as well. The rows are as their sources have them, and may "
        "hold text that other models wrote, whose terms apply." if facts.shares else "",
        "## Lineage",
        _list(facts.parents) or "Made from its sources directly.",
        "## Settings",
        _fenced(facts.settings, "yaml"),
    )  # fmt: skip


def model_front_matter(facts: ModelFacts) -> dict[str, Any]:
    """The fields that the Hub reads of a model card."""
    front: dict[str, Any] = {} if facts.licence is None else {"license": facts.licence}
    if "/" in facts.base and not facts.base.startswith((".", "/")):
        front["base_model"] = facts.base.partition("@")[0]
    front |= {"library_name": "peft" if facts.adapter else "transformers", "pipeline_tag": "text-generation"}
    return front | {"tags": ["ratchet", facts.recipe]}


def model_card(facts: ModelFacts) -> str:
    """The text of a model card."""
    dropped = ", ".join(f"{reason}: {count:,}" for reason, count in facts.drops.items())
    licence = facts.licence or (
        "Not stated. The licence of the base and of the data apply; see the data sets' own cards for the latter."
    )
    return _page(
        f"# {facts.name}",
        f"`{facts.label}` of the experiment `{facts.experiment}` (recipe `{facts.recipe}`), made with Ratchet. "
        f"Identity: `{facts.identity}`.",
        f"## Base\n\n{facts.base}",
        "## Data",
        _list(facts.trained_on) or "None: this is the base.",
        f"Rows: {', '.join(f'{name} {count:,}' for name, count in facts.rows.items())}." if facts.rows else "",
        f"Left out: {dropped}." if dropped else "",
        "## Results",
        _results(facts),
        "In percent, with 95 % intervals and the number of prompts or documents, which is smaller than the benchmark's "
        "own where the settings limit it.",
        f"## Decision\n\n{facts.decision}",
        "## Settings of the training",
        _fenced(facts.settings, "yaml"),
        "## How to reproduce",
        "The experiment's settings are in `preset.yaml`: `ratchet run preset.yaml`. Versions where it was exported: "
        + ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        + ".",
        f"## Licence\n\n{licence}",
    )


def _results(facts: ModelFacts) -> str:
    strategies = list(dict.fromkeys(name for one in facts.iterations for name in one.metrics))
    rows = []
    for one in facts.iterations:
        cells = [_figure(one.metrics.get(name)) for name in strategies]
        rows.append((f"**{one.label}**" if one.label == facts.label else one.label, *cells))
    return _table(("policy", *strategies), rows) or "None."


def _figure(metric: Mapping[str, Any] | None) -> str:
    if metric is None:
        return "-"
    return f"{100 * metric['value']:.1f} ({100 * metric['low']:.1f} to {100 * metric['high']:.1f}, n {metric['n']})"


def _one_licence(shares: Sequence[Share]) -> str | None:
    """The licence all rows share; None: there is more than one, or one that is not clear or not a public one."""
    licences = {one.licence.lower() for one in shares}
    only = next(iter(licences)) if len(licences) == 1 else ""
    return only if only and only != "own" and not only.startswith("unclear") else None


def _size(rows: int) -> str:
    """The Hub's size category."""
    bounds = [(1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M")]
    return next((name for bound, name in bounds if rows < bound), "1M<n<10M")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [head, *rows]]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _list(items: Sequence[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _page(*parts: str) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"
