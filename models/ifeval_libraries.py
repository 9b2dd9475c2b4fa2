"""What lm-eval's IFEval needs beside lm-eval itself: three libraries, and NLTK's sentence model for English."""

import atexit
import functools
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXTRA = "install lm-eval with what IFEval needs: pip install 'ratchet-lm[evaluation]'"
STAND_IN = "ratchet-sentences"
ABBREVIATIONS = (
    "a.m al approx apt ave capt co corp dept dr e.g est etc fig gen gov hon i.e inc jr lt ltd maj messrs mr mrs ms mt "
    "no p.m ph.d prof rep rev sen sgt sr st u.k u.n u.s vol vs"
)


class BenchmarkError(RuntimeError):
    """A benchmark cannot be run here; says what is missing and what to do."""


def missing_for_ifeval() -> str | None:
    """Which of IFEval's libraries is not installed, and what to do; None: all are."""
    for name in ("immutabledict", "langdetect", "nltk"):
        if importlib.util.find_spec(name) is None:
            return f"IFEval needs {name}, which is not installed; {EXTRA}"
    return None


def sentence_model_here(folders: Sequence[Path]) -> str:
    """What `prepare_ifeval` says where nothing may be downloaded, without NLTK, whose import takes seconds."""
    named = [Path(one) for one in os.environ.get("NLTK_DATA", "").split(os.pathsep) if one]
    prefixes = [Path(sys.prefix), *(Path(sys.prefix) / one for one in ("share", "lib"))]
    shared = [Path(one) for one in ("/usr/share", "/usr/local/share", "/usr/lib", "/usr/local/lib")]
    searched = [
        *named,
        *(one / "nltk_data" for one in (Path.home(), *prefixes, *shared)),
        *folders,
    ]  # as nltk.data.path
    here = any((one / "tokenizers" / "punkt_tab" / "english").is_dir() for one in searched)
    zipped = any((one / "tokenizers" / "punkt_tab.zip").is_file() for one in searched)
    return "punkt_tab" if here or zipped else STAND_IN


def prepare_ifeval(folders: Sequence[Path], *, may_download: bool) -> str:
    """Have IFEval's libraries at hand; says how sentences will be told apart: by "punkt_tab", or by `STAND_IN`.

    NLTK's sentence model for English, punkt_tab, is searched for where NLTK looks and in `folders`, then, if that is
    allowed, asked for from the network. Without it the same splitter works with a few abbreviations and nothing
    learnt: on GSM8K's training questions it counts otherwise in 33 of 7,473. Two of the 25 kinds of instructions
    depend on it.
    """
    if missing := missing_for_ifeval():
        raise BenchmarkError(missing)
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0  # else it draws anew each time
    nltk.data.path += [str(folder) for folder in folders if str(folder) not in nltk.data.path]
    if (found := _punkt(nltk)) is None and may_download:
        for _ in nltk.downloader.Downloader().incr_download("punkt_tab"):
            pass  # its messages: the note of the figures says it better
        found = _punkt(nltk)
    if found is None:
        nltk.data.path.append(_stand_in())
        found = _punkt(nltk)
    return STAND_IN if STAND_IN in str(found) else "punkt_tab"


def _punkt(nltk: Any) -> Any:  # nltk and its path pointers are untyped
    try:
        return nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return None


@functools.cache
def _stand_in() -> str:
    """A folder with a sentence model that knows `ABBREVIATIONS` and nothing else; it ends with this process."""
    root = tempfile.mkdtemp(prefix=f"{STAND_IN}-")
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    folder = Path(root, "tokenizers", "punkt_tab", "english")
    folder.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).touch()
    (folder / "abbrev_types.txt").write_text(ABBREVIATIONS.replace(" ", "\n"), encoding="utf-8")
    return root
