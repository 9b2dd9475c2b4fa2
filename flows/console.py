"""The terminal as the command's parts share it: two consoles, common options, and how a command fails."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

WIDTH = None if sys.stdout.isatty() else 140  # a log file is read in a wide window
out = Console(highlight=False, emoji=False, width=WIDTH)
err = Console(stderr=True, highlight=False, emoji=False, width=WIDTH, soft_wrap=True)

HomeOption = Annotated[
    str | None, typer.Option("--home", help="folder or URL where everything is kept; else RATCHET_HOME")
]
PresetArgument = Annotated[Path, typer.Argument(help="a preset, for instance deployments/presets/rest_em/tiny.yaml")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="a.b=c, over the preset; may be given again")]
JsonOption = Annotated[bool, typer.Option("--json", help="for programs")]


def use_home(folder: str | None) -> None:
    """Let the home be this folder or URL, if one is named, and bring this machine's copy of a URL up to date.

    Where that cannot be done, the command fails.
    """
    name_home(folder)
    if "://" in os.environ.get("RATCHET_HOME", ""):
        from storage.opening import open_home

        try:
            open_home()
        except (OSError, ValueError) as error:
            fail(str(error), 2)


def name_home(folder: str | None) -> None:
    """Let the home be this folder or URL, if one is named."""
    if folder is not None:
        os.environ["RATCHET_HOME"] = folder


def print_json(value: Any) -> None:
    """Write a value for programs."""
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def fail(message: str, code: int) -> NoReturn:
    """End the command with a message and an exit code."""
    err.print(message, style="red", markup=False)
    raise typer.Exit(code)
