"""No folder is watched twice for one queue, and whoever comes second learns who was first."""

import os
from pathlib import Path

import pytest

from helena_cli.documents.watch_lock import WatchLocks
from helena_cli.errors import HelenaError


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "database.spool"


def locks(spool: Path) -> WatchLocks:
    return WatchLocks(spool)


def test_the_second_learns_who_was_first(spool: Path):
    first, second = locks(spool), locks(spool)
    first.take([Path("/docs")])

    with pytest.raises(HelenaError, match=f"/docs is watched already, by process {os.getpid()}"):
        second.take([Path("/docs")])

    first.release()
    second.take([Path("/docs")])
    second.release()


@pytest.mark.parametrize(("one", "other"), [("/docs", "/docs/sub"), ("/docs/sub", "/docs")])
def test_a_folder_in_a_watched_folder_is_watched_already(spool: Path, one: str, other: str):
    first, second = locks(spool), locks(spool)
    first.take([Path(one)])

    with pytest.raises(HelenaError, match=f"{other} is watched already with {one}, by process"):
        second.take([Path(other)])

    # Nothing of it stays behind.
    first.release()
    locks(spool).take([Path(other)])


def test_other_folders_and_other_databases_are_free(spool: Path):
    first, second = locks(spool), locks(spool)
    first.take([Path("/docs")])
    second.take([Path("/docs2"), Path("/notes")])
    other = locks(spool.with_name("other.spool"))
    other.take([Path("/docs")])
    for one in (first, second, other):
        one.release()


def test_all_or_none_are_taken(spool: Path):
    first, second = locks(spool), locks(spool)
    first.take([Path("/b")])
    with pytest.raises(HelenaError):
        second.take([Path("/a"), Path("/b")])

    first.take([Path("/a"), Path("/b")])
    first.release()


def test_what_is_no_longer_watched_is_given_back(spool: Path):
    first, second = locks(spool), locks(spool)
    first.take([Path("/a"), Path("/b")])
    first.keep([Path("/b")])
    second.take([Path("/a")])
    first.release()
    second.release()
