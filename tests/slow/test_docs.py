"""The commands of the documentation that take minutes: `<!-- slow: ... -->` stands above them."""

from pathlib import Path

import pytest

from tests.documented import Clone
from tests.pages import PAGES, blocks

SLOW = [page for page in PAGES if any(block.runs == "slow" for block in blocks(page, "sh"))]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", SLOW, ids=lambda page: page.name)
def test_the_slow_commands_of_a_page_run(page: Path, tmp_path: Path) -> None:
    assert Clone(tmp_path).run_page(page, "quick", "slow")
