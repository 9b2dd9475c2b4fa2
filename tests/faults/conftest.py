"""One server of forked runs and one unbroken run for the whole session."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.harness import Driver, Place, leftovers, stored


@pytest.fixture(scope="session")
def driver() -> Iterator[Driver]:
    driver = Driver()
    yield driver
    driver.close()


@pytest.fixture(scope="session")
def whole(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that nothing disturbed."""
    place = Place(tmp_path_factory.mktemp("unbroken"))
    ended = driver.run(place)
    assert ended.status == 0, ended.output
    assert leftovers(place) == []
    return place


@pytest.fixture(scope="session")
def unbroken(whole: Place) -> dict[str, Any]:
    return stored(whole.home)
