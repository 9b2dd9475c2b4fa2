"""The pages of the documentation as the tests read them: code blocks, links, and messages that the code has."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"
README = REPOSITORY / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]

BLOCK = re.compile(r"^(?:<!-- (?P<marker>[^\n]+?) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
LINK = re.compile(r"(?<!\!)\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (?P<title>.+)$", re.M)
FILE = re.compile(
    r"\b(?:deployments|docs|benchmarks|flows|tasks|models|storage|tests)/[\w./-]+\.(?:yaml|json|md|py|sbatch)\b(?!:\d)"
)


class Block(NamedTuple):
    """A fenced block of a page, and the comment right above it."""

    page: Path
    line: int
    language: str
    text: str
    marker: str  # "slow: 4 min", "needs: a GPU", "settings: spin", "code flows/spin.py: ..."; empty: none

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    @property
    def runs(self) -> str:
        """When its commands are run: "quick", "slow", or "" for never; those of the README are checked only."""
        if self.marker.startswith("slow:"):
            return "slow"
        return "" if self.marker.startswith("needs:") or self.page == README else "quick"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The page's blocks of these languages, in order."""
    text = page.read_text(encoding="utf-8")
    found = (
        Block(page, text.count("\n", 0, one.start()) + 1, one["language"], one["text"], one["marker"] or "")
        for one in BLOCK.finditer(text)
    )
    return [block for block in found if block.language in languages]


def commands(block: Block) -> list[str]:
    """The commands of a block, without comments and each in one line."""
    lines = (line.partition(" # ")[0].strip() for line in block.text.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def prose(page: Path) -> str:
    """The page without its blocks."""
    return BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What `#...` may follow a link to the page, as GitHub makes them of headings."""
    found: set[str] = set()
    for heading in HEADING.finditer(prose(page)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading["title"]).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = sum(one == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", one) is not None for one in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


@cache
def messages() -> list[str]:
    """Every text in the code, with … where something is filled in."""
    found = []
    for package in ("flows", "tasks", "models", "storage"):
        for file in sorted((REPOSITORY / package).glob("*.py")):
            found += list(_texts(ast.parse(file.read_text(encoding="utf-8"))))
    return found


def _texts(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield _plain(re.sub(r"%[sdg]", "…", node.value))
        elif isinstance(node, ast.JoinedStr):
            yield _plain("".join(str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values))


def _plain(text: str) -> str:
    return " ".join(text.split())
