"""Fixtures that need a database."""

from collections.abc import Iterator

import pytest

from tests.writing import Desk


@pytest.fixture
def desk(helena_dsn: str) -> Iterator[Desk]:
    """Operations on their way into a database with Helena's tables."""
    desk = Desk(helena_dsn)
    yield desk
    desk.close()
