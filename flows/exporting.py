"""`ratchet export`: a policy or a data set as a folder that other tools and a hub take."""

from pathlib import Path
from typing import Annotated

import typer

from flows.console import HomeOption, fail, out, use_home
from storage.datasets import DatasetError


def export(
    reference: Annotated[
        str,
        typer.Argument(help="datasets/<step>/<digest>; or a policy: an experiment, experiment:2, models/<digest>"),
    ],
    to: Annotated[Path, typer.Option("--to", help="a new folder; its name is the name on the card")],
    format_: Annotated[
        str | None,
        typer.Option("--format", help="of a data set: trl, axolotl, llama-factory, verl, openrlhf or jsonl"),
    ] = None,
    licence: Annotated[str | None, typer.Option(help="SPDX id for the card")] = None,
    push: Annotated[
        str | None, typer.Option(metavar="REPO", help="upload it to the Hugging Face hub; the token is HF_TOKEN's")
    ] = None,
    home_: HomeOption = None,
) -> None:
    """Write a policy or a data set for other tools, with a card made from the record."""
    use_home(home_)
    from storage.publishing import PublishingError, push_folder
    from tasks.exporting import export_dataset, export_policy
    from tasks.exports import FORMATS

    if format_ is not None and format_ not in FORMATS:
        fail(f"there is no format {format_!r}; there are: {', '.join(FORMATS)}", 2)
    try:
        if format_ is None:
            export_policy(reference, to, licence)
        else:
            export_dataset(reference, FORMATS[format_], to, licence)
        out.print(str(to), soft_wrap=True)
        if push is not None:
            out.print(push_folder(to, push, "model" if format_ is None else "dataset"), soft_wrap=True)
    except (ValueError, DatasetError) as error:
        also = " (a data set wants --format)" if format_ is None and reference.startswith("datasets/") else ""
        fail(f"{error}{also}", 2)
    except PublishingError as error:
        fail(str(error), 1)
