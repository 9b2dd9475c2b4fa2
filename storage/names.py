"""Names that become file names: checked where a person gave them for a step, rewritten where anything may come in."""

import re

from storage.digests import digest_of

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")


def checked_name(name: str, what: str) -> str:
    """The name itself, when it can be a file name on any system and cannot leave its folder.

    Raises:
        ValueError: it cannot.
    """
    if not _PLAIN.fullmatch(name):
        raise ValueError(
            f"{what} is {name!r}; expected letters, digits, '.', '_' and '-', beginning with one of the first"
        )
    return name


def safe_name(name: str) -> str:
    """A file name for any text: itself where possible, else what is left of it and a digest, so that no two collide."""
    if _PLAIN.fullmatch(name):
        return name
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:80]
    return f"{readable or 'x'}-{digest_of(name)[:12]}"
