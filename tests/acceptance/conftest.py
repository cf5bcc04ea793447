"""What more than one file of these tests needs."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import user_systemd
from tests.user_systemd import UserSystemd


@pytest.fixture
def user_manager(tmp_path: Path, state_dir: Path) -> Iterator[UserSystemd]:
    """A user manager of systemd of the test's own."""
    if reason := user_systemd.obstacle():
        pytest.skip(reason)
    runtime = state_dir / "run"
    runtime.mkdir(mode=0o700)
    manager = UserSystemd(tmp_path, runtime)
    try:
        if not manager.answers():
            pytest.skip(f"systemd does not run here: {manager.log()[-300:]}")
        yield manager
    finally:
        manager.close()
