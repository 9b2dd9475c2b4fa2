"""Write the pages that are made of the code, and the code in the others: `make docs`."""

import sys
from pathlib import Path

from docs.excerpts import REPOSITORY, fill
from docs.references import commands_page, datasets_page, settings_page

DOCS = REPOSITORY / "docs"
REFERENCES = {
    DOCS / "reference" / "datasets.md": datasets_page,
    DOCS / "reference" / "settings.md": settings_page,
    DOCS / "reference" / "commands.md": commands_page,
}


def pages() -> dict[Path, str]:
    """What each page should hold."""
    written = {file: fill(file.read_text(encoding="utf-8")) for file in sorted(DOCS.rglob("*.md"))}
    return written | {file: make() for file, make in REFERENCES.items()}


def main() -> None:
    """Bring every page up to date, and say which were not."""
    for file, text in pages().items():
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
            sys.stdout.write(f"{file.relative_to(REPOSITORY)}\n")


if __name__ == "__main__":
    main()
