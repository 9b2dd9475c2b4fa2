"""What the documentation says is so: its commands run, its settings validate, its links lead somewhere.

A page's blocks are run in order, in a copy of the repository. `<!-- slow: 4 min -->` above a block leaves it to
tests/slow, `<!-- needs: a GPU -->` leaves it out; of such blocks, and of the README's, every command, option and file
is checked to exist.
"""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from docs.excerpts import excerpts_of
from docs.generate import pages
from flows.__main__ import app
from flows.recipes import RECIPES, Recipe
from tests.documented import Clone
from tests.flows.builders import PRESETS
from tests.pages import DOCS, FILE, LINK, PAGES, README, REPOSITORY, Block, anchors, blocks, commands, messages, prose

OTHERS = {"cd", "cp", "docker", "echo", "export", "head", "ls", "mkdir", "pip", "prefect", "rm", "sbatch", "source"}
OTHERS |= {"tail", "true", "truncate"}

SHELL = [block for page in PAGES for block in blocks(page, "sh")]
PYTHON = [block for page in PAGES for block in blocks(page, "python") if not block.marker.startswith("code ")]
YAML = [block for page in PAGES for block in blocks(page, "yaml")]
RUN = [page for page in PAGES if any(block.runs == "quick" for block in SHELL + PYTHON if block.page == page)]


def named(page: Path) -> str:
    return str(page.relative_to(REPOSITORY))


def test_what_is_made_of_the_code_is_as_the_code_is() -> None:
    stale = [named(file) for file, text in pages().items() if file.read_text(encoding="utf-8") != text]
    assert not stale, f"run `make docs`: {stale}"


@pytest.mark.flow
@pytest.mark.parametrize("page", RUN, ids=named)
def test_the_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    assert Clone(tmp_path).run_page(page, "quick")


def test_every_sub_command_is_run_by_some_page() -> None:
    lines = [line for block in SHELL if block.runs == "quick" for line in commands(block)]
    run = {words[1] for line in lines for words in simple_commands(line) if words[0] == "ratchet"}
    group: Any = typer.main.get_command(app)
    assert group.commands.keys() - run == {"ui"}  # which ends with Ctrl-C only


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_a_command_exists_with_its_options_and_files(block: Block) -> None:
    assert commands(block), "an empty block"
    for line in commands(block):
        for words in simple_commands(line):
            check_command(words)


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: block.name)
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.name, "exec")


@pytest.mark.parametrize("block", YAML, ids=lambda block: block.name)
def test_settings_validate(block: Block, tmp_path: Path) -> None:
    """Of a whole preset, or of the sections that are shown in place of those of a recipe's smoke preset."""
    values = yaml.safe_load(block.text)
    assert values, "an empty block"
    recipe = values.get("recipe") or block.marker.removeprefix("settings: ")
    if recipe not in RECIPES:
        recipe = block.page.stem if block.page.stem in RECIPES else "rest_em"
    if "recipe" not in values:
        values = yaml.safe_load((PRESETS / recipe / "smoke.yaml").read_text()) | values
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump(values))
    assert Recipe(preset).config.recipe == recipe


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_and_files_are_there(page: Path) -> None:
    for link in LINK.finditer(prose(page)):
        place, _, anchor = link["target"].partition("#")
        if "://" in place:
            continue
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{named(page)} links to {link['target']}"
        assert not anchor or anchor in anchors(target), f"{named(page)} links to {link['target']}"
    for file in FILE.findall(page.read_text(encoding="utf-8")):
        assert (REPOSITORY / file).exists() or "..." in file, f"{named(page)} names {file}"


def test_each_message_in_operations_is_one_of_the_code() -> None:
    told = [line for block in blocks(DOCS / "operations.md", "text") for line in block.text.splitlines()]
    unknown = [line for line in told if not any(" ".join(line.split()) in text for text in messages())]
    assert told and not unknown


def test_every_page_is_linked_from_the_index() -> None:
    linked = {(DOCS / link["target"].partition("#")[0]).resolve() for link in LINK.finditer(prose(DOCS / "README.md"))}
    assert [named(page) for page in PAGES if page not in linked | {README, DOCS / "README.md"}] == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipes_page_shows_its_whole_flow(recipe: str) -> None:
    file, page = f"flows/{recipe}.py", DOCS / "recipes" / f"{recipe}.md"
    shown = {
        number
        for one in excerpts_of(page.read_text(encoding="utf-8"))
        if one.file == file
        for number in range(one.start, one.stop + 1)
    }
    assert [line for number, line in flow_lines(REPOSITORY / file, recipe) if number not in shown] == []


def flow_lines(file: Path, function: str) -> list[tuple[int, str]]:
    """The lines of a function's body, below its docstring, each with its number."""
    text = file.read_text(encoding="utf-8")
    named_so = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == function)
    found = next(named_so)
    assert found.end_lineno is not None
    numbers = range(found.body[1].lineno, found.end_lineno + 1)
    return [(number, line) for number, line in enumerate(text.splitlines(), start=1) if number in numbers and line]


def simple_commands(line: str) -> list[list[str]]:
    """The commands of a line with &&, || and |, as words; $(...) is one word, of a|b it is a, and > goes nowhere."""
    plain = re.sub(r"(?<=\w)\|[\w|-]+| > \S+", "", re.sub(r"\$\([^()]*\)", "SUBSTITUTED", line))
    lexer = shlex.shlex(plain, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("&|;"):
            found.append([])
        else:
            found[-1].append(word)
    without_variables = [[word for n, word in enumerate(one) if not is_variable(one, n)] for one in found]
    return [one for one in without_variables if one]


def is_variable(words: list[str], place: int) -> bool:
    """Whether a word sets a variable for the command behind it."""
    return all(re.match(r"[A-Z_]+=", word) for word in words[: place + 1])


def check_command(words: list[str]) -> None:
    """Fail unless the program is one of ours or a known one, with a target, a sub-command and options that exist."""
    program, *rest = words
    if program == "timeout":  # --signal NAME SECONDS COMMAND ...
        check_command(rest[3:])
    elif program == "ratchet":
        check_ratchet(rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
        assert {word for word in rest if "=" not in word} <= set(targets), words
    else:
        assert program in OTHERS, f"{program!r} is not among the commands that the documentation may use"


def check_ratchet(words: list[str]) -> None:
    """Parse the words as the command would, without running anything; presets that are named exist."""
    group: Any = typer.main.get_command(app)
    command = group.commands[words[0]]
    given = [re.sub(r"^\[|\]$|\[.*\]", "", word) for word in words[1:]]
    command.make_context(words[0], [word for word in given if word not in ("...", "")])
    for word in given:
        if word.endswith(".yaml") and "/" in word:
            assert (REPOSITORY / word).is_file(), f"there is no {word}"
