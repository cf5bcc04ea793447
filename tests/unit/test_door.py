"""What is remembered of a database that lets nobody in."""

import os
import time
from pathlib import Path

import pytest

from helena_cli.database.door import LONGEST, Door


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "barred"


def silent_since(path: Path, seconds: float, *, last: float) -> Door:
    """A door where nobody has answered for so long; the last one knocked `last` seconds ago."""
    path.write_text(str(time.time() - seconds))
    os.utime(path, (0, time.time() - last))
    return Door(path)


def test_after_the_first_time_there_is_no_pause(path: Path):
    Door(path).silent()
    assert Door(path).barred
    assert Door(path).pause() == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize(
    ("silent", "last", "pause"),
    [
        (120, 60, 0),
        (180, 60, 60),
        (100_000, 60, LONGEST - 60),
        # A clock that was set back.
        (60, -3600, 0),
    ],
)
def test_the_pause_is_as_long_as_the_silence_and_not_for_ever(
    path: Path, silent: float, last: float, pause: float
):
    assert silent_since(path, silent, last=last).pause() == pytest.approx(pause, abs=2)


def test_another_knock_does_not_make_the_silence_younger(path: Path):
    door = silent_since(path, 100, last=50)
    door.silent()
    assert door.pause() == pytest.approx(100, abs=2)


def test_who_holds_it_is_asked_for_at_any_time(path: Path):
    door = silent_since(path, 100, last=1)
    door.held()
    assert door.barred
    assert door.pause() == 0


def test_once_open_all_is_forgotten(path: Path):
    door = silent_since(path, 100, last=1)
    door.opened()
    assert not door.barred
    assert door.pause() == 0


def test_a_folder_that_cannot_be_written_to_costs_the_memory_only(tmp_path: Path):
    door = Door(tmp_path / "missing" / "barred")
    door.silent()
    door.held()
    door.opened()
    assert not door.barred
